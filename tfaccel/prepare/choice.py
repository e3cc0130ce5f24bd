"""One decision, with the reason for it: what `print(accelerator)` and `tfaccel plan` show."""

from __future__ import annotations

import dataclasses
from typing import Any


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
