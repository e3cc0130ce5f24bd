"""Claim: pruning, clustering and rounding cost little of a step, and less than with
tensorflow-model-optimization.

    python benchmarks/compression_overhead.py

Two models, each fitted again and again in one process: bare Keras, then with each technique, in turn, so
that the machine's drift meets all alike. A figure is the ratio of step times within one turn; the median of
all turns and its quartiles are printed. tfmot runs in a process of its own against bare tf_keras, in the
same way. A fit is planned for 50 epochs, which decides how often masks are made, and stops behind the
fourth; the fastest of the last ones is what counts. `ratio_of_least` is the fastest of all turns against
the bare fit's: on a noisy machine the figure to trust.

With `--scope` ours are built in the scope of an `Accelerator()` and read its dataset, as the README's script
does; bare Keras stays what all are compared with, and `plain` is then what the techniques are added to. A
fit has ten epochs there, whose first ones find the fastest way.

Rows: `plain` is bare Keras against itself, which shows the noise. `prune` makes a mask every 52 steps, as
does tfmot's. `cluster` regroups every 75 steps; tfmot's looks its weights up every step. `quantize` rounds
weights and activations to eight bits, as tfmot's does; `quantize weights` only those. `distill` has a teacher
of the same form.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

MODELS = ("mlp", "cnn")
BATCH = 64
EPOCHS = 50  # that a fit is planned for


def build(host, name):
    """A dense model of 670,000 weights, or a convolutional one of 75,000, compiled."""
    layers = host.layers
    host.utils.set_random_seed(0)
    if name == "mlp":
        stack = [layers.Flatten(), layers.Dense(512, "relu"), layers.Dense(512, "relu"), layers.Dense(10)]
    else:
        stack = []
        for filters in (16, 32, 64):
            stack += [layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)]
            stack += [layers.BatchNormalization(), layers.ReLU()]
            stack += [layers.Conv2D(filters, 3, padding="same", use_bias=False)]
            stack += [layers.BatchNormalization(), layers.ReLU()]
        stack += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    return host.Sequential([host.Input((28, 28, 1)), *stack])


def compiled(host, model, jit_compile=False, **options):
    """With Adam and the loss of a classifier."""
    loss = host.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(host.optimizers.Adam(1e-3), loss, jit_compile=jit_compile, **options)
    return model


def ours(name, scope):
    """A model, its callbacks and its accelerator for each technique's name, on Keras 3."""
    import keras

    import tfaccel

    accelerator = tfaccel.Accelerator() if scope else None

    techniques = {
        "plain": list,
        "prune": lambda: [tfaccel.PruneWeights(0.8)],
        "prune global": lambda: [tfaccel.PruneWeights(0.8, scope="global")],
        "prune 2:4": lambda: [tfaccel.PruneWeights(pattern="2:4")],
        "cluster": lambda: [tfaccel.ClusterWeights(16)],
        "quantize weights": lambda: [tfaccel.QuantizeAware(8, None)],
        "quantize": lambda: [tfaccel.QuantizeAware(8)],
        "quantize learned": lambda: [tfaccel.QuantizeAware(8, ranges="learned")],
        "distill": lambda: [tfaccel.Distill(build(keras, name))],
        "all three": lambda: [
            tfaccel.PruneWeights(0.8),
            tfaccel.ClusterWeights(16),
            tfaccel.QuantizeAware(8),
        ],
    }
    fits = {"": (compiled(keras, build(keras, name)), list, None)}
    with accelerator.scope() if scope else contextlib.nullcontext():
        options = accelerator.compile_options() if scope else {}
        for technique, callbacks in techniques.items():
            fits[technique] = compiled(keras, build(keras, name), **options), callbacks, accelerator
    return fits


