"""Claim: the accelerated run reaches plain Keras's best test accuracy in a fraction of the time, and in less
time than Keras that was tuned by hand.

    python benchmarks/time_to_accuracy.py                      # three data sets, 3 seeds, some two hours
    python benchmarks/time_to_accuracy.py --data fashion_mnist --seeds 0 1 2 --ways plain defaults

Five ways to train the same network from the same first weights, a seed's after one another in one process:

- `plain`: Adam(1e-3), batch size 32, arrays straight into `fit`.
- `by_hand`: Keras alone with AdamW and CosineDecay (a tenth of it warmup), the best of a grid of learning
  rate × batch size by its accuracy on a seed of its own; as many epochs and the same beta_2 as `defaults`.
- `defaults`: `Accelerator()`, `accelerator.dataset(...)`, Adam, `OneCycle` with the settings below.
- `tuned`: the same with `Accelerator(tuned=tune(...))`; `search_s` is what that took, and is not in the time.
- `found`: besides, the peak is what `find_learning_rate` suggests.

Time is training time: tracing and compiling count, evaluation does not. Two ways are compared by the time to
an accuracy that both reach: the lower one of their best at the end of any epoch.
"""

import argparse
import itertools
import time

import keras
import numpy as np
from _report import print_row, spread
from datasets import LENGTH, WORDS, load

import tfaccel
from tfaccel.demo.training import (
    TrainingClock,
    accuracy_of_both,
    build_from_seed,
    compile_arguments,
    train_accelerated,
    train_plain,
)

SETTINGS = {
    "fashion_mnist": {"epochs": 4, "batch_size": 128, "max_learning_rate": 6e-3, "warmup": 0.1},
    "cifar10": {"epochs": 4, "batch_size": 128, "max_learning_rate": 1e-2, "warmup": 0.3},
    "imdb": {"epochs": 4, "batch_size": 256, "max_learning_rate": 2e-2, "warmup": 0.3},
}
BETA_2 = {"fashion_mnist": 0.99}  # of Adam and AdamW in all ways but `plain`; else Keras's 0.999
PLAIN_EPOCHS = {"fashion_mnist": 10, "cifar10": 10, "imdb": 10}
GRID = {"learning_rate": (1e-3, 3e-3, 8e-3), "batch_size": (64, 128)}
GRIDS = {
    "cifar10": {"learning_rate": (3e-3, 8e-3), "batch_size": (128,)},  # smaller: it takes so long
    "imdb": {"learning_rate": (3e-3, 8e-3, 2e-2), "batch_size": (64, 128, 256)},  # it takes high rates
}
GRID_SEED = 100
WAYS = ("plain", "by_hand", "defaults", "tuned", "found")
BUDGET_S = 60  # of tune, as it is by default


def build_cnn() -> keras.Model:
    """The network of TensorFlow's tutorial "Convolutional Neural Network", for 28×28 images."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def build_resnet8() -> keras.Model:
    """ResNet-8 (78,000 weights), as MLPerf Tiny uses it: https://arxiv.org/abs/2106.07597."""
    layers = keras.layers

    def convolve(x, filters, size, strides):
        return layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization()(convolve(inputs, 16, 3, 1)))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(layers.BatchNormalization()(convolve(x, filters, 3, strides)))
        y = layers.BatchNormalization()(convolve(y, filters, 3, 1))
        if strides > 1:
            x = convolve(x, filters, 1, strides)
        x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def build_averaged_words() -> keras.Model:
    """The network of TensorFlow's tutorial "Basic text classification"."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            layers.Embedding(WORDS, 16),
            layers.Dropout(0.2),
            layers.GlobalAveragePooling1D(),
            layers.Dropout(0.2),
            layers.Dense(2),
        ]
    )


BUILDERS = {"fashion_mnist": build_cnn, "cifar10": build_resnet8, "imdb": build_averaged_words}


def samples_of(name: str) -> dict[str, np.ndarray]:
    """The data set, with images scaled to 0..1."""
    data = load(name)
    for split in ("train", "test") if name != "imdb" else ():
        data[f"x_{split}"] = (data[f"x_{split}"] / np.float32(255)).astype(np.float32)
    return data


def train_by_hand(build, data, *, epochs, learning_rate, batch_size, beta_2, seed) -> TrainingClock:
    """AdamW on a cosine with a warmup, arrays straight into `fit`."""
    clock = TrainingClock(time.perf_counter())
    model = build_from_seed(build, seed)
    steps = epochs * -(-len(data["x_train"]) // batch_size)
    warmup = steps // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
    )
    model.compile(**compile_arguments(keras.optimizers.AdamW(rate, beta_2=beta_2)))
    test = data["x_test"], data["y_test"]
    model.fit(
        data["x_train"],
        data["y_train"],
        batch_size,
        epochs,
        validation_data=test,
        validation_batch_size=500,
        verbose=0,
        callbacks=[clock],
    )
    return clock


def best_by_hand(build, data, epochs, grid, beta_2) -> dict[str, float]:
    """The grid's best by the accuracy that a run ends with."""
    ended = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        clock = train_by_hand(build, data, epochs=epochs, beta_2=beta_2, seed=GRID_SEED, **settings)
        ended[values] = round(clock.accuracies[-1], 4)
    best = max(ended, key=lambda values: ended[values])
    print_row(benchmark="time_to_accuracy", grid=[[*values, ended[values]] for values in ended])
    return dict(zip(grid, best, strict=True))


