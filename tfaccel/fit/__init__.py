"""Inside `model.fit`: one technique, one file; pure functions first, the Keras callback below."""