def theirs(name, steps):
    """The same with tfmot on tf_keras."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    sparsity, clustering = tfmot.sparsity.keras, tfmot.clustering.keras
    last = int(0.7 * EPOCHS * steps)
    schedule = sparsity.PolynomialDecay(0.0, 0.8, 0, last, frequency=last // 100)
    pruned = sparsity.prune_low_magnitude(build(tf_keras, name), pruning_schedule=schedule)
    start = clustering.CentroidInitialization.KMEANS_PLUS_PLUS
    shared = clustering.cluster_weights(
        build(tf_keras, name), number_of_clusters=16, cluster_centroids_init=start
    )
    quantized = tfmot.quantization.keras.quantize_model(build(tf_keras, name))
    return {
        "": (compiled(tf_keras, build(tf_keras, name)), list, None),
        "plain": (compiled(tf_keras, build(tf_keras, name)), list, None),
        "prune": (compiled(tf_keras, pruned), lambda: [sparsity.UpdatePruningStep()], None),
        "cluster": (compiled(tf_keras, shared), list, None),
        "quantize": (compiled(tf_keras, quantized), list, None),
    }


class Clock:
    """The least seconds of an epoch behind the first, in which a fit is traced: noise can only add."""

    def __init__(self, host, last):
        clock = self

        class Callback(host.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                clock.begun = time.perf_counter()

            def on_epoch_end(self, epoch, logs=None):
                took = time.perf_counter() - clock.begun
                clock.seconds = min(clock.seconds, took) if epoch > 1 else took
                self.model.stop_training = epoch == last

        self.callback = Callback()


def measure(host, fits, turns, steps):
    """Ratios to the bare fit, a list for each technique."""
    random = np.random.default_rng(0)
    x = random.random((steps * BATCH, 28, 28, 1), dtype="float32")
    y = random.integers(0, 10, len(x))
    ratios = {name: [] for name in fits if name}
    least = dict.fromkeys(fits, float("inf"))
    for _ in range(turns):
        seconds = {}
        for name, (model, callbacks, accelerator) in fits.items():
            clock = Clock(host, 3 if accelerator is None else 9)
            data = {"x": x, "y": y, "batch_size": BATCH}
            if accelerator is not None:
                data = {"x": accelerator.dataset(x, y, batch_size=BATCH)}
            model.fit(**data, epochs=EPOCHS, verbose=0, callbacks=[*callbacks(), clock.callback])
            seconds[name] = clock.seconds
            least[name] = min(least[name], clock.seconds)
        for name in ratios:
            ratios[name].append(seconds[name] / seconds[""])
    return {name: (values, least[name] / least[""]) for name, values in ratios.items()}


def in_a_process(name, options):
    """The ratios of tfmot."""
    command = [sys.executable, __file__, "--tfmot", "--models", name]
    command += ["--turns", str(options.turns), "--steps", str(options.steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    line = next(line for line in done.stdout.splitlines() if line.startswith("RATIOS "))
    return json.loads(line.removeprefix("RATIOS "))["ratios"]


def main():
    """Prints one line of JSON for each model and technique."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--scope", action="store_true")
    parser.add_argument("--tfmot", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    options = parser.parse_args()
    if options.tfmot:
        import tf_keras

        for name in options.models:
            found = measure(tf_keras, theirs(name, options.steps), options.turns, options.steps)
            print("RATIOS " + json.dumps({"model": name, "ratios": found}))
        return
    import keras
    from _report import print_row

    for name in options.models:
        rows = {"tfaccel": measure(keras, ours(name, options.scope), options.turns, options.steps)}
        if not options.scope:
            rows["tfmot"] = in_a_process(name, options)
        for source, ratios in rows.items():
            for technique, (values, of_least) in ratios.items():
                low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
                print_row(
                    benchmark="compression_overhead",
                    model=name,
                    source=source,
                    technique=technique,
                    step_ratio=round(middle, 3),
                    quartiles=[round(low, 3), round(high, 3)],
                    ratio_of_least=round(of_least, 3),
                    turns=len(values),
                )


if __name__ == "__main__":
    main()
