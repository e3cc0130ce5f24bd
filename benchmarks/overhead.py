"""Claim: with every choice forced to plain Keras, tfaccel costs nothing; and what each callback costs.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --steps 600 --models cnn --rows throughput choices+nothing choices+all

Four models, each fitted again and again in one process, each way in turn, so that the machine's drift meets
all alike. `ratio` is that of the epochs' times within one turn, the median of all turns, with its quartiles;
`fastest` compares the fastest epochs of all turns, which other work on the machine disturbs least: a cost of
some hundredths can be seen by it. The first two turns are not counted.

Rows against bare Keras: `plain`: itself, which shows the noise. `accelerator`: built and compiled under
`Accelerator("one_device", "float32", jit=False, kernels="plain")`, the same arrays. The name of a callback:
bare Keras with that callback, at strength zero where it has one; `all`: OneCycle, LayerLearningRates,
UnfreezeLayers and Profile. `choices`: what `Accelerator(jit=False)` chooses here, with its dataset: below 1
is faster (with XLA, each fit would try it anew). `choices+…`: the callback on top of those choices, against
`choices`.
"""

import argparse
import time

import keras
import numpy as np
from _report import print_row
from time_to_accuracy import build_cnn

import tfaccel
from tfaccel.demo.images import load_images

EPOCHS, SETTLING = 14, 7  # of a fit: the first ones trace, count operations, and find how long a call may be


def models():
    """Models of the sample's images, from a tiny one to one that computes for milliseconds."""
    layers = keras.layers
    flat = [layers.Flatten()]
    return {
        "linear": lambda: [*flat, layers.Dense(10)],
        "mlp": lambda: [*flat, layers.Dense(128, activation="relu"), layers.Dense(10)],
        "cnn": lambda: [
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ],
        # That of time_to_accuracy.py, without its hidden dense layer.
        "larger_cnn": lambda: [*build_cnn().layers[:-2], layers.Dense(10)],
    }


def make(stack, accelerator=None):
    """A compiled model; under the accelerator where there is one."""
    keras.utils.set_random_seed(0)

    def build(**options):
        model = keras.Sequential([keras.Input((28, 28, 1)), *stack()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], **options)
        return model

    if accelerator is None:
        return build(jit_compile=False)
    with accelerator.scope():
        return build(**accelerator.compile_options())


FLAT = {"initial_fraction": 1, "final_fraction": 1, "momentum_range": None}
CALLBACKS = {
    "throughput": lambda: [tfaccel.Throughput()],
    "profile": lambda: [tfaccel.Profile(verbose=0)],
    "one_cycle": lambda: [tfaccel.OneCycle(1e-3, **FLAT)],
    "layer_rates": lambda: [tfaccel.LayerLearningRates(decay=0.9)],
    "unfreeze": lambda: [tfaccel.UnfreezeLayers(0.0)],
    "all": lambda: [
        tfaccel.OneCycle(1e-3, **FLAT),
        tfaccel.LayerLearningRates(decay=0.9),
        tfaccel.UnfreezeLayers(0.0),
        tfaccel.Profile(verbose=0),
    ],
}
ROWS = (
    "plain",
    "accelerator",
    *CALLBACKS,
    "choices",
    "choices+nothing",
    *(f"choices+{name}" for name in CALLBACKS),
)


def make_row(row, stack, x, y):
    """What a row fits: a model, its data, and what makes its callbacks."""
    callbacks = CALLBACKS.get(row.removeprefix("choices+"), list)
    if row.startswith("choices"):
        chosen = tfaccel.Accelerator(jit=False)
        return make(stack, chosen), (chosen.dataset(x, y),), callbacks
    plain = tfaccel.Accelerator("one_device", "float32", jit=False, kernels="plain")
    return make(stack, plain if row == "accelerator" else None), (x, y), callbacks


def main():
    """Prints one line a model and row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch, of 32 samples")
    parser.add_argument("--models", nargs="+", default=list(models()), choices=list(models()))
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    options = parser.parse_args()
    data = load_images()
    some = np.resize(np.arange(len(data["x_train"])), 32 * options.steps)
    x, y = data["x_train"][some], data["y_train"][some]
    needed = {baseline(row) for row in options.rows} | {"bare"}
    for name in options.models:
        ways = [row for row in ("bare", *ROWS) if row in needed or row in options.rows]
        rows = {row: make_row(row, models()[name], x, y) for row in ways}
        epochs = {row: [] for row in rows}  # of each turn, the seconds of its epochs
        for turn in range(options.turns + 2):
            for row, (model, arguments, callbacks) in rows.items():
                timer = Timer(epochs[row] if turn >= 2 else [])
                model.fit(*arguments, epochs=EPOCHS, verbose=0, callbacks=[*callbacks(), timer])
        for row in options.rows:
            print_row(
                benchmark="overhead",
                model=name,
                row=row,
                against=baseline(row),
                bare_step_ms=round(1e3 * np.median(epochs["bare"]) / options.steps, 3),
                **compared(np.array(epochs[row]), np.array(epochs[baseline(row)])),
                turns=options.turns,
            )


def baseline(row):
    """What a row is held against."""
    return "choices" if row.startswith("choices+") else "bare"


def compared(one, other):
    """Median and quartiles of the turns' ratios, and the ratio of the fastest epochs of all turns."""
    ratios = np.median(one, axis=1) / np.median(other, axis=1)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "quartiles": [round(float(np.quantile(ratios, q)), 3) for q in (0.25, 0.75)],
        "fastest": round(float(one.min() / other.min()), 3),
    }


class Timer(keras.callbacks.Callback):
    """Seconds of each of the last epochs, from end to end, so with all that hooks do.

    Args:
        turns: Is given a list of them.
    """

    def __init__(self, turns):
        super().__init__()
        self.turns = turns

    def on_train_begin(self, logs=None):
        """A new fit."""
        self.ends = []

    def on_epoch_end(self, epoch, logs=None):
        """Notes the moment."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, logs=None):
        """Keeps them."""
        self.turns.append(np.diff(self.ends)[SETTLING - 1 :])


if __name__ == "__main__":
    main()
