"""One decision, with the reason for it: what `print(accelerator)` and `tfaccel plan` show."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from tfaccel.keras_fixes.compile_checks import is_distributed


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value that was chosen, and why.

    Args:
        value: What will be used.
        reason: One sentence that says why; it names the measured figure where there is one.
        by_user: True where the user named the value and nothing was chosen.
    """

    value: Any
    reason: str
    by_user: bool = False

    def __str__(self) -> str:
        """The value, for a person."""
        if isinstance(self.value, tf.distribute.Strategy):
            if not is_distributed(self.value):
                return "one_device"
            workers = isinstance(self.value, tf.distribute.MultiWorkerMirroredStrategy)
            # The class itself still has the name of the paper.
            name = "MultiWorkerMirroredStrategy" if workers else type(self.value).__name__
            return f"{name} × {self.value.num_replicas_in_sync}"
        return self.value.name if isinstance(self.value, keras.DTypePolicy) else str(self.value)
