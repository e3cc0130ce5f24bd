"""Claim: training under tfaccel needs no more memory than plain Keras, which copies the data as well.

    python benchmarks/peak_memory.py

Each contender trains the same network in a process of its own, on random data of `--megabytes`; a row has how
far the process's resident set grew from before `compile` to its highest point, in MB. `tfaccel_jit_off` never
tries XLA; what `tfaccel` has on top of it is XLA's compiler, which is kept for the life of the process.
"""

import argparse
import json
import os
import subprocess
import sys

from _step_models import SHAPES, build_keras

CONTENDERS = ["plain", "tfaccel_jit_off", "tfaccel"]


def work(contender: str, name: str, megabytes: int) -> None:
    """The child process: prints by how many bytes its peak grew."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tfaccel
    from tfaccel.fit.throughput import peak_memory_bytes

    shape = SHAPES[name][0]
    samples = megabytes * 2**20 // (4 * int(np.prod(shape))) // 256 * 256
    random = np.random.default_rng(0)
    x, y = np.empty((samples, *shape), "float32"), random.integers(0, 10, samples).astype("int32")
    for rows in np.array_split(np.arange(samples), 64):
        random.random(out=x[rows[0] : rows[-1] + 1], dtype="float32")
    tf.reduce_sum(tf.matmul(tf.ones([64, 64]), tf.ones([64, 64])))  # the runtime's threads and pools
    before = peak_memory_bytes()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if contender == "plain":
        model = build_keras(name)
        model.compile("adam", loss, jit_compile=False)
        model.fit(x, y, batch_size=256, epochs=4, verbose=0)
    else:
        accelerator = tfaccel.Accelerator(jit="auto" if contender == "tfaccel" else False)
        with accelerator.scope():
            model = build_keras(name)
            model.compile("adam", loss, **accelerator.compile_options())
        model.fit(x, y, batch_size=256, epochs=4, verbose=0)
    print(json.dumps((peak_memory_bytes() - before) / 2**20))


def measure(contender: str, name: str, megabytes: int) -> float:
    """Growth of a fresh process in MB."""
    command = [sys.executable, __file__, "--worker", contender, name, str(megabytes)]
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True)
    return round(json.loads(done.stdout.splitlines()[-1]), 1)


def main() -> None:
    """Prints one line a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn_bn", "lstm"], choices=list(SHAPES))
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        contender, name, megabytes = options.worker
        work(contender, name, int(megabytes))
        return
    from _report import print_row

    for name in options.models:
        grown = {c: measure(c, name, options.megabytes) for c in CONTENDERS}
        print_row(benchmark="peak_memory", model=name, data_mb=options.megabytes, grown_mb=grown)


if __name__ == "__main__":
    main()
