"""Pruning: the masks against numpy and against tfmot, held in every kind of step, gone at the end."""

import functools
import json
import zipfile

import keras
import numpy as np
import pytest
import small_fits
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit_under, kernels

import tfaccel
from tfaccel.fit import _masks as masks
from tfaccel.fit._pruning import parse_pattern
from tfaccel.fit.sparsity_schedule import is_mask_step, plan, polynomial_progress

fit = functools.partial(small_fits.fit, epochs=3)


def sparsity_of(value):
    return float((np.asarray(value) == 0).mean())


# 1. Pure functions.


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_keep_largest_is_a_sort(seed, jit):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(size=shape).astype("float32") for shape in [(3, 5), (7,), (2, 2, 2)]]
    scores[0][0, :3] = scores[1][:3] = 0.25  # equal ones: the first stay
    flat = np.concatenate([s.ravel() for s in scores])
    function = tf.function(masks.keep_largest, jit_compile=jit)
    checked = 0
    for kept in range(1, len(flat) + 1):
        chosen = np.zeros(len(flat), bool)
        chosen[np.argsort(-flat, kind="stable")[:kept]] = True
        made = function([tf.constant(s) for s in scores], tf.constant(kept))
        np.testing.assert_array_equal(np.concatenate([m.numpy().ravel() for m in made]), chosen)
        checked += 1
    assert checked == 30


@pytest.mark.parametrize("value", [0.0, 1e-45, -3.4e38, 3.4e38])
def test_keep_largest_of_extremes(value):
    scores = tf.constant([value, 1.0, -1.0, value], tf.float32)
    assert int(tf.reduce_sum(tf.cast(masks.keep_largest([scores], tf.constant(3))[0], tf.int32))) == 3


@pytest.mark.parametrize(("zeros", "size"), [(2, 4), (1, 4), (3, 4), (1, 2), (3, 5)])
def test_groups_lose_their_smallest(zeros, size):
    scores = np.random.default_rng(0).random((2, 10, 3)).astype("float32")
    made = masks.keep_of_groups(tf.constant(scores), tf.constant(zeros), size).numpy()
    for p in range(2):
        for c in range(3):
            for start in range(0, 10, size):
                group = scores[p, start : start + size, c]
                missing = size - len(group)  # those that the last group lacks go first
                gone = np.argsort(group)[: max(zeros - missing, 0)]
                expected = np.ones(len(group), bool)
                expected[gone] = False
                np.testing.assert_array_equal(made[p, start : start + size, c], expected)


def test_blocks_are_means():
    scores = np.random.default_rng(0).random((1, 5, 4)).astype("float32")
    made = masks.block_scores(tf.constant(scores), 2, 3).numpy()
    expected = [[scores[0, i : i + 2, j : j + 3].mean() for j in (0, 3)] for i in (0, 2, 4)]
    np.testing.assert_allclose(made[0], expected, rtol=1e-6)  # six float32 additions
    spread = masks.spread_blocks(tf.constant(made > 0.5), 2, 3, 5, 4)
    assert spread.shape == (1, 5, 4)


def test_the_schedule_by_hand():
    steps = range(13)
    progress = [float(polynomial_progress(s, 2, 10, 3.0)) for s in steps]
    by_hand = [1 - (1 - min(max((s - 2) / 8, 0), 1)) ** 3 for s in steps]
    np.testing.assert_allclose(progress, by_hand, atol=1e-6)
    assert [s for s in steps if is_mask_step(s, 2, 10, 3)] == [2, 5, 8, 10]


# 2. tfmot as the oracle.


@pytest.mark.parametrize("case", ["ramp", "own_ramp", "constant", "2:4", "blocks"])
def test_prunes_what_tfmot_prunes(twins, case):
    pairs = [
        (twins[f"{case}/tfmot/{i}"], twins[f"{case}/tfaccel/{i}"])
        for i in range(3)
        if f"{case}/tfmot/{i}" in twins
    ]
    assert len(pairs) >= 2
    for theirs, ours in pairs:
        assert 0.4 < sparsity_of(ours) < 0.9
        np.testing.assert_array_equal(ours == 0, theirs == 0)
        # The same float32 operations in two Kerases; 12 steps at a rate of 0.5.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_schedule_is_tfmots_step_by_step(twins):
    theirs = np.array([twins[f"schedule/tfmot/{i}"] for i in range(12)])
    ours = np.array([twins[f"schedule/tfaccel/{i}"] for i in range(12)])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


# 3. Strength zero and the extreme.


def test_zero_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small)
    actual, history = fit(helpers, small, [tfaccel.PruneWeights(0.0)])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "sparsity" not in history


