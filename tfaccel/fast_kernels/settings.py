"""What an `Accelerator` asks of the kernels, and what they tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping

Report = MutableMapping[str, str]  # what was chosen, and why


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an `Accelerator` chose for the steps of the models that are compiled in its scope.

    Args:
        fused: Whether fused operations are tried, and data stay in memory.
        xla: Whether the loop is compiled by XLA: True, False, or None to find out while it runs.
        growing_calls: Whether a call into TensorFlow may run more than `model.steps_per_execution` steps.
        synchronize: Whether BatchNormalization takes its statistics over all replicas.
    """

    fused: bool = True
    xla: bool | None = None
    growing_calls: bool = True
    synchronize: bool = True
