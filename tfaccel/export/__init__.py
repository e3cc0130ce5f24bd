"""After `fit`: a plain Keras model in, a file out, with proof that the file still works."""