def test_a_threshold_of_zero_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small)
    actual, _ = fit(helpers, small, [tfaccel.PruneWeights(threshold=0.0)])
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nearly_everything_leaves_one_weight(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.PruneWeights(0.9999, layers=keras.layers.Conv2D)])
    assert np.count_nonzero(kernels(model)[0]) == 1


# 4. Every kind of step.

AXES = [
    # policy, jit, steps, accumulation, kind, arguments
    ("float32", False, 1, None, "sequential", {"sparsity": 0.8}),
    ("float32", True, 4, 2, "subclassed", {"sparsity": 0.8, "scope": "global"}),
    ("mixed_bfloat16", False, 4, None, "functional", {"pattern": "2:4"}),
    ("mixed_bfloat16", True, 1, 2, "sequential", {"sparsity": 0.5, "pattern": "4x2"}),
    ("mixed_float16", False, 1, 2, "functional", {"sparsity": 0.8, "importance": "movement"}),
    ("mixed_float16", False, 4, None, "sequential", {"sparsity": 0.8, "importance": "gradient"}),
    ("float32", False, 4, 2, "functional", {"sparsity": 0.8, "schedule": "one_shot"}),
    ("mixed_float16", True, 4, None, "subclassed", {"threshold": 0.05}),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "arguments"), AXES)
def test_reaches_its_target_in_every_kind_of_step(
    helpers, small, policy, jit, steps, accumulation, kind, arguments
):
    keras.config.set_dtype_policy(policy)
    adam = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation)
    # A convolution of one channel has no four inputs.
    layers = keras.layers.Dense if "2:4" in arguments.values() else keras.layers.Layer
    prune = tfaccel.PruneWeights(**arguments, layers=layers)
    model, history = fit(helpers, small, [prune], adam, kind, jit_compile=jit, steps_per_execution=steps)
    keras.config.set_dtype_policy("float32")
    target = arguments.get("sparsity", 0.5)
    if "threshold" in arguments:
        assert all((np.abs(k)[k != 0] >= 0).all() and 0.05 < sparsity_of(k) < 0.9 for k in kernels(model))
    elif arguments.get("scope") == "global":
        assert history["sparsity"][-1] == pytest.approx(target, abs=1e-3)
    else:
        # Of 36 and 1,000 weights: rounding to whole weights, and to whole blocks at the edges.
        edge = 0.12 if "x" in arguments.get("pattern", "") else 0.02
        chosen = kernels(model)[-1:] if layers is keras.layers.Dense else kernels(model)
        assert [sparsity_of(k) for k in chosen] == pytest.approx([target] * len(chosen), abs=edge)
    assert np.isfinite(history["loss"]).all()
    assert all(v.constraint is None for v in model.trainable_variables)


def test_all_roads_prune_the_same_weights(helpers, small):
    """Steps per execution, XLA and the data's kind change nothing about which weights go."""
    x, y = small
    batches = [(x[i : i + 24], y[i : i + 24]) for i in range(0, 240, 24)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    dataset = tf.data.Dataset.from_tensor_slices(small).batch(24)
    roads = [
        {},
        {"steps_per_execution": 4},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"data": dataset},
        {"data": Batches()},
    ]
    results = [kernels(fit(helpers, small, [tfaccel.PruneWeights(0.7)], **road)[0]) for road in roads]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(a == 0, b == 0)
            np.testing.assert_allclose(a, b, atol=1e-5)  # XLA's sums, 30 steps of Adam at 1e-3


@pytest.mark.parametrize("kernels_choice", ["plain", "fused"])
def test_the_accelerators_own_loop_prunes_the_same_weights(helpers, small, kernels_choice):
    expected = kernels(fit(helpers, small, [tfaccel.PruneWeights(0.7)])[0])
    accelerator = tfaccel.Accelerator("one_device", "float32", False, kernels_choice, steps_per_execution=4)
    with accelerator.scope():
        model = helpers.compile(helpers.build(), **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24, shuffle=False)
    model.fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[tfaccel.PruneWeights(0.7)])
    for a, b in zip(kernels(model), expected, strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)


@pytest.mark.parametrize("arguments", [{}, {"scope": "global"}, {"importance": "movement"}])
def test_two_replicas_prune_what_one_device_does(helpers, small, arguments):
    def run(strategy):
        return kernels(fit_under(strategy, helpers, small, tfaccel.PruneWeights(0.7, **arguments), epochs=3))

    one = run("one_device")
    two = run(mirrored(2))
    for a, b in zip(two, one, strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, atol=1e-5)  # sums in another order, 30 steps


