"""Which `tf.distribute` strategy: one per machine shape, chosen without waiting for absent hardware.

| found | strategy |
|---|---|
| several workers: `TF_CONFIG`, a Slurm step, a Kubernetes job of ours | `MultiWorkerMirroredStrategy` |
| a TPU that answers | `TPUStrategy` (untested on hardware) |
| two or more GPUs | `MirroredStrategy` |
| one GPU, or CPU only | none: TensorFlow's default strategy, which costs nothing |

CPU cores are never mirrored on their own account: TensorFlow's kernels use all cores already, and a
second replica made a step of a small MLP 2.5 times slower on two cores.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import tensorflow as tf

from tfaccel.cluster import Cluster, find_cluster
from tfaccel.errors import refuse
from tfaccel.keras_fixes.late_strategy import check_nothing_ran
from tfaccel.keras_fixes.swallowed_sigterm import sigterm_kept
from tfaccel.keras_fixes.worker_seeds import random_state, take_random_state
from tfaccel.prepare.choice import Choice
from tfaccel.prepare.devices import Devices
from tfaccel.prepare.rendezvous import facts_of_this_process, meet, start_timeout_s

NAMES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")
TPU_TIMEOUT_S = 60


def choose_strategy(
    requested: str | tf.distribute.Strategy,
    devices: Devices,
    *,
    environment: Mapping[str, str] | None = None,
    connect_tpu: Callable[[], tf.distribute.Strategy] | None = None,
) -> Choice:
    """Turns the `strategy` argument of `Accelerator` into a strategy and the reason for it.

    Args:
        requested: One of `NAMES`, or a strategy object, which is used as it is.
        devices: What the machine has.
        environment: Where the workers are looked up; default `os.environ`.
        connect_tpu: Makes the TPU strategy; default `connect_tpu_strategy`. Tests inject another.

    Raises:
        ValueError: Unknown name, malformed `TF_CONFIG`, a named strategy that this machine can't have, or
            workers that differ.
        RuntimeError: A worker did not start in time.
    """
    environment = os.environ if environment is None else environment
    connect_tpu = connect_tpu or connect_tpu_strategy
    if isinstance(requested, tf.distribute.Strategy):
        return _given(requested)
    if requested not in NAMES:
        raise refuse(
            "strategy",
            requested,
            ", ".join(map(repr, NAMES)) + " or a tf.distribute.Strategy object",
            'Leave it out ("auto") to have it chosen.',
        )
    if tf.distribute.has_strategy():
        if requested == "auto":
            return Choice(tf.distribute.get_strategy(), "the scope that you are in", by_user=True)
        raise refuse("strategy", requested, "'auto' inside of a strategy's scope", "Make it outside.")
    if requested == "auto":
        return _automatic(devices, environment, connect_tpu)
    if requested == "one_device":
        return Choice(default_strategy(), "you asked for one device", by_user=True)
    if requested == "mirrored":
        mirrored = _mirrored(devices)
        return Choice(mirrored, f"you asked for it; {mirrored.num_replicas_in_sync} devices", by_user=True)
    if requested == "multi_worker":
        return _multi_worker(environment, devices)
    return _named_tpu(devices, connect_tpu)


def default_strategy() -> tf.distribute.Strategy:
    """TensorFlow's own no-op strategy: entering its scope changes nothing."""
    return tf.distribute.get_strategy()


def _given(strategy: tf.distribute.Strategy) -> Choice:
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "strategy=ParameterServerStrategy can't drive model.fit: Keras 3 has no dataset that it "
            "accepts. Allowed: any synchronous strategy. Use "
            "tf.distribute.MultiWorkerMirroredStrategy, or a ClusterCoordinator loop of your own."
        )
    return Choice(strategy, "your own strategy object", by_user=True)


def _automatic(
    devices: Devices,
    environment: Mapping[str, str],
    connect_tpu: Callable[[], tf.distribute.Strategy],
) -> Choice:
    cluster = find_cluster(environment)
    if cluster is not None:
        return Choice(_of_workers(cluster, devices.kind), _describe(cluster))
    if devices.kind == "tpu" or devices.tpu_environment:
        try:
            signs = ", ".join(devices.tpu_environment) or "listed by TensorFlow"
            return Choice(connect_tpu(), f"a TPU answered ({signs})")
        except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
            reason = f"one device: a TPU is named but did not answer ({str(error).splitlines()[0]})"
            return Choice(default_strategy(), reason)
    if devices.kind == "gpu" and devices.count > 1:
        return Choice(_mirrored(devices), f"{devices.count} GPUs in this machine")
    what = "one GPU" if devices.kind == "gpu" else "CPU only, whose kernels use every core already"
    return Choice(default_strategy(), what)


