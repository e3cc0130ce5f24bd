"""Claim: what `tfaccel plan --workers` predicts for two workers is what two workers then take.

    python benchmarks/scaling_prediction.py --turns 3

Every process has one core of its own, so that two workers are twice the machine. The network is loopback:
its latency and bandwidth are read off all-reduces of 4 kB and 16 MB between two workers. Then each model's
step is measured with one worker, predicted for two (each with the same batch), and measured with two.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

from distribution_overhead import MODELS, build

from tfaccel import launch
from tfaccel.scaling import Network, gradient_bytes, predict_scaling

BATCH, STEPS, EPOCHS, TIMED = 128, 20, 10, 5
SMALL, LARGE, REPEATS = 4 << 10, 16 << 20, 20


def pin():
    """One core for each worker."""
    import tfaccel.cluster

    cluster = tfaccel.cluster.find_cluster(os.environ)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(cluster.index if cluster else 0) % len(cores)]})
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"


def measure_all_reduce():
    """Seconds of the sum of 4 kB and of 16 MB over two workers, medians."""
    pin()
    import tensorflow as tf

    import tfaccel

    strategy = tfaccel.Accelerator().strategy
    seconds = []
    for size in (SMALL, LARGE):
        values = tf.ones(size // 4)

        def on_replica(values=values):
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(values))

        function = tf.function(lambda run=on_replica: strategy.run(run))
        function()
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            strategy.experimental_local_results(function())[0].numpy()
            times.append(time.perf_counter() - begun)
        seconds.append(statistics.median(times))
    return seconds


def measure_fit(name, workers):
    """Milliseconds of a step, and the bytes of its gradients."""
    pin()
    import itertools

    import keras
    import numpy as np

    import tfaccel

    accelerator = tfaccel.Accelerator(jit=False)
    with accelerator.scope():
        shape, model = build(name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, **accelerator.compile_options())
    random = np.random.default_rng(0)
    samples = BATCH * STEPS * workers
    x = random.normal(size=(samples, *shape)).astype("float32")
    ends = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    model.fit(
        x,
        random.integers(0, 10, samples),
        batch_size=BATCH * workers,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[clock],
    )
    seconds = [after - before for before, after in itertools.pairwise(ends)][-TIMED:]
    return 1e3 * statistics.median(seconds) / STEPS, gradient_bytes(model)


def main():
    """Prints one line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    from _report import print_row, spread

    sums = [launch.run(measure_all_reduce, workers=2) for _ in range(options.turns)]
    small, large = (statistics.median(each) for each in zip(*sums, strict=True))
    # Two workers: 2 (latency + bytes / (2 · bandwidth)).
    bandwidth = (LARGE - SMALL) / (large - small)
    network = Network(bandwidth, max(0.0, small / 2 - SMALL / bandwidth / 2))
    for name in options.models:
        ratios, alone_ms, predicted_ms = [], [], []
        for _ in range(options.turns):
            step_ms, size = launch.run(measure_fit, [name, 1], workers=1)
            measured_ms, _ = launch.run(measure_fit, [name, 2], workers=2)
            (two,) = predict_scaling(step_ms, size, [2], network)
            alone_ms.append(step_ms)
            predicted_ms.append(two.step_ms)
            ratios.append(two.step_ms / measured_ms)
        print_row(
            benchmark="scaling_prediction",
            model=name,
            latency_us=round(1e6 * network.latency_s, 1),
            bandwidth_gb_per_s=round(bandwidth / 1e9, 2),
            one_worker_step_ms=round(statistics.median(alone_ms), 2),
            predicted_step_ms=round(statistics.median(predicted_ms), 2),
            predicted_over_measured=spread(ratios),
        )


if __name__ == "__main__":
    main()
