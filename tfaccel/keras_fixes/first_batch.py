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

import contextlib
import types
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter


def build_from_specification(model: keras.Model, epoch_iterator: Any = None, data_batch: Any = None) -> None:
    """`model._maybe_symbolic_build`: makes the variables of the model, its optimizer, loss and metrics.

    Args:
        model: Compiled under a strategy.
        epoch_iterator: Of the running `fit` or `evaluate`; or None.
        data_batch: Arrays, for `train_on_batch` and its like; or None.
    """
    if type(model).call is keras.Model.call:
        return  # it has steps only, as a GAN does: its parts are built by their own
    if epoch_iterator is not None:
        data_batch = keras.tree.map_structure(
            _shaped, epoch_iterator._distributed_dataset.element_spec, none_is_leaf=False
        )
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=data_batch)
    adapter = getattr(epoch_iterator, "data_adapter", None)
    if isinstance(adapter, ArrayDataAdapter):
        check_no_empty_convolutions(model, adapter._num_samples % adapter._batch_size)


def build_state(model: keras.Model, batch: Any) -> None:
    """Makes the variables of optimizer, loss and metrics on one device before the step is traced.

    TensorFlow traces a function that makes variables a second time; Keras traces every first `fit` twice.

    Args:
        model: Compiled; one that is not built yet is left to the trace, and so is one whose own code would
            run on symbols: it may train some of the weights only, or look at values.
        batch: The specification of a batch.
    """
    specs = keras.tree.flatten(batch)
    if not model.built or not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank for spec in specs):
        return
    own = ("train_step", "compute_loss", "compute_metrics")
    if any(getattr(type(model), name) is not getattr(keras.Model, name) for name in own):
        return
    shaped = [types.SimpleNamespace(shape=tuple(spec.shape), dtype=spec.dtype) for spec in specs]
    # What can't be built from shapes alone is made in the trace, as Keras does.
    with contextlib.suppress(ValueError, TypeError, RuntimeError, AttributeError, LookupError):
        model._symbolic_build(data_batch=keras.tree.pack_sequence_as(batch, shaped))


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs of a model, nested as it takes them; None for one that has none, a subclassed one.

    `model.inputs` is flat, and `Sequential` has no `input`.
    """
    return getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None)


def _shaped(spec: Any) -> Any:
    """The shape of one replica's part, its number of rows left open; None for what a batch may leave out."""
    spec = getattr(spec, "_value_specs", [spec])[0]
    if not isinstance(spec, tf.TensorSpec | tf.SparseTensorSpec | tf.RaggedTensorSpec):
        return None
    shape = spec.shape
    if shape.rank:
        shape = [None, *shape[1:]]
    return types.SimpleNamespace(shape=tuple(shape), dtype=spec.dtype)


def check_enough(samples: int, strategy: tf.distribute.Strategy | None) -> None:
    """Raises where some replicas would never get a sample.

    Raises:
        ValueError: There are fewer samples than replicas.
    """
    replicas = 1 if strategy is None else strategy.num_replicas_in_sync
    if samples < replicas:
        raise ValueError(
            f"fit was given {samples} samples for {replicas} replicas. Allowed: at least one for each. Every "
            "worker gets the whole data set, not its share; or start fewer workers."
        )


def check_no_empty_convolutions(model: keras.Model, last_batch: int) -> None:
    """Raises where a replica would get no row of the last batch, and its kernels can't take that.

    oneDNN gives the convolution and the pooling of an empty batch a wrong shape: the next operation fails, or
    the process is aborted (TensorFlow 2.21).

    Args:
        model: Under a strategy.
        last_batch: Its rows; 0 where all batches are whole.

    Raises:
        ValueError: It has convolutions or poolings and fewer rows than replicas, on CPUs.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    on_cpu = all("CPU" in device for device in model.distribute_strategy.extended.worker_devices)
    kinds = ("Conv", "MaxPool", "AveragePool")
    hurt = [layer.name for layer in model._flatten_layers() if type(layer).__name__.startswith(kinds)]
    if on_cpu and hurt and 0 < last_batch < replicas:
        raise ValueError(
            f"The last batch has {last_batch} samples for {replicas} replicas, and {hurt[0]!r} can't take an "
            f"empty share on a CPU. Allowed: at least {replicas} samples in every batch. Choose another "
            "batch_size, or leave the last samples out."
        )
