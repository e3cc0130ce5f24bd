"""`MultiWorkerMirroredStrategy` must come before all operations; TensorFlow's error does not say so.

"RuntimeError: Collective ops must be configured at program startup" is what a script gets that made a tensor,
a data set or a model before its strategy (tensorflow/tensorflow#34568 and others), after all workers have
waited for one another.

Smallest reproduction (TensorFlow 2.21, with a `TF_CONFIG` of two workers):

    tf.constant(1)
    tf.distribute.MultiWorkerMirroredStrategy()

It can't be healed: the runtime has started without the other workers. It is refused, before they are met.
"""

from __future__ import annotations

from tensorflow.python.eager import context


def check_nothing_ran() -> None:
    """Raises where TensorFlow's runtime has started already.

    Raises:
        ValueError: A tensor, data set or model was made.
    """
    if context.context()._context_handle is not None:
        raise ValueError(
            "TensorFlow has run operations already, and several workers have to be joined before the first. "
            "Allowed: nothing of TensorFlow before the Accelerator. Make the Accelerator at the top of the "
            "script, before tensors, data sets and models."
        )