# 5. Again, after, and interrupted.


def test_fit_twice_and_plain_fit_behind(helpers, small):
    prune = tfaccel.PruneWeights(0.7)
    model, _ = fit(helpers, small, [prune])
    first = kernels(model)[1]
    history = model.fit(*small, batch_size=24, epochs=3, shuffle=False, verbose=0, callbacks=[prune])
    assert min(history.history["sparsity"]) == pytest.approx(0.7, abs=1e-3), "what was pruned stays so"
    assert sparsity_of(first) == pytest.approx(0.7, abs=1e-3)
    model.fit(*small, batch_size=24, verbose=0)
    assert sparsity_of(kernels(model)[1]) < 0.5, "a plain fit moves all weights"


def test_an_interrupted_fit_leaves_a_plain_model(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(KeyboardInterrupt):
        model.fit(
            *small, batch_size=24, epochs=3, verbose=0, callbacks=[tfaccel.PruneWeights(0.7), Interrupt(1)]
        )
    model.fit(*small, batch_size=24, verbose=0)
    assert sparsity_of(kernels(model)[1]) < 0.4, "only those stay zero whose inputs are"
    assert all(v.constraint is None for v in model.trainable_variables)


def test_a_resumed_run_prunes_what_an_undisturbed_one_does(helpers, small, tmp_path):
    arguments = {"batch_size": 24, "epochs": 4, "shuffle": False, "verbose": 0}
    expected = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    expected.fit(*small, **arguments, callbacks=[tfaccel.PruneWeights(0.7)])

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, **arguments, callbacks=[tfaccel.PruneWeights(0.7), backup(), Interrupt(1)])
    again = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    again.fit(*small, **arguments, callbacks=[tfaccel.PruneWeights(0.7), backup()])
    for a, b in zip(kernels(again), kernels(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moving_averages_end_with_their_zeros(helpers, small):
    model, _ = fit(helpers, small, [tfaccel.PruneWeights(0.7)], keras.optimizers.Adam(1e-2, use_ema=True))
    assert sparsity_of(kernels(model)[1]) == pytest.approx(0.7, abs=1e-3)


# 6. A plain model.


def test_the_saved_file_knows_nothing_of_tfaccel(helpers, small, tmp_path):
    model, _ = fit(helpers, small, [tfaccel.PruneWeights(0.7)])
    model.save(tmp_path / "pruned.keras")
    with zipfile.ZipFile(tmp_path / "pruned.keras") as archive:
        config = archive.read("config.json").decode()
    assert "tfaccel" not in config
    assert json.loads(config)["class_name"] == "Sequential"
    loaded = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(kernels(loaded)[1], kernels(model)[1])


def test_logs_and_report(helpers, small, tmp_path):
    prune = tfaccel.PruneWeights(0.8)
    _, history = fit(helpers, small, [prune, keras.callbacks.CSVLogger(tmp_path / "log.csv")])
    assert history["sparsity"] == sorted(history["sparsity"])
    assert "sparsity" in (tmp_path / "log.csv").read_text()
    rows = {row.weight.split("/", 1)[1]: row for row in prune.report.rows}
    assert [row.skipped for row in prune.report.rows] == [
        "first layer",
        "bias or vector",
        "",
        "bias or vector",
    ]
    dense = next(row for name, row in rows.items() if name.startswith("dense") and name.endswith("kernel"))
    assert dense.sparsity == pytest.approx(0.8, abs=1e-3)
    assert dense.compressed_bytes < 0.4 * dense.size_bytes
    assert dense.clusters == 201
    assert dense.bits == 8
    assert "left alone" in str(prune.report)
    assert prune.report.plot(tmp_path / "report.png").stat().st_size > 5000


# 7. What is pruned, and what is refused.


def layered():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            layers.Embedding(20, 8),
            layers.Bidirectional(layers.GRU(8, return_sequences=True)),
            layers.LayerNormalization(),
            layers.SeparableConv1D(16, 3),
            layers.Dense(16, name="middle"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, name="head"),
        ]
    )


