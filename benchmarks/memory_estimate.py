"""Claim: `estimate_memory` says beforehand what a process is then seen to use.

    python benchmarks/memory_estimate.py                  # a minute and a half on 2 cores

Each network trains with plain Keras in a process of its own, after a step on one sample has loaded all
kernels. A row has how far the process's resident set rose above that, and the batch, while it trained with a
large batch, in MB; and what had been estimated for activations and gradients. `ratio` is estimated over
measured. An input pipeline that makes its batches holds two or three more of them, which is in neither.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys

from _step_models import SHAPES, build_keras

# So large that a hundred megabytes of other things do not matter; of the MLP only the batch would be.
BATCH_SIZES = {
    "tabular": 65_536,
    "cnn_bn": 1024,
    "resnet20": 512,
    "depthwise": 1024,
    "transformer": 512,
    "lstm": 16_384,
    "gru": 16_384,
}


def resident_bytes(field: str) -> int:
    """`VmRSS` now, or `VmHWM` at most, of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def work(name: str, batch_size: int) -> None:
    """The child process: prints what was estimated and what was measured."""
    import keras
    import tensorflow as tf

    import tfaccel

    model = build_keras(name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False)

    def batches(rows):
        x = tf.random.stateless_uniform([rows, *SHAPES[name][0]], [rows, 0])
        return tf.data.Dataset.from_tensors((x, tf.zeros([rows], tf.int32))).repeat(3)

    model.fit(batches(1), verbose=0)
    data = batches(batch_size)
    estimate = tfaccel.estimate_memory(model, batch_size, data)
    given = 4 * batch_size * (1 + math.prod(SHAPES[name][0]))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    before = resident_bytes("VmRSS")
    model.fit(data, verbose=0)
    grown = resident_bytes("VmHWM") - before
    print(json.dumps([estimate.activations + estimate.gradients - given, grown]))


def main() -> None:
    """Prints one line a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(BATCH_SIZES), choices=list(BATCH_SIZES))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], int(options.worker[1]))
        return
    from _report import print_row

    for name in options.models:
        size = BATCH_SIZES[name]
        command = [sys.executable, __file__, "--worker", name, str(size)]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True)
        estimated, measured = json.loads(done.stdout.splitlines()[-1])
        figures = {"estimated_mb": round(estimated / 1e6), "measured_mb": round(measured / 1e6)}
        print_row(
            benchmark="memory_estimate",
            model=name,
            batch_size=size,
            **figures,
            ratio=round(estimated / measured, 2),
        )


if __name__ == "__main__":
    main()
