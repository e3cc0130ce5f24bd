"""Claim: with every choice forced to plain Keras, tfaccel costs nothing; and what each callback costs.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --steps 600 --rows choices choices+throughput choices+profile choices+all

Three models, each fitted again and again in one process: bare Keras, then each way of tfaccel, in turn,
so that the machine's drift meets all alike. A figure is the ratio of step times within one turn; the
median of all turns and its quartiles are printed. The first two turns are not counted.

Rows: `plain`: bare Keras against itself, which shows the noise. `accelerator`: built and compiled under
`Accelerator("one_device", "float32", jit=False, kernels="plain")`, the same arrays. `throughput`: bare
Keras with the Throughput callback, `profile`: with Profile. `one_cycle`: with OneCycle at strength zero.
`choices`: what `Accelerator(jit=False)` chooses here, with its dataset, against bare Keras: below 1 is faster
(with XLA, each fit would try it anew).
`choices+throughput` and `choices+profile`: the callback on top of those choices, against `choices`;
`choices+layer_rates`: LayerLearningRates with a share for each layer; `choices+all`: OneCycle, that,
UnfreezeLayers with nothing frozen, and Profile.
"""

import argparse
import statistics
import time

import keras
import numpy as np
from _report import print_row

import tfaccel
from tfaccel.demo.images import load_images

EPOCHS, SETTLING = 14, 7  # of a fit: the first ones trace, count operations, and find how long a call may be


def models():
    """A tiny, a small and a compute-bound model of the sample's images."""
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


def main():
    """Prints one line a model and row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch, of 32 samples")
    parser.add_argument("--rows", nargs="+", help="bare is measured in any case")
    options = parser.parse_args()
    data = load_images()
    some = np.resize(np.arange(len(data["x_train"])), 32 * options.steps)
    x, y = data["x_train"][some], data["y_train"][some]
    plain_keras = tfaccel.Accelerator("one_device", "float32", jit=False, kernels="plain")
    chosen = tfaccel.Accelerator(jit=False)
    flat = {"initial_fraction": 1, "final_fraction": 1, "momentum_range": None}
    for name, stack in models().items():
        rows = {
            "bare": (make(stack), (x, y), list),
            "plain": (make(stack), (x, y), list),
            "accelerator": (make(stack, plain_keras), (x, y), list),
            "throughput": (make(stack), (x, y), lambda: [tfaccel.Throughput()]),
            "profile": (make(stack), (x, y), lambda: [tfaccel.Profile(verbose=0)]),
            "one_cycle": (make(stack), (x, y), lambda: [tfaccel.OneCycle(1e-3, **flat)]),
            "choices": (make(stack, chosen), (chosen.dataset(x, y),), list),
            "choices+throughput": (
                make(stack, chosen),
                (chosen.dataset(x, y),),
                lambda: [tfaccel.Throughput()],
            ),
            "choices+profile": (
                make(stack, chosen),
                (chosen.dataset(x, y),),
                lambda: [tfaccel.Profile(verbose=0)],
            ),
            "choices+layer_rates": (
                make(stack, chosen),
                (chosen.dataset(x, y),),
                lambda: [tfaccel.LayerLearningRates(decay=0.9)],
            ),
            "choices+all": (
                make(stack, chosen),
                (chosen.dataset(x, y),),
                lambda: [
                    tfaccel.OneCycle(1e-3, **flat),
                    tfaccel.LayerLearningRates(decay=0.9),
                    tfaccel.UnfreezeLayers(0.0),
                    tfaccel.Profile(verbose=0),
                ],
            ),
        }
        rows = {row: way for row, way in rows.items() if row == "bare" or row in (options.rows or rows)}
        seconds = {row: [] for row in rows}
        for turn in range(options.turns + 2):
            for row, (model, arguments, callbacks) in rows.items():
                timer = Timer(seconds[row] if turn >= 2 else [])
                model.fit(*arguments, epochs=EPOCHS, verbose=0, callbacks=[*callbacks(), timer])
        for row in list(rows)[1:]:
            baseline = "choices" if row.startswith("choices+") else "bare"
            ratios = sorted(a / b for a, b in zip(seconds[row], seconds[baseline], strict=True))
            print_row(
                benchmark="overhead",
                model=name,
                row=row,
                against=baseline,
                bare_step_ms=round(1e3 * statistics.median(seconds["bare"]), 3),
                ratio=round(statistics.median(ratios), 3),
                quartiles=[round(float(np.quantile(ratios, q)), 3) for q in (0.25, 0.75)],
                turns=len(ratios),
            )


class Timer(keras.callbacks.Callback):
    """Seconds of a step: the median over the last epochs, each from end to end, so with all that hooks do.

    Args:
        seconds: Is given the figure.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        """A new fit."""
        self.ends = []

    def on_epoch_end(self, epoch, logs=None):
        """Notes the moment."""
        self.ends.append(time.perf_counter())

    def on_train_end(self, logs=None):
        """Keeps the median."""
        epochs = np.diff(self.ends)[SETTLING - 1 :]
        self.seconds.append(float(np.median(epochs)) / self.params["steps"])


if __name__ == "__main__":
    main()
