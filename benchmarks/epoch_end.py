"""Claim: in the scope an epoch of `tf.data` ends when its last batch is done.

    python benchmarks/epoch_end.py

A small convolutional net reads CIFAR-10's images through a `tf.data` pipeline that shifts and flips them, in
processes that are held on one core and on two: plain Keras, and a model that was compiled in the scope
with Keras's own precision. Epochs are as long as TensorFlow's tuning thread lets them be
(`tfaccel/keras_fixes/iterator_stall.py`): `waits` is the share of plain Keras's time in which nothing ran,
told by the time of the same epochs with `autotune.enabled = False`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

WAYS = ("keras", "keras untuned", "scope")


def one(way, epochs, images):
    """Prints the seconds of each epoch behind the first, in which the step is traced."""
    import _image_models
    import datasets
    import keras
    import tensorflow as tf

    import tfaccel

    data = datasets.load("cifar10")
    data = {"x_train": data["x_train"][:images].astype("float32") / 255, "y_train": data["y_train"][:images]}
    batches = _image_models._batches(data, 0)
    if way == "keras untuned":
        options = tf.data.Options()
        options.autotune.enabled = False
        batches = batches.with_options(options)
    layers = keras.layers
    stack = [layers.Conv2D(units, 3, 2, activation="relu") for units in (16, 32)]

    def build(**options):
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), *stack, layers.GlobalAveragePooling2D(), layers.Dense(10)]
        )
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, **{"jit_compile": False, **options})
        return model

    if way == "scope":
        accelerator = tfaccel.Accelerator(precision="float32")
        with accelerator.scope():
            model = build(**accelerator.compile_options())
    else:
        model = build()
    begun, seconds = [], []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: begun.append(time.perf_counter()),
        on_epoch_end=lambda epoch, logs: seconds.append(time.perf_counter() - begun[-1]),
    )
    model.fit(batches, epochs=epochs, verbose=0, callbacks=[clock])
    # An iterator goes when the next epoch's begins, which Keras counts to that one.
    print("SECONDS " + json.dumps(seconds[1:]))


def measure(way, cores, options):
    """The seconds of each epoch, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--epochs", str(options.epochs)]
    done = subprocess.run(
        [*command, "--images", str(options.images)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("SECONDS "))
    return json.loads(line.removeprefix("SECONDS "))


def main():
    """Prints one line of JSON for each number of cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.way:
        one(options.way, options.epochs, options.images)
        return
    from _report import print_row, spread

    every = sorted(os.sched_getaffinity(0))
    for cores in sorted({1, min(2, len(every))}):
        seconds = {way: [] for way in WAYS}
        for _ in range(options.turns):
            for way in WAYS:
                seconds[way] += measure(way, set(every[:cores]), options)
        total = {way: sum(each) for way, each in seconds.items()}
        print_row(
            benchmark="epoch_end",
            cores_used=cores,
            epoch_s={way: spread(each) for way, each in seconds.items()},
            keras_to_scope=round(total["keras"] / total["scope"], 2),
            waits=round(1 - total["keras untuned"] / total["keras"], 2),
            longest_to_shortest=round(max(seconds["keras"]) / min(seconds["keras"]), 2),
            median_ratio=round(statistics.median(seconds["keras"]) / statistics.median(seconds["scope"]), 2),
        )


if __name__ == "__main__":
    main()
