"""Makes the demo's built-in sample: the first images of Fashion-MNIST, in their own order.

    python benchmarks/make_sample.py

Fashion-MNIST: Xiao, Rasul & Vollgraf, 2017, https://arxiv.org/abs/1708.07747, MIT licence.
"""

import pathlib

import numpy as np
from datasets import load

TRAIN, TEST = 5000, 1000
TARGET = pathlib.Path(__file__).parent.parent / "tfaccel" / "data" / "fashion_mnist_sample.npz"


def main():
    """Writes the sample and says what is in it."""
    data = load("fashion_mnist")
    sample = {
        "x_train": data["x_train"][:TRAIN],
        "y_train": data["y_train"][:TRAIN],
        "x_test": data["x_test"][:TEST],
        "y_test": data["y_test"][:TEST],
    }
    np.savez_compressed(TARGET, **sample)
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes", {k: v.shape for k, v in sample.items()})


if __name__ == "__main__":
    main()
