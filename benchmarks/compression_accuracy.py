"""What pruning, clustering, rounding and all of them cost in accuracy, and bring in size, on trained nets of
CIFAR-10 and Fashion-MNIST.

Claim: with a teacher four fifths of a net's weights can go for a few tenths of a point; zipped, it is several
times smaller, and with shared values and int8 on top of that twenty times.

    python benchmarks/compression_accuracy.py --models residual --rows plain prune-0.8 chain-0.9 --seeds 1

Every row begins with the same trained net (`_image_models.py`) and trains it on for as many epochs, the
plain one too; a seed decides the order of the images and their shifts. A chain prunes, then clusters and
rounds to eight bits in a second fit of half as many epochs. With `--teacher` all of them learn from another
of the trained nets, besides the labels, or from the mean of several. Accuracy is that of all 10,000 test
images, of the float model, and of the int8 file in LiteRT (int4_weights for the row of four bits), which is
calibrated with 500 images, or not at all where ranges were learnt in training. Sizes are those of the
TFLite files, deflated as in a zip. `speedup` is the int8 file's against the float file's on one thread,
both run in turn.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
import zlib

import _image_models
import keras
from _report import print_row

import tfaccel

EPOCHS = 8
TEACHERS_WEIGHT = 0.8
RATE = 2e-3  # fits a net that has learnt already
ROWS = {
    "plain": lambda: [[]],
    "prune-0.5": lambda: [[tfaccel.PruneWeights(0.5)]],
    "prune-0.75": lambda: [[tfaccel.PruneWeights(0.75)]],
    "prune-0.8": lambda: [[tfaccel.PruneWeights(0.8)]],
    "prune-0.8-global": lambda: [[tfaccel.PruneWeights(0.8, scope="global")]],
    "prune-0.9": lambda: [[tfaccel.PruneWeights(0.9)]],
    "prune-2:4": lambda: [[tfaccel.PruneWeights(pattern="2:4")]],
    "cluster-16": lambda: [[tfaccel.ClusterWeights(16)]],
    "cluster-32": lambda: [[tfaccel.ClusterWeights(32)]],
    "quantize-8": lambda: [[tfaccel.QuantizeAware()]],
    "quantize-8-learned": lambda: [[tfaccel.QuantizeAware(ranges="learned")]],
    "quantize-4": lambda: [[tfaccel.QuantizeAware(4, None)]],
    "chain-0.8": lambda: [
        [tfaccel.PruneWeights(0.8, scope="global")],
        [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8)],
    ],
    "chain-0.9": lambda: [
        [tfaccel.PruneWeights(0.9, scope="global")],
        [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8)],
    ],
    "chain-0.905": lambda: [
        [tfaccel.PruneWeights(0.905, scope="global")],
        [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8)],
    ],
    "chain-0.91": lambda: [
        [tfaccel.PruneWeights(0.91, scope="global")],
        [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8)],
    ],
    "chain-pairs": lambda: [
        [tfaccel.PruneWeights(0.865, scope="global", pattern="2x1")],
        [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8)],
    ],
}
MODELS = (*_image_models.NAMES, "plain")


def main():
    """Prints a line of JSON for each row and model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--teacher", nargs="+", choices=_image_models.NAMES)
    options = parser.parse_args()
    for name in options.models:
        for row in options.rows:
            runs = [
                run(name, row, seed, options.epochs, options.rate, options.teacher)
                for seed in range(options.seeds)
            ]
            figures = {key: round(statistics.mean(each[key] for each in runs), 4) for key in runs[0]}
            spread = [min(each["accuracy"] for each in runs), max(each["accuracy"] for each in runs)]
            print_row(
                benchmark="compression_accuracy",
                model=name,
                row=row,
                **figures,
                accuracies=spread,
                seeds=options.seeds,
                epochs=options.epochs,
                rate=options.rate,
                teacher=options.teacher,
            )


def run(name, row, seed, epochs, rate=RATE, teacher=None):
    """Trains the net on, a fit for each list of callbacks, and measures what comes out."""
    model, data = _image_models.trained(name)
    begun = time.monotonic()
    if teacher is not None:
        teacher = mean_of([_image_models.trained(each)[0] for each in teacher])
    for index, callbacks in enumerate(ROWS[row]()):
        taught = [] if teacher is None else [tfaccel.Distill(teacher, TEACHERS_WEIGHT)]
        # Half of the rate, and half the time, for a second fit.
        share = index + 1
        _image_models.train_on(
            model, data, seed, max(epochs // share, 1), rate / share, [*taught, *callbacks]
        )
    test = data["x_test"], data["y_test"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "m.tflite")
        tfaccel.export_tflite(model, path)
        floats = path.read_bytes()
        recipe = "int4_weights" if row == "quantize-4" else "int8"
        learned = row.startswith("chain") or row.startswith("quantize-8")
        samples = None if learned else data["x_train"][:500]
        small = pathlib.Path(folder, "small.tflite")
        file = tfaccel.export_tflite(model, small, recipe, calibration=samples, evaluate=test, max_drop=0.5)
        integers = small.read_bytes()
        speedup = faster(path, small)
        report = tfaccel.compression_report(model)
    return {
        "accuracy": file.score.model,
        "integer_accuracy": file.score.file,
        "sparsity": report.sparsity,
        "float_bytes": len(floats),
        "float_zipped": len(zlib.compress(floats)),
        "integer_zipped": len(zlib.compress(integers)),
        "speedup": speedup,
        "fit_s": time.monotonic() - begun,
    }


def mean_of(models):
    """A model that answers with the mean of what some others answer."""
    inputs = keras.Input(models[0].input_shape[1:])
    answers = [model(inputs) for model in models]
    return keras.Model(inputs, keras.layers.Average()(answers) if len(answers) > 1 else answers[0])


def faster(one, other):
    """How many times as fast the other file is; a turn of both five times."""
    times = [
        [tfaccel.benchmark_tflite(path, num_threads=1).median_ms for path in (one, other)] for _ in range(5)
    ]
    return statistics.median(a / b for a, b in times)


if __name__ == "__main__":
    keras.config.disable_interactive_logging()
    main()
