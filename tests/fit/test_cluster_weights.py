"""Clustering: the groups against numpy and tfmot, held in every kind of step, gone at the end."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit, fit_under, kernels

import tfaccel
from tfaccel.fit._clusters import first_centroids, group_means, kmeans, member_counts, nearest

# 1. Pure functions.


def test_linear_and_density_starts_by_hand():
    values = np.random.default_rng(0).normal(size=1000).astype("float32")
    linear = first_centroids(values, 5, "linear")
    np.testing.assert_allclose(linear, values.min() + np.arange(5) / 4 * np.ptp(values), rtol=1e-5)
    density = first_centroids(values, 5, "density")
    np.testing.assert_allclose(density, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-5)


def test_kmeans_ends_where_lloyd_does():
    rng = np.random.default_rng(0)
    values = rng.normal(size=500).astype("float32")
    start = np.sort(rng.choice(values, 6, replace=False))
    by_hand = start.astype("float64")
    for _ in range(100):
        groups = np.abs(values[:, None] - by_hand).argmin(1)
        by_hand = np.array([values[groups == g].astype("float64").mean() for g in range(6)])
    np.testing.assert_allclose(kmeans(values, start), by_hand, rtol=1e-5)


def test_kmeans_plus_plus_leaves_less_than_the_other_starts():
    values = np.random.default_rng(0).standard_t(3, size=5000).astype("float32")

    def error(initialization):
        centroids = first_centroids(values, 16, initialization)
        return float(np.mean(np.abs(values[:, None] - centroids).min(1) ** 2))

    assert error("kmeans++") < min(error("linear"), error("density"))


def test_few_different_values_are_their_own_clusters():
    values = np.array([1, 2, 2, 3], "float32")
    np.testing.assert_array_equal(first_centroids(values, 16, "kmeans++"), [1, 2, 3])


@pytest.mark.parametrize("jit", [False, True])
def test_nearest_and_means_by_hand(jit):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50)).astype("float32")
    centroids = np.sort(rng.normal(size=(3, 4)).astype("float32"), axis=1)
    counted = (rng.random((3, 50)) > 0.3).astype("float32")

    @tf.function(jit_compile=jit)
    def both(values, centroids, counted):
        groups = nearest(values, centroids)
        counts = member_counts(groups, counted, centroids.shape)
        return groups, group_means(values * counted, groups, counts, centroids)

    groups, means = (part.numpy() for part in both(*map(tf.constant, (values, centroids, counted))))
    expected = np.abs(values[:, :, None] - centroids[:, None]).argmin(2)
    np.testing.assert_array_equal(groups - np.arange(3)[:, None] * 4, expected)
    for channel in range(3):
        for cluster in range(4):
            members = values[channel][(expected[channel] == cluster) & (counted[channel] == 1)]
            mean = members.mean() if len(members) else centroids[channel, cluster]
            assert means[channel, cluster] == pytest.approx(mean, abs=1e-6)  # 50 float32 additions


# 2. What a step does, by hand; strength zero.


def test_a_step_is_what_numpy_says():
    """SGD on one dense layer: members move by their own gradients, the cluster by their mean."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6)).astype("float32"), rng.normal(size=(64, 3)).astype("float32")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, use_bias=False)])
    start = rng.normal(size=(6, 3)).astype("float32")
    model.set_weights([start])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    cluster = tfaccel.ClusterWeights(4, initialization="linear")
    model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0, callbacks=[cluster])

    centroids = np.linspace(start.min(), start.max(), 4)
    latent = start.astype("float64")
    groups = np.abs(latent[..., None] - centroids).argmin(-1)
    weights = np.array([latent[groups == g].mean() for g in range(4)])[groups]
    for step in range(4):  # regrouped behind each of the four
        rows = slice(16 * step, 16 * step + 16)
        gradient = 2 * x[rows].T @ (x[rows] @ weights - y[rows]) / (16 * 3)
        latent = latent - 0.1 * gradient
        middles = np.unique(weights)
        groups = np.abs(latent[..., None] - middles).argmin(-1)
        weights = np.array([latent[groups == g].mean() for g in range(len(middles))])[groups]
    assert len(np.unique(weights)) == 4
    np.testing.assert_allclose(kernels(model)[0], weights, atol=1e-6)