def test_what_is_left_alone_and_why(small):
    model = layered()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    prune = tfaccel.PruneWeights(0.5)
    x = np.random.default_rng(0).integers(0, 20, (64, 12))
    model.fit(x, x[:, 0] % 3, epochs=1, verbose=0, callbacks=[prune])
    reasons = {row.weight.split("/", 1)[1]: row.skipped for row in prune.report.rows}
    by_reason = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name.split("/")[-1])
    assert set(by_reason) == {"embedding", "", "bias or vector", "normalization", "depthwise", "last layer"}
    assert by_reason[""] == ["kernel", "recurrent_kernel"] * 2 + ["pointwise_kernel", "kernel"]
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) for row in prune.report.rows if not row.skipped)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("head", {"head"}),
        (["middle", "head"], {"middle", "head"}),
        (keras.layers.Bidirectional, {"bidirectional"}),
        (lambda layer: layer.name.startswith("mid"), {"middle"}),
        ({"middle": 0.0, keras.layers.Bidirectional: 0.0}, {"separable_conv1d"}),
    ],
)
def test_layers_are_chosen_by_name_class_or_function(layers, expected):
    model = layered()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).integers(0, 20, (32, 12))
    model.fit(x, x[:, 0] % 3, epochs=1, verbose=0, callbacks=[tfaccel.PruneWeights(0.5, layers=layers)])
    sparse = {
        layer.name.rstrip("_0123456789")
        for layer in model.layers
        if any(sparsity_of(w) > 0.2 for w in layer.get_weights() if w.ndim > 1)
    }
    assert sparse == expected


