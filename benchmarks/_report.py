"""What every benchmark prints beside its figures: the machine and the versions."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import tfaccel


def environment() -> dict[str, object]:
    """The machine and the versions that the figures belong to."""
    return {
        "machine": str(tfaccel.Devices.find()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "tfaccel": tfaccel.__version__,
    }


def spread(values: list[float], digits: int = 2) -> dict[str, float | int]:
    """Median, smallest and largest of some figures, and how many they were."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": len(values),
    }


def ratios_in_turn(one: Callable[[], object], other: Callable[[], object], turns: int) -> list[float]:
    """The time that `one` takes over that of `other`, both run in each turn."""
    ratios = []
    for _ in range(turns):
        moments = [time.perf_counter()]
        for run in (one, other):
            run()
            moments.append(time.perf_counter())
        begun, between, ended = moments
        ratios.append((between - begun) / (ended - between))
    return ratios


def print_row(**row: object) -> None:
    """Prints one JSON line, with the environment behind the figures."""
    print(json.dumps({**row, **environment()}), flush=True)
