"""Claim: on a CPU, whether mixed precision pays depends on the network: why `Accelerator()` takes float32
there, and `tune` measures.

    python benchmarks/half_precision.py --turns 7

The networks of `time_to_accuracy.py`, trained by `Accelerator(precision=...)` with the chosen kernels; the
precisions take turns in one process. A figure is the ratio of step times to float32 within one turn.
"""

import argparse
import time

import keras
from _report import print_row, spread
from time_to_accuracy import BUILDERS, SETTINGS, samples_of

import tfaccel

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
STEPS = 32


def main() -> None:
    """Prints one line a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES[:2]), choices=POLICIES)
    options = parser.parse_args()
    for name, settings in SETTINGS.items():
        data, batch_size = samples_of(name), settings["batch_size"]
        x, y = (data[f"{part}_train"][: STEPS * batch_size] for part in "xy")
        fits, seconds = {}, {policy: [] for policy in options.policies}
        for policy in options.policies:
            accelerator = tfaccel.Accelerator(precision=policy)
            with accelerator.scope():
                model = BUILDERS[name]()
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile("adam", loss, **accelerator.compile_options())
            fits[policy] = model, accelerator.dataset(x, y, batch_size=batch_size)
            model.fit(fits[policy][1], verbose=0)
        for _ in range(options.turns):
            for policy, (model, dataset) in fits.items():
                started = time.perf_counter()
                model.fit(dataset, verbose=0)
                seconds[policy].append(time.perf_counter() - started)
        for policy in options.policies:
            ratios = [a / b for a, b in zip(seconds[policy], seconds["float32"], strict=True)]
            print_row(benchmark="half_precision", data=name, policy=policy, against_float32=spread(ratios))


if __name__ == "__main__":
    main()