def train_tuned(build, data, *, find, epochs, batch_size, max_learning_rate, warmup, beta_2, seed):
    """As `defaults`, with options and, if wanted, a peak that were searched; says what the search took."""
    begun = time.perf_counter()
    arrays = data["x_train"], data["y_train"]

    def build_compiled(**options):
        model = build()
        model.compile(**compile_arguments(keras.optimizers.Adam(beta_2=beta_2)), **options)
        return model

    tuned = tfaccel.tune(build_compiled, arrays, batch_size, BUDGET_S, epochs=epochs, cache=False, verbose=0)
    accelerator = tfaccel.Accelerator(tuned=tuned)
    if find:
        with accelerator.scope():
            model = build_from_seed(build, seed)
            model.compile(
                **compile_arguments(keras.optimizers.Adam(beta_2=beta_2)), **accelerator.compile_options()
            )
        batches = accelerator.dataset(*arrays, batch_size=batch_size)
        max_learning_rate = tfaccel.find_learning_rate(model, batches).peak
    search_s = time.perf_counter() - begun
    _, clock = train_accelerated(
        build,
        data,
        epochs=epochs,
        batch_size=batch_size,
        max_learning_rate=max_learning_rate,
        warmup=warmup,
        beta_2=beta_2,
        seed=seed,
        accelerator=accelerator,
    )
    chosen = " ".join(str(tuned.chosen).split())
    return clock, {"search_s": round(search_s, 1), "peak": round(max_learning_rate, 5), "chosen": chosen}


def faster(one: TrainingClock, other: TrainingClock) -> float:
    """How many times as fast `one` reaches an accuracy that both reach."""
    target = accuracy_of_both(one, other)
    return other.seconds_to(target) / one.seconds_to(target)


def train_all(name, data, seed, ways, by_hand) -> dict[str, TrainingClock]:
    """A clock for each way; prints a line for each."""
    build, settings, clocks = BUILDERS[name], SETTINGS[name], {}
    beta_2 = BETA_2.get(name, 0.999)
    for way in ways:
        more = {}
        if way == "plain":
            _, clock = train_plain(build, data, epochs=PLAIN_EPOCHS[name], seed=seed)
        elif way == "by_hand":
            clock = train_by_hand(build, data, epochs=settings["epochs"], beta_2=beta_2, seed=seed, **by_hand)
        elif way == "defaults":
            _, clock = train_accelerated(build, data, beta_2=beta_2, seed=seed, **settings)
        else:
            clock, more = train_tuned(build, data, find=way == "found", beta_2=beta_2, seed=seed, **settings)
        clocks[way] = clock
        print_row(
            benchmark="time_to_accuracy",
            data=name,
            seed=seed,
            way=way,
            accuracies=[round(a, 4) for a in clock.accuracies],
            seconds=[round(s, 1) for s in clock.seconds],
            **more,
        )
    return clocks


def main():
    """Prints one line for each way and seed, and one summary line a data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    for name in options.data:
        data = samples_of(name)
        by_hand = {}
        if "by_hand" in options.ways:
            grid, beta_2 = GRIDS.get(name, GRID), BETA_2.get(name, 0.999)
            by_hand = best_by_hand(BUILDERS[name], data, SETTINGS[name]["epochs"], grid, beta_2)
        runs = [train_all(name, data, seed, options.ways, by_hand) for seed in options.seeds]
        speedups = {}
        for ours, theirs in itertools.product(WAYS[2:], WAYS[:2]):
            if ours in options.ways and theirs in options.ways:
                key = f"{ours}_over_{theirs}"
                speedups[key] = spread([faster(clocks[ours], clocks[theirs]) for clocks in runs])
        best = {way: spread([max(clocks[way].accuracies) for clocks in runs], 4) for way in options.ways}
        print_row(
            benchmark="time_to_accuracy",
            data=name,
            settings=SETTINGS[name],
            by_hand=by_hand,
            speedups=speedups,
            best_accuracy=best,
        )


if __name__ == "__main__":
    keras.config.disable_interactive_logging()
    main()
