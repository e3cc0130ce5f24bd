"""Several steps in one compiled program, over data that stay on the device or over a stream.

Keras's own loop (`steps_per_execution`) wraps each step's result in an `Optional` and looks up its iterator
twice a step; its length is fixed when it is traced. Here the number of steps is an argument, so an epoch need
not be a multiple of it, and the same program serves the last, shorter call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from tfaccel.fast_kernels.resident import BatchForm
from tfaccel.keras_fixes.pipeline_statistics import count_examples


class Step(Protocol):
    """What a loop runs; its logs are nested scalars, or whatever a `train_step` gives back."""

    def on_batch(self, data: Any) -> Any:
        """The logs of a step on a batch."""

    def on_rows(self, cut: Callable[[tf.Tensor], Any], rows: tf.Tensor) -> Any:
        """The logs of a step on the batch that `cut` makes of `rows`."""

    def examples(self, data: Any) -> tf.Tensor:
        """How many there are in a batch; a scalar int32."""


class OneDeviceStep:
    """A step that runs where its caller is.

    Args:
        step: From a batch to its logs.
    """

    def __init__(self, step: Callable[[Any], Any]):
        self.on_batch = step

    def on_rows(self, cut: Callable[[tf.Tensor], Any], rows: tf.Tensor) -> Any:
        """The logs of a step on the batch that `cut` makes of `rows`."""
        return self.on_batch(cut(rows))

    def examples(self, data: Any) -> tf.Tensor:
        """How many there are in a batch; a scalar int32."""
        return count_examples(data)


def resident_loop(step: Step, form: BatchForm, static_size: int | None, xla: bool) -> Any:
    """A program that runs steps over rows gathered by index.

    Args:
        step: What to run.
        form: How the batches look.
        static_size: Rows of every batch, where XLA compiles the program or a part of it; None for a program
            that takes any size, and a last batch that is smaller.
        xla: Compile the whole program with XLA.

    Returns:
        A function of `(leaves, order, size, first, count)`: the tensors, the order of the rows, rows a
        batch, the number of the first batch and how many batches; gives the logs of the last step.
    """

    def run(
        leaves: list[tf.Tensor], order: tf.Tensor, size: tf.Tensor, first: tf.Tensor, count: tf.Tensor
    ) -> Any:
        def numbered(batch: tf.Tensor) -> Any:
            if static_size is not None:
                # Not a slice: XLA would compile anew for each position.
                rows = tf.gather(order, batch * static_size + tf.range(static_size))
            else:
                rows = order[batch * size : tf.minimum((batch + 1) * size, tf.shape(order)[0])]
            return step.on_rows(lambda some: form.cut(leaves, some), rows)

        return _repeat(retraced_silently(tf.function(numbered, autograph=False)), first, count)

    number = tf.TensorSpec([], tf.int32)
    signature = [form.specs, form.order_spec, number, number, number]
    return retraced_silently(tf.function(run, input_signature=signature, jit_compile=xla, autograph=False))


def _repeat(step: Any, first: tf.Tensor, count: tf.Tensor) -> Any:
    """`step(first)`, `step(first + 1)` … `count` times; the structure that the last one gave."""
    structure = step.get_concrete_function(tf.TensorSpec([], tf.int32)).structured_outputs
    outputs = _Outputs(structure)

    def body(index: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor]:
        return [index + 1, *outputs.flatten(step(index))]

    _, *last = tf.while_loop(
        lambda index, *_: index < first + count,
        body,
        [first, *outputs.placeholders()],
        shape_invariants=[tf.TensorShape([]), *outputs.shapes()],
        parallel_iterations=1,
    )
    return outputs.pack(last)


def stream_loop(step: Step, xla: bool) -> Any:
    """A program that runs steps over the batches of an iterator.

    Args:
        step: What to run.
        xla: Compile each step with XLA, as Keras does.

    Returns:
        A function of `(iterator, count)`: gives the logs of the last step, how many steps were run (fewer
        than `count` where the data ended), the examples in them, and the seconds that they waited for data.
    """

    def run(iterator: Any, count: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor, tf.Tensor]:
        compiled = retraced_silently(
            tf.function(step.on_batch, autograph=False, reduce_retracing=True, jit_compile=xla)
        )
        structure = compiled.get_concrete_function(iterator.element_spec).structured_outputs
        outputs = _Outputs(structure)

        def body(done: tf.Tensor, _: tf.Tensor, examples: tf.Tensor, waited: tf.Tensor, *last: Any) -> list:
            asked_at = tf.timestamp()
            with tf.control_dependencies([asked_at]):
                batch = iterator.get_next_as_optional()
            goes_on = batch.has_value()
            with tf.control_dependencies([goes_on]):
                waited += tf.timestamp() - asked_at

            def take() -> list[tf.Tensor]:
                data = batch.get_value()
                return [done + 1, examples + step.examples(data), *outputs.flatten(compiled(data))]

            done, examples, *last = tf.cond(goes_on, take, lambda: [done, examples, *last])
            return [done, goes_on, examples, waited, *last]

        first = [tf.constant(0), tf.constant(True), tf.constant(0), tf.constant(0.0, tf.float64)]
        done, _, examples, waited, *last = tf.while_loop(
            lambda done, goes_on, *_: tf.logical_and(goes_on, done < count),
            body,
            [*first, *outputs.placeholders()],
            shape_invariants=[tf.TensorShape([])] * len(first) + outputs.shapes(),
            parallel_iterations=1,
        )
        return outputs.pack(last), done, examples, waited

    return retraced_silently(tf.function(run, autograph=False, reduce_retracing=True))


def retraced_silently(function: Any) -> Any:
    """A function that TensorFlow's warning about frequent tracing leaves out.

    It counts by the place in the source: each fit with a callback in its step, and each model, has a loop of
    its own from here, traced once. Nothing that a user wrote is traced too often.
    """
    function._omit_frequent_tracing_warning = True
    return function


class _Outputs:
    """What a step gives back, as a flat list of tensors that a loop can carry."""

    def __init__(self, structure: Any):
        self._structure = structure
        self._specs = [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]
        for spec in self._specs:
            if not isinstance(spec, tf.TensorSpec | tf.Tensor):
                raise TypeError(f"the step gives back {spec}, which a loop can't carry")

    def placeholders(self) -> list[tf.Tensor]:
        """What the loop starts with; a first step always replaces it."""
        return [tf.zeros([size or 0 for size in _sizes(spec)], spec.dtype) for spec in self._specs]

    def shapes(self) -> list[tf.TensorShape]:
        """The shapes that the loop may count on."""
        return [spec.shape for spec in self._specs]

    def flatten(self, structure: Any) -> list[tf.Tensor]:
        """The tensors of one step's result."""
        return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]

    def pack(self, tensors: list[tf.Tensor]) -> Any:
        """The structure again, around the tensors."""
        rest = iter(tensors)
        flat = [None if leaf is None else next(rest) for leaf in tf.nest.flatten(self._structure)]
        return tf.nest.pack_sequence_as(self._structure, flat)


def _sizes(spec: Any) -> list[int | None]:
    return [] if spec.shape.rank is None else list(spec.shape)
