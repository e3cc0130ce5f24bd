"""What this machine is: found once, without starting TensorFlow's runtime and without waiting for anybody.

Listing devices must not initialise them (a strategy or memory setting that comes later would be
refused), and it must not talk to the network: a TPU is recognised by the signs it leaves in the
environment, and is contacted only by `prepare.strategy`, in a subprocess with a time limit.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import platform
from collections.abc import Mapping

import tensorflow as tf

from tfaccel.free_memory import gpu_memory_bytes

# Read by TensorFlow's own TPU client. TPU_ML_PLATFORM* is left out on purpose: importing TensorFlow
# sets it on every machine.
TPU_VARIABLES = (
    "TPU_NAME",
    "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS",
    "TPU_CONFIG",
    "TPU_WORKER_HOSTNAMES",
)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The machine, as far as training is concerned.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`: the fastest kind that is present.
        count: How many devices of that kind.
        names: Their names, e.g. `("NVIDIA H100",)`.
        memory_bytes: Memory of one device (of the machine, on CPU); None where it can't be told.
        compute_capability: `(major, minor)` of the weakest NVIDIA GPU; None elsewhere.
        bfloat16: Whether the hardware multiplies bfloat16 itself.
        float16: Whether the hardware multiplies float16 itself.
        cpu_features: Those of `amx`, `avx512f`, `avx512_bf16`, `avx512_fp16`, `avx2` that the CPU has.
        tpu_environment: The signs of a TPU that were found, e.g. `("TPU_NAME",)`; empty elsewhere.

    Example:
        >>> devices = tfaccel.Devices.find()
        >>> devices.kind in ("cpu", "gpu", "tpu") and devices.count >= 1
        True
    """

    kind: str
    count: int
    names: tuple[str, ...]
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    bfloat16: bool = False
    float16: bool = False
    cpu_features: tuple[str, ...] = ()
    tpu_environment: tuple[str, ...] = ()

    @staticmethod
    def find() -> Devices:
        """Looks at the machine once per process; later calls give back the same value."""
        return _find()

    @property
    def has_tensor_cores(self) -> bool:
        """Whether half-precision products run on tensor cores (NVIDIA, compute capability 7.0 on)."""
        return self.compute_capability is not None and self.compute_capability >= (7, 0)

    def __str__(self) -> str:
        """One line for a person."""
        parts = [f"{self.count} × {self.kind.upper()} ({self.names[0]})"]
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 2**30:.0f} GiB")
        if self.compute_capability:
            parts.append("compute capability {}.{}".format(*self.compute_capability))
        if self.kind == "cpu":
            parts.append(" ".join(self.cpu_features) or "no vector extension found")
        return ", ".join(parts)


@functools.cache
def _find() -> Devices:
    tpu_environment = find_tpu_environment(os.environ)
    tpus = tf.config.list_physical_devices("TPU")
    gpus = tf.config.list_physical_devices("GPU")
    if tpus:
        names = tuple(device.name for device in tpus)
        return Devices("tpu", len(tpus), names, bfloat16=True, tpu_environment=tpu_environment)
    if gpus:
        return describe_gpus(
            [tf.config.experimental.get_device_details(gpu) for gpu in gpus],
            gpu_memory_bytes(),
            tpu_environment,
        )
    return describe_cpu(cpu_flags(), tpu_environment)


def describe_gpus(
    details: list[Mapping], memory_bytes: int | None, tpu_environment: tuple[str, ...] = ()
) -> Devices:
    """Turns TensorFlow's device details (one mapping a GPU) into a `Devices`.

    A model that is mirrored runs as its weakest replica allows, so the lowest capability counts.
    """
    capabilities = [d["compute_capability"] for d in details if "compute_capability" in d]
    weakest = min(capabilities) if len(capabilities) == len(details) else None
    return Devices(
        kind="gpu",
        count=len(details),
        names=tuple(d.get("device_name", "GPU") for d in details),
        memory_bytes=memory_bytes,
        compute_capability=weakest,
        bfloat16=weakest is not None and weakest >= (8, 0),
        float16=weakest is not None and weakest >= (5, 3),
        tpu_environment=tpu_environment,
    )


def describe_cpu(flags: frozenset[str], tpu_environment: tuple[str, ...] = ()) -> Devices:
    """Turns the CPU's feature flags (as Linux spells them) into a `Devices`."""
    features: list[str] = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16") if f in flags]
    if any(flag.startswith("amx") for flag in flags):
        features.append("amx")
    return Devices(
        kind="cpu",
        count=1,
        names=(platform.processor() or platform.machine() or "CPU",),
        memory_bytes=physical_memory_bytes(),
        bfloat16=bool({"avx512_bf16", "amx_bf16"} & flags),
        float16=bool({"avx512_fp16", "amx_fp16", "fphp"} & flags),
        cpu_features=tuple(features),
        tpu_environment=tpu_environment,
    )


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """The CPU's feature flags; empty where the system has no `/proc/cpuinfo`."""
    try:
        lines = pathlib.Path(cpuinfo).read_text().splitlines()
    except OSError:
        return frozenset()
    # x86 calls the line "flags", ARM "Features".
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def physical_memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def find_tpu_environment(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The signs of a TPU: variables that name one, its device files together with libtpu."""
    found = [name for name in TPU_VARIABLES if environment.get(name)]
    accelerators = sorted(pathlib.Path("/dev").glob("accel[0-9]*"))
    if accelerators and importlib.util.find_spec("libtpu") is not None:
        found.extend(str(path) for path in accelerators)
    return tuple(found)
