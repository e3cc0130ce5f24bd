"""Claim: what a strategy costs a step, in Keras as it is and with tfaccel, at the same global batch.

    python benchmarks/distribution_overhead.py --turns 3
    python benchmarks/distribution_overhead.py --turns 3 --fixes

Three models on random arrays of 2,560 samples, global batch 128. Every contender is a process of its own
(two for `workers`, on loopback), and they take turns; a figure is the median step of its last five epochs
over the same of plain Keras on one device in that turn. `keras_mirrored` is `MirroredStrategy` over two
logical CPUs with `ReductionToOneDevice`; `workers` is `MultiWorkerMirroredStrategy`, which Keras alone
can't fit. On two cores a second replica takes the core that the first one's kernels would have used; so
this is the overhead, not what two machines gain.

`--fixes` measures what each healed feature costs: its step over the step without it, under `MirroredStrategy`
as `mirrored`, and on one device as `tfaccel`; the first over the second is what the fix adds.
"""

import argparse
import itertools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

CONTENDERS = ("keras", "keras_mirrored", "tfaccel", "mirrored", "workers")
MODELS = ("small_mlp", "mlp", "cnn")
FIXES = (
    "clip",
    "accumulation",
    "loss_scaling",
    "dropout",
    "batch_norm",
    "batch_norm_local",
    "uneven",
    "python",
)
SAMPLES, BATCH, EPOCHS, TIMED = 2560, 128, 10, 5


def build(name, fix=None):
    """A small multilayer perceptron of 2,800 weights, one of 1.9 million, and a CNN that computes."""
    import keras

    layers = keras.layers
    stacks = {
        "small_mlp": ((64,), [layers.Dense(38, activation="relu")]),
        "mlp": ((784,), [layers.Dense(1024, activation="relu"), layers.Dense(1024, activation="relu")]),
        "cnn": (
            (28, 28, 1),
            [
                layers.Conv2D(32, 3, activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(64, 3, activation="relu"),
                layers.Flatten(),
            ],
        ),
    }
    shape, stack = stacks[name]
    if fix == "dropout":
        stack.append(layers.Dropout(0.2))
    elif fix in ("batch_norm", "batch_norm_local"):
        stack.append(layers.BatchNormalization())
    return shape, keras.Sequential([keras.Input(shape), *stack, layers.Dense(10)])


def make_optimizer(fix):
    """Adam, as the feature wants it."""
    import keras

    optimizer = keras.optimizers.Adam(
        global_clipnorm=1.0 if fix == "clip" else None,
        gradient_accumulation_steps=4 if fix == "accumulation" else None,
    )
    return keras.optimizers.LossScaleOptimizer(optimizer) if fix == "loss_scaling" else optimizer


def make_input(x, y, fix):
    """Arguments of `fit`: arrays, or a `PyDataset`."""
    import keras

    if fix != "python":
        return {"x": x, "y": y, "batch_size": BATCH - 1 if fix == "uneven" else BATCH}

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return SAMPLES // BATCH

        def __getitem__(self, index):
            rows = slice(index * BATCH, (index + 1) * BATCH)
            return x[rows], y[rows]

    return {"x": Batches()}


def run(contender, name, fix=None):
    """Trains; prints the milliseconds of a step."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import keras
    import numpy as np
    import tensorflow as tf

    import tfaccel

    if contender.endswith("mirrored"):
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        strategy = tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    elif contender == "workers":
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        strategy = tf.distribute.get_strategy()
    accelerator, options = None, {}
    if contender.startswith("keras"):
        scope = strategy.scope()
    else:
        batch_norm = "local" if fix == "batch_norm_local" else "auto"
        accelerator = tfaccel.Accelerator(strategy, batch_norm=batch_norm)
        scope, options = accelerator.scope(), accelerator.compile_options()
    with scope:
        shape, model = build(name, fix)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(make_optimizer(fix), loss, **options)
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, *shape)).astype("float32")
    y = random.integers(0, 10, SAMPLES)
    ends = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    model.fit(**make_input(x, y, fix), epochs=EPOCHS, verbose=0, callbacks=[clock])
    seconds = [after - before for before, after in itertools.pairwise(ends)][-TIMED:]
    print(json.dumps({"step_ms": 1e3 * statistics.median(seconds) * BATCH / SAMPLES}), flush=True)


def measure(contender, name, fix=None):
    """The milliseconds of a step, in new processes."""
    command = [sys.executable, str(pathlib.Path(__file__)), "--contender", contender, "--model", name]
    command += ["--fix", fix] if fix else []
    environments = [os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}]
    if contender == "workers":
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        environments = [
            environments[0]
            | {
                "TF_CONFIG": json.dumps(
                    {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": i}}
                )
            }
            for i in range(2)
        ]
    processes = [
        subprocess.Popen(command, env=each, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for each in environments
    ]
    answers = [process.communicate(timeout=600)[0] for process in processes]
    return max(json.loads(answer.strip().splitlines()[-1])["step_ms"] for answer in answers)


def measure_fixes(turns):
    """Prints one line a feature, for the perceptron of 1.9 million weights."""
    from _report import print_row, spread

    ratios = {fix: {"one_device": [], "mirrored": [], "fix": []} for fix in FIXES}
    for _ in range(turns):
        without = {each: measure(each, "mlp") for each in ("tfaccel", "mirrored")}
        for fix in FIXES:
            one, mirrored = (measure(each, "mlp", fix) / without[each] for each in ("tfaccel", "mirrored"))
            ratios[fix]["one_device"].append(one)
            ratios[fix]["mirrored"].append(mirrored)
            ratios[fix]["fix"].append(mirrored / one)
    for fix, kinds in ratios.items():
        figures = {kind: spread(values, 2) for kind, values in kinds.items()}
        print_row(benchmark="distribution_overhead", fix=fix, step_over_without=figures)


def main():
    """Prints one line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--fixes", action="store_true", help="what each healed feature costs")
    parser.add_argument("--fix", choices=FIXES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        run(options.contender, options.model, options.fix)
        return
    if options.fixes:
        measure_fixes(options.turns)
        return
    from _report import print_row, spread

    for name in options.models:
        turns = [{each: measure(each, name) for each in CONTENDERS} for _ in range(options.turns)]
        ratios = {each: [turn[each] / turn["keras"] for turn in turns] for each in CONTENDERS[1:]}
        keras_ms = statistics.median(turn["keras"] for turn in turns)
        print_row(
            benchmark="distribution_overhead",
            model=name,
            keras_step_ms=round(keras_ms, 2),
            ratio={each: spread(values, 2) for each, values in ratios.items()},
        )


if __name__ == "__main__":
    main()