def test_patterns_run_along_the_inputs_of_a_layer():
    layers = keras.layers
    inputs = keras.Input((6, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(inputs, layers.Conv1DTranspose(4, 2)(attention(inputs, inputs)))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).random((32, 6, 8)).astype("float32")
    prune = tfaccel.PruneWeights(pattern="2:4", layers=keras.layers.Layer)
    model.fit(x, np.zeros((32, 7, 4)), epochs=2, verbose=0, callbacks=[prune])
    query = np.asarray(next(v for v in model.weights if "query/kernel" in v.path))  # (inputs, heads, key)
    output = np.asarray(next(v for v in model.weights if "attention_output/kernel" in v.path))
    transposed = np.asarray(model.layers[-1].kernel)  # (width, outputs, inputs)
    grouped = [
        query.reshape(2, 4, -1),
        output.reshape(2, 4, -1),
        transposed.transpose(2, 0, 1).reshape(2, 4, -1),
    ]
    for groups in grouped:
        np.testing.assert_array_equal((groups == 0).sum(1), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of sparsity="),
        ({"sparsity": 1.0}, "0 ≤ sparsity < 1"),
        ({"sparsity": -0.1}, "0 ≤ sparsity < 1"),
        ({"sparsity": float("nan")}, "0 ≤ sparsity < 1"),
        ({"sparsity": "half"}, "0 ≤ sparsity < 1"),
        ({"sparsity": 0.5, "threshold": 0.1}, "one of sparsity="),
        ({"threshold": -1}, "a number ≥ 0"),
        ({"pattern": "4:4"}, "0 < m < n"),
        ({"pattern": "4-2"}, "m zeros of n"),
        ({"sparsity": 0.5, "pattern": "1x1"}, "two weights or more"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "one of sparsity="),
        ({"sparsity": 0.5, "scope": "model"}, "'layer' or 'global'"),
        ({"pattern": "2:4", "scope": "global"}, "no choice between layers"),
        ({"sparsity": 0.5, "importance": "luck"}, "'magnitude'"),
        ({"sparsity": 0.5, "schedule": "cubic"}, "'polynomial'"),
        ({"sparsity": 0.5, "layers": 3}, "a layer's name"),
        ({"sparsity": 0.5, "layers": []}, "at least one layer"),
        ({"sparsity": 0.5, "layers": {"head": 2}}, "0 ≤ sparsity < 1"),
        ({"sparsity": 0.5, "layers": {"head": 0.2}, "scope": "global"}, "a list of layers"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.PruneWeights(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": -1}, "a number ≥ 0"),
        ({"begin": 0.8, "end": 0.2}, "≥ begin"),
        ({"end": 5}, "unit='epochs'"),
        ({"kind": "cubic"}, "'polynomial'"),
        ({"unit": "steps"}, "'run' or 'epochs'"),
        ({"initial_sparsity": 1.0}, "0 ≤ … < 1"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.PruningSchedule(**arguments)


def test_a_schedule_that_ends_behind_the_run(helpers, small):
    late = tfaccel.PruningSchedule(end=5, unit="epochs")
    with pytest.raises(ValueError, match="Train longer, or end earlier"):
        fit(helpers, small, [tfaccel.PruneWeights(0.5, schedule=late)])


class Tfmots:
    """What tfmot's schedules look like."""

    end_step = 1000

    def __call__(self, step):
        return tf.constant(True), tf.constant(0.5)


def test_a_schedule_object_that_ends_behind_the_run(helpers, small):
    with pytest.raises(ValueError, match="this one ends at 1000"):
        fit(helpers, small, [tfaccel.PruneWeights(schedule=Tfmots())])


def test_models_that_cannot_be_pruned(helpers, small):
    x, y = small
    prune = tfaccel.PruneWeights(0.5, layers="nothing")
    with pytest.raises(ValueError, match="what matches one of conv2d"):
        fit(helpers, small, [prune])
    frozen = helpers.build()
    frozen.layers[-1].trainable = False
    helpers.compile(frozen)
    with pytest.raises(ValueError, match="trainable = True"):
        frozen.fit(x, y, verbose=0, callbacks=[tfaccel.PruneWeights(0.5, layers=keras.layers.Dense)])
    broken = helpers.compile(helpers.build())
    broken.layers[-1].kernel.assign(np.full((100, 10), np.nan))
    with pytest.raises(ValueError, match="aren't finite"):
        broken.fit(x, y, verbose=0, callbacks=[tfaccel.PruneWeights(0.5)])
    norms = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization()])
    norms.compile("sgd", "mse")
    with pytest.raises(ValueError, match="no weights to prune"):
        norms.fit(np.ones((8, 4)), np.ones((8, 4)), verbose=0, callbacks=[tfaccel.PruneWeights(0.5)])
    depthwise = keras.Sequential([keras.Input((6, 6, 4)), keras.layers.DepthwiseConv2D(3)])
    depthwise.compile("sgd", "mse")
    pattern = tfaccel.PruneWeights(pattern="2:4", layers=keras.layers.DepthwiseConv2D)
    with pytest.raises(ValueError, match="inputs to sum over"):
        depthwise.fit(np.ones((8, 6, 6, 4)), np.ones((8, 4, 4, 4)), verbose=0, callbacks=[pattern])


def test_what_cannot_have_a_pattern_is_left_alone_unless_it_is_asked_for(helpers, small):
    prune = tfaccel.PruneWeights(pattern="2:4")
    model = keras.Sequential(
        [keras.Input((7, 7, 1)), keras.layers.Conv2D(64, 7), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    helpers.compile(model).fit(*small, verbose=0, callbacks=[prune])
    assert [row.skipped for row in prune.report.rows[::2]] == ["has fewer inputs than 4", ""]
    with pytest.raises(ValueError, match="has fewer inputs than 4"):
        fit(helpers, small, [tfaccel.PruneWeights(pattern="2:4", layers=keras.layers.Conv2D)])


def test_an_unbuilt_model(helpers, small):
    model = helpers.compile(helpers.Subclassed())
    with pytest.raises(ValueError, match="call it on one batch before fit"):
        model.fit(*small, batch_size=24, verbose=0, callbacks=[tfaccel.PruneWeights(0.5)])


def test_callbacks_that_put_other_weights_back(helpers, small):
    stop = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    with pytest.raises(ValueError, match="Exchange them"):
        fit(helpers, small, [tfaccel.PruneWeights(0.5), stop])
    with pytest.raises(ValueError, match="start_from_epoch=2"):
        fit(helpers, small, [stop, tfaccel.PruneWeights(0.5)])
    late = keras.callbacks.EarlyStopping("loss", restore_best_weights=True, start_from_epoch=2)
    model, _ = fit(helpers, small, [late, tfaccel.PruneWeights(0.5)], epochs=4)
    assert sparsity_of(kernels(model)[1]) == pytest.approx(0.5, abs=1e-2)


def test_patterns_are_read():
    assert parse_pattern("2:4") == ((2, 4), None)
    assert parse_pattern("4x1") == (None, (4, 1))


def test_the_default_ends_before_the_run_does():
    assert plan(tfaccel.PruningSchedule(), 100, 10).end == 700


# 8. A real run.


@pytest.mark.slow
def test_four_fifths_of_a_real_network(images):
    """Pruned to 80 %, a small CNN keeps its accuracy on the built-in images."""

    def run(callbacks):
        keras.utils.set_random_seed(0)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(16, 3, strides=2, activation="relu"),
                layers.Conv2D(32, 3, strides=2, activation="relu"),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=["accuracy"])
        model.fit(
            images["x_train"][..., None],
            images["y_train"],
            batch_size=64,
            epochs=8,
            verbose=0,
            callbacks=callbacks,
        )
        return model.evaluate(images["x_test"][..., None], images["y_test"], verbose=0)[1]

    prune = tfaccel.PruneWeights(0.8)
    dense, sparse = run([]), run([prune])
    # 1,000 or so test images: one standard error is 1.2 points, of a difference on the same images less.
    assert sparse > dense - 0.02
    assert prune.report.sparsity > 0.75
    assert prune.report.compressed_bytes < prune.report.size_bytes / 2.5
