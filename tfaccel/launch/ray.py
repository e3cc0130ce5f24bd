"""Workers as the actors of Ray Train's `TensorflowTrainer`, which sets `TF_CONFIG`.

Reference:
    Ray, "Get Started with Distributed Training using TensorFlow/Keras" (2025).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tfaccel.launch.call import call, prefixed, words
from tfaccel.launch.errors import WorkerError


def run_on_ray(packed: bytes, workers: int, *, environment: Mapping[str, str], max_restarts: int) -> bytes:
    """Runs a call on the Ray cluster that is connected, or that `ray.init` finds or starts.

    Inside of the call `ray.train.report` and Ray's Keras callbacks work. Ray restarts all workers by its own
    `FailureConfig`.

    Args:
        packed: From `call.pack`.
        workers: How many; each takes a core, and a GPU where the cluster has enough.
        environment: Is added to every worker's.
        max_restarts: How often all workers are started again after one has failed.

    Returns:
        The chief's result, packed.

    Raises:
        ValueError: Ray is not installed.
        WorkerError: A worker failed, and there was no restart left.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.tensorflow import TensorflowTrainer
    except ImportError as error:
        raise ValueError(
            f"engine='ray' needs Ray Train ({error}). Allowed: an environment with it. Run pip install "
            "'tfaccel[ray]'."
        ) from error
    own = not ray.is_initialized()
    if own:
        local: Any = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(**local)
    try:
        mailbox: Any = ray.remote(num_cpus=0)(_Mailbox).remote()  # type: ignore[attr-defined]
        config = {"packed": packed, "environment": dict(environment), "mailbox": mailbox}
        use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
        trainer = TensorflowTrainer(
            _loop,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(failure_config=FailureConfig(max_failures=max_restarts)),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            said: Any = ray.get(mailbox.take.remote())
            raise WorkerError(said[1] or str(error).strip()) from error
        result: Any = ray.get(mailbox.take.remote())
        return result[0]
    finally:
        if own:
            ray.shutdown()


class _Mailbox:
    """Where the chief leaves its result: Ray Train itself hands back metrics and checkpoints only."""

    def __init__(self) -> None:
        self._result: bytes | None = None
        self._failure = ""

    def put(self, result: bytes) -> None:
        self._result = result

    def fail(self, text: str) -> None:
        self._failure = self._failure or text

    def take(self) -> tuple[bytes | None, str]:
        return self._result, self._failure


def _loop(config: dict) -> None:
    """On every worker: Ray calls it in a thread of the actor."""
    import ray

    os.environ.update(config["environment"])
    index = ray.train.get_context().get_world_rank()
    try:
        with prefixed(index):
            result = call(config["packed"], wanted=index == 0)
    except BaseException as error:
        ray.get(config["mailbox"].fail.remote(words(index, error)))
        raise
    if index == 0:
        ray.get(config["mailbox"].put.remote(result))