def _mirrored(devices: Devices) -> tf.distribute.Strategy:
    logical = tf.config.list_logical_devices("GPU" if devices.kind == "gpu" else "CPU")
    names = [device.name for device in logical]
    if devices.kind == "gpu":
        return tf.distribute.MirroredStrategy(names)
    # The default all-reduce on CPU keeps global collective keys: a second strategy of another size
    # in the same process then fails for good. Reducing to one device has no such state.
    return tf.distribute.MirroredStrategy(names, cross_device_ops=tf.distribute.ReductionToOneDevice())


def _multi_worker(environment: Mapping[str, str], devices: Devices) -> Choice:
    cluster = find_cluster(environment)
    if cluster is not None:
        return Choice(
            _of_workers(cluster, devices.kind), f"you asked for it; {_describe(cluster)}", by_user=True
        )
    if not environment.get("TF_CONFIG", "").strip():
        raise ValueError(
            'strategy="multi_worker" needs workers, and nothing names any. Allowed: TF_CONFIG with a '
            '"cluster" of workers and this process\'s "task", or a step of Slurm. Start the script with '
            '`tfaccel launch`, or use strategy="auto".'
        )
    return Choice(
        _collective(devices.kind), "you asked for it; TF_CONFIG names this worker only", by_user=True
    )


def _describe(cluster: Cluster) -> str:
    chief = ", the chief" if cluster.index == 0 else ""
    return f"{cluster.source} names {cluster.size} workers; this is worker {cluster.index}{chief}"


@functools.cache
def _of_workers(cluster: Cluster, kind: str) -> tf.distribute.Strategy:
    """One strategy for each process: TensorFlow starts its servers once, and the ports are taken then."""
    check_nothing_ran()
    meeting = meet(cluster, facts_of_this_process(cluster), random_state(), start_timeout_s())
    take_random_state(meeting.shared)
    if cluster.source == "TF_CONFIG":
        return _collective(kind)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(meeting.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        rpc_layer="grpc",
    )
    return _collective(kind, resolver)


def _collective(kind: str, resolver: object = None) -> tf.distribute.Strategy:
    implementation = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=implementation.NCCL if kind == "gpu" else implementation.RING
    )
    with sigterm_kept():
        return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


def _named_tpu(devices: Devices, connect_tpu: Callable[[], tf.distribute.Strategy]) -> Choice:
    if devices.kind != "tpu" and not devices.tpu_environment:
        raise ValueError(
            'strategy="tpu" was asked for, but no sign of a TPU was found (TPU_NAME, /dev/accel* with '
            'libtpu). Allowed: "auto", "one_device", "mirrored", "multi_worker". Set TPU_NAME, or '
            "pass a TPUStrategy that you made yourself."
        )
    try:
        return Choice(connect_tpu(), "you asked for a TPU and it answered", by_user=True)
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            f'strategy="tpu" was asked for, but the TPU did not answer: {error}. Allowed: a TPU that is '
            'reachable. Check TPU_NAME, or take strategy="auto".'
        ) from error


_TPU_PROBE = """
import os, tensorflow as tf
resolver = tf.distribute.cluster_resolver.TPUClusterResolver(os.environ.get("TPU_NAME") or "local")
tf.config.experimental_connect_to_cluster(resolver)
tf.tpu.experimental.initialize_tpu_system(resolver)
"""


def connect_tpu_strategy(timeout_s: float = TPU_TIMEOUT_S) -> tf.distribute.Strategy:
    """Connects to the TPU of the environment, after a subprocess has shown that it answers.

    An address that does not answer blocks TensorFlow's resolver for over 590 s with no time limit of
    its own, so the first contact is made by a process that can be killed. Untested on hardware.

    Raises:
        RuntimeError: Nothing answered within `timeout_s` seconds, or TensorFlow refused.
    """
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _TPU_PROBE], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer within {timeout_s:.0f} s") from error
    if probe.returncode != 0:
        last_line = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(last_line[:200])
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(os.environ.get("TPU_NAME") or "local")
    tf.config.experimental_connect_to_cluster(resolver)
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)
