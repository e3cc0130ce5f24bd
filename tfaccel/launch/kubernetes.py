"""Workers as the pods of a Kubernetes Indexed Job: a manifest for `kubectl apply -f -`.

A pod's index is `JOB_COMPLETION_INDEX`; pod 0, the chief, has a name in the job's headless service. From
these `tfaccel.Accelerator` knows its workers. Checked against the fields of the batch/v1 schema in the tests;
no cluster could be had: untested on Kubernetes.

Reference:
    Kubernetes, "Indexed Job for Parallel Processing with Static Work Assignment" and "Job with Pod-to-Pod
    Communication" (v1.28, 2023).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tfaccel.cluster import LONGEST_START_S, START_TIMEOUT
from tfaccel.errors import refuse

PORT = 8470  # where the chief awaits the others
START_TIMEOUT_S = 600  # images are pulled, nodes are added

_MANIFEST = """\
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None  # names for the pods
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {workers}
  parallelism: {workers}
  # When one worker fails all do: TensorFlow can't take one back.
  backoffLimit: {failures}
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      containers:
        - name: worker
          image: {image}
          command: {command}
          env:
            - name: TFACCEL_WORKERS
              value: "{workers}"
            - name: TFACCEL_CHIEF
              value: "{name}-0.{name}:{port}"
            - name: {timeout_name}
              value: "{timeout}"
            - name: PYTHONUNBUFFERED
              value: "1"
{resources}"""

_GPUS = """\
          resources:
            limits:
              nvidia.com/gpu: {gpus}
"""


def manifest(
    command: Sequence[str],
    workers: int,
    *,
    image: str,
    name: str = "tfaccel",
    gpus: int = 0,
    max_restarts: int = 0,
    start_timeout_s: float = START_TIMEOUT_S,
) -> str:
    """The YAML of a service and a job.

    Args:
        command: What a pod runs; it must be in the image.
        workers: How many pods.
        image: Of the container, with tfaccel in it.
        name: Of service and job.
        gpus: NVIDIA GPUs of each pod.
        max_restarts: How often all workers may fail and start again.
        start_timeout_s: How long workers wait for one another, in seconds.

    Raises:
        ValueError: A name that Kubernetes does not take, no image, or a number out of range.
    """
    for argument, value, least in (
        ("workers", workers, 1),
        ("gpus", gpus, 0),
        ("max_restarts", max_restarts, 0),
    ):
        if value < least:
            raise refuse(argument, value, f"a whole number, {least} or more", "Correct it.")
    if not 0 < start_timeout_s <= LONGEST_START_S:
        raise refuse("start_timeout_s", start_timeout_s, "seconds above 0, at most a day", "Correct it.")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", name):
        raise refuse(
            "name", name, "small letters, digits and '-', at most 52 of them", "Choose another --name."
        )
    if not image:
        raise refuse("image", image, "a container image with tfaccel and the script", "Give --image.")
    return _MANIFEST.format(
        name=name,
        workers=workers,
        failures=max_restarts * workers,
        image=json.dumps(image),  # a JSON string is a YAML string
        command=json.dumps(list(command)),
        port=PORT,
        timeout_name=START_TIMEOUT,
        timeout=f"{start_timeout_s:g}",
        resources=_GPUS.format(gpus=gpus) if gpus else "",
    )
