"""Which workers train together: read from what the launcher of this process left in its environment.

| found | from |
|---|---|
| `TF_CONFIG` | TensorFlow's own variable; Ray, Spark and `tfaccel launch` set it too |
| `SLURM_STEP_NUM_TASKS`, `SLURM_PROCID`, `SLURM_STEP_NODELIST` | `srun` |
| `TFACCEL_WORKERS`, `TFACCEL_CHIEF`, `JOB_COMPLETION_INDEX` | the Kubernetes job of `tfaccel launch` |

Reference:
    TensorFlow's guide "Multi-worker training with Keras" (2024) for `TF_CONFIG`; srun(1), "OUTPUT
    ENVIRONMENT VARIABLES"; Kubernetes, "Indexed Job for Parallel Processing with Static Work Assignment".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from tfaccel.errors import refuse

START_TIMEOUT = "TFACCEL_START_TIMEOUT_S"  # how long workers wait for one another
START_TIMEOUT_S = 30.0
LONGEST_START_S = 86400.0
FORM = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a job, of which this process is one.

    Args:
        size: How many.
        index: This one's number, from 0, which is the chief.
        chief: "host:port" at which the chief can be met.
        source: Where this was read, for a person.
        addresses: "host:port" of all, chief first; empty where the workers find them when they meet.
    """

    size: int
    index: int
    chief: str
    source: str
    addresses: tuple[str, ...] = ()


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The job that this process belongs to; None where it has no other worker.

    Args:
        environment: Such as `os.environ`.

    Raises:
        ValueError: The variables contradict themselves, or are not in their form.
    """
    if environment.get("TF_CONFIG", "").strip():
        cluster = _from_tf_config(environment["TF_CONFIG"])
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        cluster = _from_slurm(environment)
    elif "TFACCEL_WORKERS" in environment and "JOB_COMPLETION_INDEX" in environment:
        cluster = _from_kubernetes(environment)
    else:
        return None
    return cluster if cluster is not None and cluster.size > 1 else None


def tf_config(addresses: tuple[str, ...] | list[str], index: int) -> str:
    """The `TF_CONFIG` of one of these workers."""
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}})


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = json.loads(text)
        jobs = config.get("cluster", {})
        addresses = (*jobs.get("chief", ()), *jobs.get("worker", ()))
        others = sorted(set(jobs) - {"chief", "worker"})
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise refuse("TF_CONFIG", text, FORM, f"Correct or unset the variable ({error}).") from error
    if others:
        why = "parameter servers can't drive model.fit in Keras 3, and nothing starts evaluators"
        remedy = f"Leave {', '.join(others)} out: {why}."
        raise refuse("TF_CONFIG", text, "jobs named chief and worker", remedy)
    if len(addresses) < 2:
        return None
    wrong = [each for each in addresses if not _is_address(str(each))]
    if wrong or len(set(addresses)) != len(addresses):
        what = f"{wrong[0]!r} is no host:port" if wrong else "two workers have one address"
        raise refuse("TF_CONFIG", text, FORM, f"Correct the addresses: {what}.")
    index = _task(config.get("task"), jobs, text)
    return Cluster(len(addresses), index, addresses[0], "TF_CONFIG", addresses)


def _task(task: Any, jobs: dict[str, list[str]], text: str) -> int:
    """This process's number among all, chief first."""
    task = task if isinstance(task, dict) else {}
    kind, index = str(task.get("type")), task.get("index")
    count = len(jobs.get(kind, ()))
    if type(index) is not int or not 0 <= index < count:
        allowed = "a task of its cluster: " + ", ".join(
            f"{name} 0 to {len(addresses) - 1}" for name, addresses in jobs.items()
        )
        raise refuse("TF_CONFIG", text, allowed, 'Set "task" to this process\'s type and index.')
    return index + (len(jobs.get("chief", ())) if kind == "worker" else 0)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(re.fullmatch(r"\S+", host)) and port.isdecimal() and 0 < int(port) < 65536


def _from_slurm(environment: Mapping[str, str]) -> Cluster:
    """The first task runs on the first node of the list, whatever the distribution of the others.

    TensorFlow's own resolver sorts the hosts by name, so from ten nodes on (`n10` comes before `n2`) it takes
    workers for others, and without GPUs it fails.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    found = re.match(r"([^\s,\[\]]+)(?:\[(\d+)[^\]]*\]([^\s,\[\]]*))?", nodes)
    try:
        size, index = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    except ValueError as error:
        raise refuse("Slurm's environment", str(error), "whole numbers", "Start with srun.") from error
    if found is None or not 0 <= index < size:
        shown = f"nodes {nodes!r}, task {index} of {size}"
        raise refuse("Slurm's environment", shown, "what srun sets", "Start with srun.")
    host = "".join(part or "" for part in found.groups())
    port = 20000 + (31 * job + step) % 10000  # jobs that share a node want ports of their own
    return Cluster(size, index, f"{host}:{port}", f"Slurm, job {job}")


def _from_kubernetes(environment: Mapping[str, str]) -> Cluster:
    values = {name: environment.get(name, "") for name in ("TFACCEL_WORKERS", "JOB_COMPLETION_INDEX")}
    chief = environment.get("TFACCEL_CHIEF", "")
    whole = all(value.isdigit() for value in values.values())
    size, index = (int(value) if whole else 0 for value in values.values())
    if not index < size or not _is_address(chief):
        raise refuse(
            "the environment of this Kubernetes job",
            {**values, "TFACCEL_CHIEF": chief},
            "a completion index below the number of workers, and the chief's host:port",
            "Take the manifest that `tfaccel launch --engine kubernetes --dry-run` prints.",
        )
    return Cluster(size, index, chief, "a Kubernetes job")
