"""`MultiWorkerMirroredStrategy` swallows SIGTERM: the process trains on, and schedulers have to kill it.

TensorFlow's preemption notifier installs a C handler for SIGTERM when the strategy is made; unless
`tf.distribute.experimental.PreemptionCheckpointHandler` listens, nothing comes of the signal. Slurm's
`scancel` then takes the 30 s of `KillWait`, Kubernetes the 30 s of its grace period, and a handler that the
user installed before is lost. No upstream issue was found.

Smallest reproduction (TensorFlow 2.21, with a `TF_CONFIG` of two workers, in each):

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3); print("still here")

The fix: what the process did with SIGTERM before, it does afterwards.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Gives SIGTERM back to whoever had it before the block; in the main thread only, as Python allows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # None: a C handler, which Python can't put back
            signal.signal(signal.SIGTERM, before)