def test_no_layers_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small)
    actual, history = fit(helpers, small, [tfaccel.ClusterWeights(layers={keras.layers.Layer: 0})])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "clusters" not in history


def test_clustered_weights_that_do_not_move_stay_bit_identical(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.ClusterWeights(8)])
    before = kernels(model)
    model.compile(keras.optimizers.SGD(0.0), model.loss)
    model.fit(*small, verbose=0, callbacks=[tfaccel.ClusterWeights(8)])
    for a, b in zip(kernels(model), before, strict=True):
        # The mean of equal float32 values, summed in float32, may round.
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_two_clusters_are_the_extreme(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.ClusterWeights(2, layers=keras.layers.Layer)])
    assert [len(np.unique(k)) for k in kernels(model)] == [2, 2]


# 3. tfmot as the oracle.


def test_starts_and_groups_are_tfmots(twins):
    values = twins["clusters/values"]
    np.testing.assert_allclose(first_centroids(values, 8, "linear"), twins["clusters/linear"], rtol=1e-6)
    groups = nearest(tf.constant(values[None]), tf.constant(twins["clusters/linear"][None]))
    np.testing.assert_array_equal(groups[0], twins["clusters/groups"])


# 4. Every kind of step.

AXES = [
    ("float32", False, 1, None, "sequential", {}),
    ("float32", True, 4, 2, "subclassed", {"scope": "channel"}),
    ("mixed_bfloat16", False, 4, None, "functional", {"initialization": "linear"}),
    ("mixed_bfloat16", True, 1, 2, "sequential", {"begin_epoch": 1}),
    ("mixed_float16", False, 1, 2, "functional", {"scope": "channel"}),
    ("mixed_float16", True, 4, None, "sequential", {"initialization": "density"}),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "arguments"), AXES)
def test_clusters_in_every_kind_of_step(helpers, small, policy, jit, steps, accumulation, kind, arguments):
    keras.config.set_dtype_policy(policy)
    adam = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=accumulation)
    cluster = tfaccel.ClusterWeights(8, **arguments)
    model, history = fit(helpers, small, [cluster], adam, kind, jit_compile=jit, steps_per_execution=steps)
    keras.config.set_dtype_policy("float32")
    head = kernels(model)[1]
    counts = [len(np.unique(column)) for column in head.T] if "scope" in arguments else [len(np.unique(head))]
    assert max(counts) == 8
    assert np.isfinite(history["loss"]).all()
    assert all(v.constraint is None for v in model.trainable_variables)


def test_all_roads_share_the_same_values(helpers, small):
    accelerator = tfaccel.Accelerator("one_device", "float32", False, "fused", steps_per_execution=4)
    with accelerator.scope():
        fused = helpers.compile(helpers.build(), **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    fused.fit(data, epochs=2, verbose=0, callbacks=[tfaccel.ClusterWeights(8)])
    roads = [{"steps_per_execution": 4}, {"jit_compile": True}, {"run_eagerly": True}]
    expected = kernels(fit(helpers, small, [tfaccel.ClusterWeights(8)])[0])
    results = [kernels(fit(helpers, small, [tfaccel.ClusterWeights(8)], **road)[0]) for road in roads]
    for result in [kernels(fused), *results]:
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)  # 20 steps of Adam at 1e-3, sums in other orders


