"""Which dtype policy: half precision where the hardware multiplies it faster, float32 elsewhere.

| device | policy | why |
|---|---|---|
| TPU | `mixed_bfloat16` | native; same exponent range as float32, so no loss scaling |
| NVIDIA, compute capability ≥ 8.0 | `mixed_bfloat16` | native on tensor cores; no loss scaling |
| NVIDIA, 7.0 – 7.5 | `mixed_float16` | tensor cores have float16 only; Keras adds loss scaling |
| older GPU, or unknown | `float32` | no tensor cores: half precision would only cost casts |
| CPU | `float32` | exact; with AVX512-BF16 bfloat16 is faster for some nets and slower for others |

On such a CPU, under fused kernels, `tune` took bfloat16 for convolutional nets and transformers (1.14 × for a
depthwise net) and float32 with XLA for dense and recurrent ones (`benchmarks/tune_regret.py`).

Reference: Micikevicius et al., 2018, "Mixed Precision Training", https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

import keras

from tfaccel.errors import refuse
from tfaccel.prepare.choice import Choice
from tfaccel.prepare.devices import Devices

NAMES = ("auto", "float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64")


def choose_precision(requested: str | keras.DTypePolicy, devices: Devices) -> Choice:
    """Turns the `precision` argument of `Accelerator` into a `keras.DTypePolicy` and its reason.

    Raises:
        ValueError: Unknown name, or float16 on a device that can't multiply it.
    """
    if isinstance(requested, keras.DTypePolicy):
        return Choice(requested, "your own dtype policy", by_user=True)
    if requested not in NAMES:
        raise refuse(
            "precision",
            requested,
            ", ".join(map(repr, NAMES)) + " or a keras.DTypePolicy",
            'Leave it out ("auto") to have it chosen.',
        )
    if requested == "auto":
        name, reason = automatic_precision(devices)
        return Choice(keras.DTypePolicy(name), reason)
    if "float16" in requested.replace("bfloat16", "") and not devices.float16:
        raise refuse(
            "precision",
            requested,
            "'float32', 'mixed_bfloat16' or 'auto' on this machine",
            f"{devices} has no float16 arithmetic: every product would be emulated.",
        )
    reason = "you asked for it"
    if (
        devices.kind == "cpu"
        and requested != "float32"
        and not ("bfloat16" in requested and devices.bfloat16)
    ):
        reason += "; expect it to be slower than float32 on this CPU"
    return Choice(keras.DTypePolicy(requested), reason, by_user=True)


def automatic_precision(devices: Devices) -> tuple[str, str]:
    """The policy's name and the reason, as in the table above."""
    if devices.kind == "tpu":
        return "mixed_bfloat16", "TPUs multiply bfloat16 natively; no loss scaling is needed"
    if devices.kind == "cpu":
        if devices.bfloat16:
            return (
                "float32",
                "exact; tfaccel.tune() says whether bfloat16 trains your model faster on this CPU",
            )
        return "float32", "this CPU doesn't multiply half precision itself"
    if devices.compute_capability is None:
        return "float32", "the GPU does not tell its compute capability"
    capability = "compute capability {}.{}".format(*devices.compute_capability)
    if devices.bfloat16:
        return "mixed_bfloat16", f"{capability}: bfloat16 tensor cores, no loss scaling needed"
    if devices.has_tensor_cores:
        return "mixed_float16", f"{capability}: float16 tensor cores; Keras scales the loss"
    return "float32", f"{capability}: no tensor cores"
