"""Workers as the tasks of a Spark barrier stage: the road for YARN and Hadoop clusters too.

Each task runs the call in a process of its own: Spark keeps its Python processes from job to job, and
TensorFlow can join a cluster once in the life of a process.

Reference:
    Spark, "Project Hydrogen: barrier execution mode" (SPARK-24374, 2018): tasks start and fail together.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

from tfaccel.cluster import tf_config
from tfaccel.launch.call import failure, worker_command
from tfaccel.launch.errors import WorkerError
from tfaccel.launch.local import copy_output, free_port


def run_on_spark(
    packed: bytes,
    workers: int,
    *,
    environment: Mapping[str, str],
    max_restarts: int,
    report: Callable[[str], None],
) -> bytes:
    """Runs a call in barrier tasks of the active Spark session, or of one that is made for it.

    Args:
        packed: From `call.pack`.
        workers: How many tasks; the cluster must have room for all at once.
        environment: Is added to every worker's.
        max_restarts: How often the stage is run again after it has failed.
        report: Is told what happens.

    Returns:
        The chief's result, packed.

    Raises:
        ValueError: pyspark is not installed.
        WorkerError: A task failed, and there was no restart left.
    """
    try:
        from py4j.protocol import Py4JJavaError
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise ValueError(
            f"engine='spark' needs pyspark ({error}). Allowed: an environment with it. Run pip install "
            "'tfaccel[spark]'."
        ) from error
    own = SparkSession.getActiveSession() is None
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    session = SparkSession.builder.appName("tfaccel").getOrCreate()
    try:
        for attempt in range(max_restarts + 1):
            tasks = session.sparkContext.parallelize(range(workers), workers).barrier()
            run_task = _task(packed, {**environment, "TFACCEL_RESTART": str(attempt)})
            try:
                results = tasks.mapPartitions(run_task).collect()
                return bytes(results[0])
            except Py4JJavaError as error:
                failed = WorkerError(_cause(str(error)))
                if attempt == max_restarts:
                    raise failed from error
                report(f"{failed}; starting all {workers} again ({attempt + 1} of {max_restarts})")
        raise AssertionError("every attempt returns or raises")
    finally:
        if own:
            session.stop()


def _task(packed: bytes, environment: Mapping[str, str]) -> Callable[[Iterable[int]], Iterator[bytes]]:
    def run_task(_: Iterable[int]) -> Iterator[bytes]:
        from pyspark import BarrierTaskContext

        context = BarrierTaskContext.get()
        index = context.partitionId()
        host = context.getTaskInfos()[index].address.rpartition(":")[0]
        addresses = context.allGather(f"{host}:{free_port()}")
        own = {**os.environ, **environment, "TF_CONFIG": tf_config(addresses, index)}
        with tempfile.TemporaryDirectory() as folder:
            command = worker_command(pathlib.Path(folder), packed)
            process = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            copy_output(process.stdout, sys.stderr, index)
            if process.wait() != 0:
                said = failure(pathlib.Path(folder), int(own["TFACCEL_RESTART"]))
                raise RuntimeError(said or f"worker {index} ended with code {process.returncode}")
            result = pathlib.Path(folder, "result")
            if result.exists():
                yield result.read_bytes()

    return run_task


def _cause(text: str) -> str:
    """The Python error in a report of the JVM, or the report's first line."""
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line.startswith("RuntimeError: ")]
    return (found[0].removeprefix("RuntimeError: ") if found else lines[0])[:2000]
