"""The same script, or the same function, on many workers: local processes, Ray, Spark, Slurm, Kubernetes."""

from tfaccel.launch.errors import WorkerError
from tfaccel.launch.jobs import ENGINES, run, run_script

__all__ = ["ENGINES", "WorkerError", "run", "run_script"]
