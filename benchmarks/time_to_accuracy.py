"""Claim: the accelerated run reaches plain Keras's best test accuracy in a third of the time or less.

    python benchmarks/time_to_accuracy.py                      # both data sets, 3 seeds, about an hour
    python benchmarks/time_to_accuracy.py --data fashion_mnist --seeds 0 1 2

Plain: Adam(1e-3), batch size 32, 10 epochs, arrays straight into `fit`. Accelerated: `Accelerator()`,
`accelerator.dataset(...)` in larger batches, `OneCycle`. Same network, same first weights, same images;
the two runs of a seed follow each other in one process. Time is training time: tracing and compiling
count, evaluation does not. The target is the best accuracy that the plain run of that seed reaches at
the end of any epoch; its time is that of the first epoch that reaches it.
"""

import argparse

import keras
import numpy as np
from _report import print_row, spread
from datasets import load

from tfaccel.demo.training import train_accelerated, train_plain

SETTINGS = {
    "fashion_mnist": {"epochs": 6, "batch_size": 128, "max_learning_rate": 8e-3, "warmup": 0.25},
    "cifar10": {"epochs": 4, "batch_size": 128, "max_learning_rate": 1e-2, "warmup": 0.3},
}


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


def build_for(name: str):
    """The network of a data set."""
    return build_resnet8 if name == "cifar10" else build_cnn


def images_of(name: str) -> dict[str, np.ndarray]:
    """The data set with images scaled to 0..1."""
    data = load(name)
    for split in ("train", "test"):
        data[f"x_{split}"] = (data[f"x_{split}"] / np.float32(255)).astype(np.float32)
    return data


def main():
    """Prints one line a seed and one summary line a data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.data:
        data, build, rows = images_of(name), build_for(name), []
        for seed in options.seeds:
            _, plain = train_plain(build, data, epochs=10, seed=seed)
            _, fast = train_accelerated(build, data, seed=seed, **SETTINGS[name])
            target = max(plain.accuracies)
            seconds, fast_seconds = plain.seconds_to(target), fast.seconds_to(target)
            rows.append(
                {
                    "seed": seed,
                    "target_accuracy": round(target, 4),
                    "accelerated_accuracy": round(fast.accuracies[-1], 4),
                    "plain_seconds": round(seconds, 1),
                    "accelerated_seconds": fast_seconds and round(fast_seconds, 1),
                    "speedup": fast_seconds and round(seconds / fast_seconds, 2),
                    "plain_epoch_accuracies": [round(a, 4) for a in plain.accuracies],
                    "accelerated_epoch_accuracies": [round(a, 4) for a in fast.accuracies],
                    "plain_epoch_seconds": [round(s, 1) for s in plain.seconds],
                    "accelerated_epoch_seconds": [round(s, 1) for s in fast.seconds],
                }
            )
            print_row(benchmark="time_to_accuracy", data=name, **rows[-1])
        reached = [row["speedup"] for row in rows if row["speedup"]]
        print_row(
            benchmark="time_to_accuracy",
            data=name,
            settings=SETTINGS[name],
            speedup=spread(reached) if reached else None,
            reached=f"{len(reached)} of {len(rows)}",
            target_accuracy=spread([row["target_accuracy"] for row in rows], 4),
            accelerated_accuracy=spread([row["accelerated_accuracy"] for row in rows], 4),
        )


if __name__ == "__main__":
    main()
