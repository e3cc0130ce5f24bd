"""How often a training step was traced, and why."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


class Traces:
    """The traces of one `fit`: `causes`, a sentence each, and the forms of the batches."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self._forms: list[Any] = []
        self._is_changed = False

    def step_changed(self) -> None:
        """Call it where a callback asks for the step to be traced anew."""
        self._is_changed = True

    def note(self, data: Any) -> bool:
        """Call it where the step runs as Python; gives whether that is a new trace, and keeps its cause.

        Args:
            data: What the step works on.
        """
        if tf.executing_eagerly() or not _is_first_replica():
            return False
        form = tf.nest.map_structure(_spec, data)
        if not self._forms:
            cause = "the first step"
        elif form not in self._forms:
            cause = f"batches of {_shown(form)}, after {_shown(self._forms[-1])}"
        elif self._is_changed:
            cause = "a callback changed what the step does"
        else:
            cause = "the same batches again, in another loop or compiled otherwise"
        self._is_changed = False
        self._forms.append(form)
        self.causes.append(cause)
        return True

    def first_batch(self, rows: int | None) -> Any:
        """The form of the first trace's batches; None where nothing was traced.

        Args:
            rows: That a batch has, where the trace left it open.
        """
        if not self._forms:
            return None
        return tf.nest.map_structure(lambda spec: _of_rows(spec, rows), self._forms[0])


def _is_first_replica() -> bool:
    """Where replicas are traced in turn, whether this is the first of them."""
    context = tf.distribute.get_replica_context()
    return context is None or tf.get_static_value(context.replica_id_in_sync_group) in (0, None)


def _spec(leaf: Any) -> Any:
    return tf.TensorSpec(leaf.shape, leaf.dtype) if isinstance(leaf, tf.Tensor) else leaf


def _of_rows(spec: Any, rows: int | None) -> Any:
    """With the number of rows that the trace left open."""
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank or spec.shape[0] is not None:
        return spec
    return tf.TensorSpec([rows, *spec.shape[1:]], spec.dtype)


def _shown(form: Any) -> str:
    """Shapes and dtypes of a batch, for a person."""
    leaves = [leaf for leaf in tf.nest.flatten(form) if isinstance(leaf, tf.TensorSpec)]
    return ", ".join(f"{leaf.dtype.name}{list(leaf.shape)}" for leaf in leaves).replace("None", "?")
