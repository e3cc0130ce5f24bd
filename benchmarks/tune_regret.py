"""Claim: `tune` finds options that are as fast as the best of all, within a minute.

    python benchmarks/tune_regret.py                     # eight models, half an hour on 2 cores
    python benchmarks/tune_regret.py --models mlp lstm

For each network of `_step_models.py` (batches of 32), `tune` runs with its default budget. Then every way
that it knows is trained anew, one after the other and in turn, with plain `fit(x, y)` of Keras among them:
the exhaustive grid. Those whose steps take five times as long as plain Keras's are left out of further turns.

`of_best`: samples a second of the options that `tune` chose, as a share of the best in the grid, goal 0.95.
`faster_than_plain`: as a multiple of plain Keras's, goals 1.0 everywhere and 1.8 in the geometric mean.
"""

import argparse
import dataclasses
import statistics
import time

import keras
from _report import print_row
from _step_models import SHAPES, build_keras, make_data

import tfaccel
from tfaccel.prepare.candidates import plain, precisions, ways_to_step

BATCH_SIZE = 32
EPOCHS = 50
SECONDS = 1.0  # of training in a turn


def build(name, **options):
    """The network, compiled."""
    model = build_keras(name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, **options)
    return model


def every_way(devices):
    """All candidates that `tune` could come to."""
    start = plain(devices, BATCH_SIZE)
    ways = [start, *ways_to_step(start, has_loops=True)]
    return [
        dataclasses.replace(way, precision=precision)
        for precision in ("float32", *precisions(devices))
        for way in ways
    ]


class Trained:
    """A model under one candidate's options, which trains a second for each turn."""

    def __init__(self, candidate, name, x, y):
        self.accelerator = tfaccel.Accelerator("one_device", **candidate.accelerator_options())
        with self.accelerator.scope():
            self.model = build(name, **self.accelerator.compile_options())
        self.data = self.accelerator.dataset(x, y, batch_size=BATCH_SIZE)
        if candidate == plain(self.accelerator.devices, BATCH_SIZE):
            self.given = {"x": x, "y": y, "batch_size": BATCH_SIZE}
        else:
            self.given = {"x": self.data}
        self.steps = len(x) // BATCH_SIZE
        self.step_s = []
        begun = time.perf_counter()
        self.model.fit(**self.given, epochs=1, verbose=0)
        first = time.perf_counter() - begun
        self.epochs = 3 if first < 10 else 1
        self.turn(note=False)

    def turn(self, note=True):
        """Trains, and notes the least time of a step in an epoch."""
        times = []

        class Clock(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.begun = time.perf_counter()

            def on_epoch_end(self, epoch, logs=None):
                times.append(time.perf_counter() - self.begun)

        self.model.fit(**self.given, epochs=self.epochs, verbose=0, callbacks=[Clock()])
        least = min(times)
        self.epochs = int(min(max(SECONDS / least, 2), 100))
        if note:
            self.step_s.append(least / self.steps)
        else:
            self.first_step_s = least / self.steps


def measure(name, turns):
    """One row."""
    x, y = make_data(name, BATCH_SIZE)
    tuned = tfaccel.tune(
        lambda **options: build(name, **options), (x, y), BATCH_SIZE, epochs=EPOCHS, cache=False, verbose=0
    )
    running, failed = {}, {}
    for candidate in every_way(tfaccel.Devices.find()):
        try:
            trained = Trained(candidate, name, x, y)
        except Exception as error:
            failed[str(candidate)] = type(error).__name__
            continue
        running[candidate] = trained
        plain_one = next(iter(running.values()))
        if trained.first_step_s > 5 * plain_one.first_step_s:
            failed[str(candidate)] = f"{1e3 * trained.first_step_s:.3g} ms a step"
            del running[candidate]
    for _ in range(turns):
        for trained in running.values():
            trained.turn()
    step_ms = {candidate: 1e3 * statistics.median(trained.step_s) for candidate, trained in running.items()}
    best = min(step_ms, key=step_ms.get)
    return {
        "model": name,
        "chosen": str(tuned.chosen),
        "best": str(best),
        "of_best": round(step_ms[best] / step_ms[tuned.chosen], 3),
        "faster_than_plain": round(next(iter(step_ms.values())) / step_ms[tuned.chosen], 2),
        "tune_s": round(tuned.seconds, 1),
        "step_ms": {str(candidate): round(ms, 3) for candidate, ms in step_ms.items()},
        "left_out": failed,
    }


def main():
    """Prints a line for each model and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows.append(measure(name, options.turns))
        print_row(benchmark="tune_regret", **rows[-1])
    gains = [row["faster_than_plain"] for row in rows]
    print_row(
        benchmark="tune_regret",
        rows=len(rows),
        least_of_best=min(row["of_best"] for row in rows),
        least_faster_than_plain=min(gains),
        geometric_mean_faster_than_plain=round(statistics.geometric_mean(gains), 2),
        longest_tune_s=max(row["tune_s"] for row in rows),
    )


if __name__ == "__main__":
    keras.config.disable_interactive_logging()
    main()
