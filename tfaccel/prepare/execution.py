"""How a step runs: with XLA or not, how many steps per call, and with whose kernels."""

from __future__ import annotations

import tensorflow as tf

from tfaccel.keras_fixes.compile_checks import is_distributed
from tfaccel.prepare.choice import Choice, refuse
from tfaccel.prepare.devices import Devices

KERNELS = ("auto", "plain", "fused")
STEPS_PER_EXECUTION = 16


def choose_jit(requested: str | bool, devices: Devices, strategy: tf.distribute.Strategy) -> Choice:
    """Turns the `jit` argument of `Accelerator` into a value for `model.compile(jit_compile=)`.

    Raises:
        ValueError: Not "auto", True or False; or True with several replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if requested is True and replicas > 1:
        raise refuse(
            "jit",
            requested,
            f'"auto" or False with {replicas} replicas',
            "XLA can't compile an optimizer update that spans devices (keras-team/keras#18145).",
        )
    if requested is True or requested is False:
        return Choice(requested, "you asked for it", by_user=True)
    if requested != "auto":
        raise refuse("jit", requested, '"auto", True or False', "Leave it out to have it chosen.")
    if replicas > 1:
        return Choice(False, f"XLA can't compile an update that spans {replicas} replicas")
    if devices.kind == "cpu":
        return Choice(False, "XLA's convolutions are slow on CPUs; fused kernels try it where it may pay")
    return Choice("auto", "Keras uses XLA where every layer of the model supports it")


def choose_steps_per_execution(
    requested: str | int, kernels: str, strategy: tf.distribute.Strategy
) -> Choice:
    """Turns the `steps_per_execution` argument of `Accelerator` into a number of steps.

    Raises:
        ValueError: Not "auto" or an integer of at least 1; or above 1 with several replicas.
    """
    replicas = strategy.num_replicas_in_sync
    if requested == "auto":
        return _automatic_steps(kernels, strategy)
    if isinstance(requested, bool) or not isinstance(requested, int) or requested < 1:
        raise refuse("steps_per_execution", requested, '"auto" or an integer ≥ 1', "Use 1 for plain Keras.")
    if requested > 1 and replicas > 1:
        raise refuse(
            "steps_per_execution",
            requested,
            f'"auto" or 1 with {replicas} replicas',
            "Keras 3 fails there with TensorFlow's default all-reduce (keras-team/keras#19246).",
        )
    return Choice(requested, "you asked for it", by_user=True)


def _automatic_steps(kernels: str, strategy: tf.distribute.Strategy) -> Choice:
    if kernels == "plain":
        return Choice(1, 'kernels="plain" leaves the step as Keras has it')
    if is_distributed(strategy):
        return Choice(1, "Keras 3 can't run several steps per call under tf.distribute")
    reason = (
        "one call into TensorFlow runs 16 steps, and more where no callback watches single batches: "
        "Python's share of a small step goes"
    )
    return Choice(STEPS_PER_EXECUTION, reason)


def choose_kernels(requested: str, devices: Devices, strategy: tf.distribute.Strategy) -> Choice:
    """Turns the `kernels` argument of `Accelerator` into "plain" or "fused".

    Raises:
        ValueError: Not "auto", "plain" or "fused"; or "fused" under a strategy of several replicas.
    """
    if requested not in KERNELS:
        raise refuse("kernels", requested, ", ".join(map(repr, KERNELS)), "Leave it out to have them chosen.")
    if requested == "plain":
        return Choice("plain", "you asked for it", by_user=True)
    if is_distributed(strategy):
        if requested == "fused":
            raise refuse(
                "kernels",
                requested,
                f'"auto" or "plain" under {type(strategy).__name__}',
                "The fused step runs on one device in this version.",
            )
        return Choice("plain", "the fused step runs on one device in this version")
    if requested == "fused":
        return Choice("fused", "you asked for it; each kernel is used once it agreed with Keras's own", True)
    if devices.kind != "cpu":
        return Choice("plain", 'the fused step was measured on CPUs only; kernels="fused" uses it here')
    reason = "fewer operations a step; each kernel is used once it agreed with Keras's own"
    return Choice("fused", reason)
