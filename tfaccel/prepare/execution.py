"""How a step runs: with XLA or not, how many steps per call, and with whose kernels."""

from __future__ import annotations

import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.keras_fixes.compile_checks import is_distributed
from tfaccel.keras_fixes.replica_step import is_replicated
from tfaccel.prepare.choice import Choice
from tfaccel.prepare.devices import Devices

KERNELS = ("auto", "plain", "fused")
STEPS_PER_EXECUTION = 16
BATCH_NORM = ("auto", "synchronized", "local")


def choose_jit(requested: str | bool, devices: Devices, strategy: tf.distribute.Strategy) -> Choice:
    """Turns the `jit` argument of `Accelerator` into a value for `model.compile(jit_compile=)`.

    Raises:
        ValueError: Not "auto", True or False; or True with replicas that can't be compiled one by one.
    """
    replicas = strategy.num_replicas_in_sync
    if requested is True and replicas > 1 and not is_replicated(strategy):
        raise refuse(
            "jit",
            requested,
            f'"auto" or False under {type(strategy).__name__}',
            "XLA can't compile an optimizer update that spans devices (keras-team/keras#18145).",
        )
    if requested is True or requested is False:
        return Choice(requested, "you asked for it", by_user=True)
    if requested != "auto":
        raise refuse("jit", requested, '"auto", True or False', "Leave it out to have it chosen.")
    if replicas > 1:
        return Choice(False, f"{replicas} replicas; jit=True compiles each one's part of the step")
    if devices.kind == "cpu":
        return Choice(False, "XLA's convolutions are slow on CPUs; fused kernels try it where it may pay")
    return Choice("auto", "Keras uses XLA where every layer of the model supports it")


def choose_steps_per_execution(
    requested: str | int, kernels: str, strategy: tf.distribute.Strategy
) -> Choice:
    """Turns the `steps_per_execution` argument of `Accelerator` into a number of steps.

    Raises:
        ValueError: Not "auto" or an integer of at least 1; or above 1 where Keras can't run several.
    """
    if requested == "auto":
        return _automatic_steps(kernels, strategy)
    if isinstance(requested, bool) or not isinstance(requested, int) or requested < 1:
        raise refuse("steps_per_execution", requested, '"auto" or an integer ≥ 1', "Use 1 for plain Keras.")
    if requested > 1 and strategy.num_replicas_in_sync > 1 and not is_replicated(strategy):
        raise refuse(
            "steps_per_execution",
            requested,
            f'"auto" or 1 under {type(strategy).__name__}',
            "Keras 3 fails there (keras-team/keras#19246).",
        )
    return Choice(requested, "you asked for it", by_user=True)


def _automatic_steps(kernels: str, strategy: tf.distribute.Strategy) -> Choice:
    if kernels == "plain":
        return Choice(1, 'kernels="plain" leaves the step as Keras has it')
    if is_distributed(strategy) and not is_replicated(strategy):
        return Choice(1, f"Keras 3 can't run several steps per call under {type(strategy).__name__}")
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return Choice(
            STEPS_PER_EXECUTION,
            "one call into TensorFlow runs 16 steps, on all workers alike: Python's share goes",
        )
    reason = (
        "one call into TensorFlow runs 16 steps, and more where no callback watches single batches: "
        "Python's share of a small step goes"
    )
    return Choice(STEPS_PER_EXECUTION, reason)


def choose_kernels(requested: str, devices: Devices, strategy: tf.distribute.Strategy) -> Choice:
    """Turns the `kernels` argument of `Accelerator` into "plain" or "fused".

    Raises:
        ValueError: Not "auto", "plain" or "fused"; or "fused" under a strategy that it does not know.
    """
    if requested not in KERNELS:
        raise refuse("kernels", requested, ", ".join(map(repr, KERNELS)), "Leave it out to have them chosen.")
    if requested == "plain":
        return Choice("plain", "you asked for it", by_user=True)
    if is_distributed(strategy) and not is_replicated(strategy):
        if requested == "fused":
            raise refuse(
                "kernels",
                requested,
                f'"auto" or "plain" under {type(strategy).__name__}',
                "The fused step runs on one device, or under a (multi-worker) MirroredStrategy.",
            )
        return Choice("plain", f"there is no fused step for {type(strategy).__name__}")
    if requested == "fused":
        return Choice("fused", "you asked for it; each kernel is used once it agreed with Keras's own", True)
    if devices.kind == "gpu":
        reason = 'as Keras has it; on an H100 a step with kernels="fused" took 1/19 to 2/3 of its time'
        return Choice("plain", reason)
    if devices.kind == "tpu":
        return Choice("plain", 'the fused step was not measured on TPUs; kernels="fused" uses it here')
    reason = "fewer operations a step; each kernel is used once it agreed with Keras's own"
    return Choice("fused", reason)


def choose_batch_norm(requested: str, strategy: tf.distribute.Strategy) -> Choice:
    """Turns the `batch_norm` argument of `Accelerator` into "synchronized" or "local".

    Raises:
        ValueError: Not "auto", "synchronized" or "local".
    """
    if requested not in BATCH_NORM:
        raise refuse(
            "batch_norm", requested, ", ".join(map(repr, BATCH_NORM)), "Leave it out to have it chosen."
        )
    if requested != "auto":
        return Choice(requested, "you asked for it", by_user=True)
    if strategy.num_replicas_in_sync == 1 or not is_replicated(strategy):
        return Choice("local", "there are no other replicas to take statistics from")
    return Choice("synchronized", "as one device: two small sums over the replicas in each layer and step")


def explain_replicas(strategy: tf.distribute.Strategy, devices: Devices) -> dict[str, Choice]:
    """What follows from several replicas: how gradients are summed, and whose batch `batch_size` is.

    Returns:
        Choices by name; none on one replica.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return {}
    share = Choice(
        f"global, 1/{replicas} each",
        "batch_size counts the samples of all replicas, as on one device; for the same work on each, "
        f"multiply it by {replicas} and tune the learning rate anew",
    )
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        nccl = Choice("NCCL", "GPUs of several workers")
        ring = Choice("ring", "bytes on each worker's link don't grow with the number of workers")
        return {"all_reduce": nccl if devices.kind == "gpu" else ring, "batch_size": share}
    if isinstance(strategy, tf.distribute.MirroredStrategy) and devices.kind == "cpu":
        reason = "one memory; and TensorFlow's collectives on CPUs allow one strategy a process"
        return {"all_reduce": Choice("to one device", reason), "batch_size": share}
    return {"all_reduce": Choice("TensorFlow's", "it knows how the devices are linked"), "batch_size": share}
