"""Under `MirroredStrategy` TensorFlow writes into the user's own labels.

Data that come from Python (a `PyDataset`, a generator, `tf.data.Dataset.from_generator`) reach TensorFlow
without a copy where numpy's memory is aligned to 64 bytes. The split into replicas keeps the alias, and an
operation that may overwrite its input (`y_true - y_pred`) overwrites the user's array: 32 of 64 rows of
labels after 3 epochs, now and then, silently.

Smallest reproduction (TensorFlow 2.21, two CPUs; `y` begins at a multiple of 64 bytes):

    class Batches(keras.utils.PyDataset):
        def __len__(self): return 4
        def __getitem__(self, i): return x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16]

    model.fit(Batches(), epochs=3)               # y has changed

The fix: batches of data sets that call Python are copied, once, before they are split.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

CALLS_PYTHON = ("PyFunc", "EagerPyFunc", "PyFuncStateless")


def calls_python(dataset: tf.data.Dataset) -> bool:
    """Whether a function of the data set, or of one that it is made from, runs in Python."""
    for function in dataset._functions():
        graph = function.function.graph.as_graph_def()
        inner = [node.op for each in graph.library.function for node in each.node_def]
        if any(op in CALLS_PYTHON for op in (*inner, *(node.op for node in graph.node))):
            return True
    return any(calls_python(each) for each in dataset._inputs())


def copied(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set with batches in memory of their own; as it is where it does not call Python."""
    if not calls_python(dataset):
        return dataset

    def copy(*batch: Any) -> Any:
        tensors = tf.nest.map_structure(
            lambda leaf: tf.raw_ops.DeepCopy(x=leaf) if _is_dense(leaf) else leaf, batch
        )
        return tensors if len(tensors) > 1 else tensors[0]

    return dataset.map(copy)


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, tf.Tensor) and leaf.dtype not in (tf.string, tf.variant, tf.resource)
