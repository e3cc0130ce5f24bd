"""Under `tf.distribute` Keras builds a model from its first batch: it loses that batch, or fails on it.

`fit` and `evaluate` draw a batch and average it over the replicas, to learn its shape. A batch that does
not divide evenly can't be averaged (keras-team/keras#19246); under `MultiWorkerMirroredStrategy` none can
(keras-team/keras#20585); and a Python generator has then handed over a batch, and its prefetching another,
that nobody trains on: of 64 samples in 4 batches 32 are seen.

Smallest reproduction (Keras 3.15.1, two CPUs):

    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(x[:15], y[:15], batch_size=15)     # InvalidArgumentError: Inputs to operation AddN ...

The fix: the shapes are in the data set's specification. No batch is drawn.
"""

from __future__ import annotations

import types
from typing import Any

import keras
import tensorflow as tf


def build_from_specification(model: keras.Model, epoch_iterator: Any = None, data_batch: Any = None) -> None:
    """`model._maybe_symbolic_build`: makes the variables of the model, its optimizer, loss and metrics.

    Args:
        model: Compiled under a strategy.
        epoch_iterator: Of the running `fit` or `evaluate`; or None.
        data_batch: Arrays, for `train_on_batch` and its like; or None.
    """
    if epoch_iterator is not None:
        data_batch = keras.tree.map_structure(
            _shaped, epoch_iterator._distributed_dataset.element_spec, none_is_leaf=False
        )
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=data_batch)


def _shaped(spec: Any) -> Any:
    """The shape of one replica's part, its number of rows left open; None for what a batch may leave out."""
    spec = getattr(spec, "_value_specs", [spec])[0]
    if not isinstance(spec, tf.TensorSpec):
        return None
    shape = spec.shape
    if shape.rank:
        shape = [None, *shape[1:]]
    return types.SimpleNamespace(shape=tuple(shape), dtype=spec.dtype)