@pytest.mark.parametrize("scope", ["layer", "channel"])
def test_two_replicas_share_what_one_device_does(helpers, small, scope):
    def run(strategy):
        return kernels(fit_under(strategy, helpers, small, tfaccel.ClusterWeights(8, scope=scope)))

    one = run("one_device")
    two = run(mirrored(2))
    for a, b in zip(two, one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order, 20 steps


# 5. Again, after, interrupted; with other techniques.


def test_fit_twice_after_and_interrupted(helpers, small):
    cluster = tfaccel.ClusterWeights(8)
    model, history = fit(helpers, small, [cluster])
    assert history["clusters"] == [8, 8]
    assert [row.clusters for row in cluster.report.rows if not row.skipped] == [8]
    model.fit(*small, batch_size=24, verbose=0, callbacks=[cluster])
    assert len(np.unique(kernels(model)[1])) == 8
    model.fit(*small, batch_size=24, verbose=0)
    assert len(np.unique(kernels(model)[1])) > 100
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, batch_size=24, verbose=0, callbacks=[cluster, Interrupt()])
    assert len(np.unique(kernels(model)[1])) == 8
    model.fit(*small, batch_size=24, verbose=0)
    assert len(np.unique(kernels(model)[1])) > 100
    assert all(v.constraint is None for v in model.trainable_variables)


def test_pruned_zeros_stay(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.PruneWeights(0.7)])
    zeros = kernels(model)[1] == 0
    model.fit(*small, batch_size=24, epochs=2, verbose=0, callbacks=[tfaccel.ClusterWeights(8)])
    head = kernels(model)[1]
    np.testing.assert_array_equal(head == 0, zeros)
    assert len(np.unique(head)) == 8
    model.fit(
        *small, batch_size=24, verbose=0, callbacks=[tfaccel.ClusterWeights(8, preserve_sparsity=False)]
    )
    assert (kernels(model)[1] == 0).mean() < 0.3


def test_pruned_and_clustered_in_one_fit(helpers, small):
    both = [tfaccel.PruneWeights(0.7), tfaccel.ClusterWeights(8)]
    model, history = fit(helpers, small, both, epochs=4, steps_per_execution=4)
    head = kernels(model)[1]
    assert (head == 0).mean() == pytest.approx(0.7, abs=2e-3)
    assert 4 <= len(np.unique(head)) <= 8
    assert history["loss"][-1] < history["loss"][0]
    with pytest.raises(ValueError, match="PruneWeights first"):
        fit(helpers, small, both[::-1])


def test_moving_averages_are_clustered_at_the_end(helpers, small):
    adam = keras.optimizers.Adam(1e-2, use_ema=True)
    model, _ = fit(helpers, small, [tfaccel.ClusterWeights(8)], adam)
    assert len(np.unique(kernels(model)[1])) <= 8


def test_the_saved_file_loads(helpers, small, tmp_path):
    model, _ = fit(helpers, small, [tfaccel.ClusterWeights(8)])
    model.save(tmp_path / "clustered.keras")
    loaded = keras.models.load_model(tmp_path / "clustered.keras")
    np.testing.assert_array_equal(kernels(loaded)[1], kernels(model)[1])


# 6. What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 1}, "2 to 65,536"),
        ({"num_clusters": 16.0}, "2 to 65,536"),
        ({"initialization": "random"}, "kmeans"),
        ({"scope": "global"}, "'layer' or 'channel'"),
        ({"begin_epoch": -1}, "an integer ≥ 0"),
        ({"layers": {"head": 1}}, "2 to 65,536"),
        ({"layers": 5}, "a layer's name"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.ClusterWeights(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 40, "layers": keras.layers.Conv2D}, "at most the 36 weights"),
        ({"begin_epoch": 2}, "an epoch of this fit, 0 to 1"),
        ({"layers": "nothing"}, "what matches one of"),
    ],
)
def test_what_fit_refuses_before_its_first_step(helpers, small, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(helpers, small, [tfaccel.ClusterWeights(**arguments)])


def test_a_layer_of_zeros_cannot_be_clustered(helpers, small):
    model = helpers.compile(helpers.build())
    model.layers[-1].kernel.assign(np.zeros((100, 10)))
    with pytest.raises(ValueError, match="all zero"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.ClusterWeights(8)])
