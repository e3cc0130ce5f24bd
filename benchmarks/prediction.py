"""Claim: one sample through `tfaccel.predictor` costs a small part of `model.predict` or calling the model.

    python benchmarks/prediction.py --turns 15

The same small CNN and MLP, one real image at a time; the ways take turns in one process. A turn is the mean
of several calls after a warm-up.
"""

import argparse
import time

import keras
from _report import print_row, spread
from time_to_accuracy import build_cnn, samples_of

import tfaccel

CALLS = {"predict": 5, "accelerated_predict": 20, "call": 20, "predictor": 200, "predictor_xla": 200}


def build_mlp() -> keras.Model:
    """784-128-10."""
    layers = keras.layers
    stack = [layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((28, 28, 1)), *stack])


def main() -> None:
    """Prints one line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    sample = samples_of("fashion_mnist")["x_test"][:1]
    for name, build in (("mlp", build_mlp), ("cnn", build_cnn)):
        model, accelerator = build(), tfaccel.Accelerator()
        with accelerator.scope():
            accelerated = build()
            accelerated.compile("sgd", **accelerator.compile_options())
        ways = {
            "predict": lambda x, model=model: model.predict(x, verbose=0),
            "accelerated_predict": lambda x, model=accelerated: model.predict(x, verbose=0),
            "call": lambda x, model=model: model(x, training=False).numpy(),
            "predictor": tfaccel.predictor(model),
            "predictor_xla": tfaccel.predictor(model, jit=True),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():
            way(sample)
        for _ in range(turns):
            for way, run in ways.items():
                started = time.perf_counter()
                for _ in range(CALLS[way]):
                    run(sample)
                times[way].append(1e3 * (time.perf_counter() - started) / CALLS[way])
        print_row(benchmark="prediction", model=name, call_ms={way: spread(t, 3) for way, t in times.items()})


if __name__ == "__main__":
    main()
