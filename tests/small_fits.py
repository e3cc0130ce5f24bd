"""The fits that the tests of all techniques share: few steps of the small model on the small data."""

import keras
import numpy as np

import tfaccel


def kernels(model):
    return [np.asarray(v) for v in model.trainable_variables if len(v.shape) > 1]


def off_grid(kernel, bits, axis=-1):
    """How far a kernel is from a grid of each output channel, in steps."""
    columns = np.moveaxis(np.asarray(kernel), axis, -1)
    columns = columns.reshape(-1, columns.shape[-1])
    steps = np.maximum(np.abs(columns).max(0) / (2 ** (bits - 1) - 1), 1e-12)
    return float(np.abs(columns / steps - np.round(columns / steps)).max())


def fit(helpers, small, callbacks=(), optimizer=None, kind="sequential", epochs=2, data=None, **options):
    """The model and its history; on `data` where it is given, which has batches already."""
    model = helpers.compile(helpers.build(kind), optimizer, **options)
    given = {"x": small[0], "y": small[1], "batch_size": 24} if data is None else {"x": data}
    history = model.fit(**given, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model, history.history


def fit_under(strategy, helpers, small, callback, epochs=2):
    """The model, fitted under tfaccel with a strategy."""
    accelerator = tfaccel.Accelerator(strategy, "float32", False)
    with accelerator.scope():
        sgd = keras.optimizers.SGD(0.05)
        model = helpers.compile(helpers.build(), sgd, **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    model.fit(data, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])
    return model


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C at the end of an epoch."""

    def __init__(self, epoch=0):
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt
