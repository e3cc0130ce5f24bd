"""The same training twice: tf_keras with tfmot, and Keras 3 with tfaccel. Run as a script, beside the tests.

tfmot sets TF_USE_LEGACY_KERAS for the whole process, so the tests run it in one of its own.
Writes the kernels of both behind the last step, as `CASE/tfmot/INDEX` and `CASE/tfaccel/INDEX`; what the
schedules say at each step; tfmot's clusters, and its ranges of activations.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from tfaccel import PruneWeights, PruningSchedule
from tfaccel.fit.sparsity_schedule import plan

STEPS, BATCH = 12, 16


def import_tfmot():
    import tensorflow_model_optimization as tfmot

    return tfmot.sparsity.keras


def dense(host):
    layers = [host.layers.Dense(12, activation="relu"), host.layers.Dense(8), host.layers.Dense(3)]
    return host.Sequential([host.layers.Flatten(), *layers])


def convolution(host):
    layers = host.layers
    return host.Sequential([layers.Conv2D(8, 3, activation="relu"), layers.Flatten(), layers.Dense(3)])


def cases(sparsity):
    """Name → model, tfmot's arguments, our callback."""
    ramp = sparsity.PolynomialDecay(0.1, 0.8, begin_step=2, end_step=10, frequency=2)
    constant = sparsity.ConstantSparsity(0.6, begin_step=3, end_step=-1, frequency=4)
    own_ramp = PruningSchedule(begin=1 / 12, end=9 / 12, frequency=2 / 12, initial_sparsity=0.1)
    once = PruningSchedule("one_shot")  # tfmot makes its m:n masks at its step 1, and only there
    everything = keras.layers.Layer  # also the first and the last
    return {
        "ramp": (dense, {"pruning_schedule": ramp}, PruneWeights(schedule=ramp, layers=everything)),
        "own_ramp": (
            dense,
            {"pruning_schedule": ramp},
            PruneWeights(0.8, schedule=own_ramp, layers=everything),
        ),
        "constant": (
            convolution,
            {"pruning_schedule": constant},
            PruneWeights(schedule=constant, layers=everything),
        ),
        "2:4": (
            convolution,
            {"pruning_schedule": constant, "sparsity_m_by_n": (2, 4)},
            PruneWeights(pattern="2:4", schedule=once, layers=everything),
        ),
        "blocks": (
            dense,
            {"pruning_schedule": ramp, "block_size": (4, 2)},
            PruneWeights(schedule=ramp, pattern="4x2", layers=everything),
        ),
    }


def train(host, model, x, y, start, callbacks):
    """The kernels behind the last step."""
    loss = host.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(host.optimizers.SGD(0.5, momentum=0.9), loss)
    names = kernels(model, x)
    for variable, value in zip(names, start, strict=True):
        variable.assign(value)
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    return [np.array(v) for v in names]


def kernels(model, x):
    model(x[:1])
    return [v for v in model.trainable_variables if len(v.shape) > 1]


def schedules(sparsity):
    """What the schedules say at each step: whether a mask is due, and the sparsity."""
    theirs = sparsity.PolynomialDecay(0.1, 0.8, begin_step=2, end_step=10, frequency=2)
    steps = [tf.constant(step, tf.int64) for step in range(STEPS)]
    own = plan(PruningSchedule(begin=1 / 12, end=9 / 12, frequency=2 / 12), STEPS, 1)
    return {
        "schedule/tfmot": [[float(each) for each in theirs(step + 1)] for step in steps],
        "schedule/tfaccel": [
            [float(own.is_due(step)), 0.8 + (0.1 - 0.8) * (1 - float(own.progress(step)))] for step in steps
        ],
    }


def clusters(rng):
    """tfmot's first centroids, and which of them each weight belongs to."""
    from tensorflow_model_optimization.python.core.clustering.keras import clustering_algorithm
    from tensorflow_model_optimization.python.core.clustering.keras import clustering_centroids as starts

    values = rng.normal(size=400).astype("float32")
    linear = starts.LinearCentroidsInitialisation(tf.constant(values), 8).get_cluster_centroids()
    algorithm = clustering_algorithm.ClusteringAlgorithm(tf.Variable(linear), "GradientAggregation.SUM")
    groups = algorithm.get_pulling_indices(tf.constant(values))
    return {
        "clusters/values": values,
        "clusters/linear": linear.numpy(),
        "clusters/groups": groups.numpy(),
    }


def activations(rng):
    """What tfmot's moving average makes of batches, from the range of the first one on."""
    from tensorflow_model_optimization.python.core.quantization.keras import quant_ops

    batches = rng.normal(0.5, 1, size=(6, 16, 5)).astype("float32")
    low, high = tf.Variable(batches[0].min()), tf.Variable(batches[0].max())
    rounded = [
        quant_ops.MovingAvgQuantize(
            tf.constant(batch), low, high, ema_decay=0.99, num_bits=8, is_training=True
        ).numpy()
        for batch in batches
    ]
    return {
        "activations/batches": batches,
        "activations/rounded": np.stack(rounded),
        "activations/range": np.array([low.numpy(), high.numpy()]),
    }


def main(path):
    sparsity = import_tfmot()
    import tf_keras

    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, 6, 6, 4)).astype("float32")
    y = rng.integers(0, 3, len(x))
    found = {}
    for name, (build, theirs, ours) in cases(sparsity).items():
        model = build(keras)
        start = [rng.normal(0, 0.2, v.shape).astype("float32") for v in kernels(model, x)]
        twin = build(tf_keras)
        twin.build(x.shape)
        pruned = sparsity.prune_low_magnitude(twin, **theirs)
        found[f"{name}/tfaccel"] = train(keras, model, x, y, start, [ours])
        found[f"{name}/tfmot"] = train(tf_keras, pruned, x, y, start, [sparsity.UpdatePruningStep()])
    found |= schedules(sparsity)
    single = clusters(rng) | activations(rng)
    np.savez(
        path, **single, **{f"{key}/{i}": v for key, values in found.items() for i, v in enumerate(values)}
    )


if __name__ == "__main__":
    main(sys.argv[1])
