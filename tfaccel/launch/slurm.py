"""Workers as the tasks of a Slurm job step, started by `srun`."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from tfaccel.launch.errors import WorkerError
from tfaccel.launch.signals import signals_end


def run_step(
    command: Sequence[str],
    workers: int,
    *,
    environment: Mapping[str, str],
    max_restarts: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs one command in as many tasks; `srun` numbers their output and ends all when one fails.

    Inside an allocation (`sbatch`, `salloc`) its nodes are used; elsewhere `srun` asks for one. Options of
    `srun` come from its own variables, such as `SLURM_GPUS_PER_TASK` or `SLURM_PARTITION`.

    Args:
        command: The program and its arguments; it must be there on all nodes.
        workers: How many tasks.
        environment: Of `srun`, which hands it on.
        max_restarts: How often the step is run again after it has failed.
        report: Is told what happens.

    Raises:
        ValueError: There is no `srun` here.
        WorkerError: The step failed, and there was no restart left.
    """
    if shutil.which("srun", path=environment.get("PATH")) is None:
        raise ValueError(
            "engine='slurm' needs srun, which is not on the PATH. Allowed: a machine of a Slurm cluster. "
            "Log in to one, or take another engine."
        )
    step = ["srun", f"--ntasks={workers}", "--kill-on-bad-exit=1", "--label", *command]
    for attempt in range(max_restarts + 1):
        process = subprocess.Popen(
            step, env={**environment, "TFACCEL_RESTART": str(attempt), "PYTHONUNBUFFERED": "1"}
        )
        try:
            with signals_end():
                code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)  # srun ends its tasks
            process.wait()
            raise
        if code == 0:
            return
        error = WorkerError(
            f"srun ended with code {code}; the lines of its tasks say why", code if code > 0 else 128 - code
        )
        if attempt == max_restarts:
            raise error
        report(f"{error}; starting all {workers} again ({attempt + 1} of {max_restarts})")
