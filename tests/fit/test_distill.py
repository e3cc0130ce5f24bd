"""Learning from a teacher: against numpy, against Keras's own `Distiller`, in every kind of step."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import mirrored
from small_fits import Interrupt, fit, kernels

import tfaccel
from tfaccel.fit._soft_targets import binary_divergence, categorical_divergence


def teacher_of(helpers, kind="sequential"):
    """A net of the same form with other weights."""
    model = helpers.build(kind)
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(scale=0.5, size=w.shape) for w in model.get_weights()])
    return model


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_divergences_are_what_numpy_says():
    rng = np.random.default_rng(0)
    teacher, model = rng.normal(size=(2, 7, 5))
    p, q = softmax(teacher / 2.5), softmax(model / 2.5)
    expected = 2.5**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(categorical_divergence(teacher, model, 2.5), expected, rtol=1e-5)
    p, q = 1 / (1 + np.exp(-teacher / 2.5)), 1 / (1 + np.exp(-model / 2.5))
    expected = 2.5**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(-1)
    np.testing.assert_allclose(binary_divergence(teacher, model, 2.5), expected, rtol=1e-5)


def test_large_logits_stay_finite():
    teacher, model = tf.constant([[1e4, -1e4]]), tf.constant([[-1e4, 1e4]])
    for divergence in (categorical_divergence, binary_divergence):
        assert np.isfinite(divergence(teacher, model, 1.0)).all()


def test_no_weight_is_bit_identical(helpers, small):
    expected, _ = fit(helpers, small)
    actual, history = fit(helpers, small, [tfaccel.Distill(teacher_of(helpers), 0)])
    assert "distillation_loss" not in history
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_still_takes_the_divergence_of_logits_by_default():
    """The canary of what the docstring says of `LogitsDistillation`: negative logits teach nothing."""
    teacher, model = np.array([[-1.0, -5.0]]), np.array([[-5.0, -1.0]])
    by_name, by_object = (
        keras.distillation.LogitsDistillation(1.0, loss)
        for loss in ("kl_divergence", keras.losses.KLDivergence())
    )
    assert float(by_name.compute_loss(teacher, model)) == 0
    expected = categorical_divergence(teacher, model, 1.0)
    np.testing.assert_allclose(float(by_object.compute_loss(teacher, model)), expected[0], rtol=1e-5)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 4.0), (1, 1.0)])
def test_trains_as_keras_distiller(helpers, small, weight, temperature):
    """Keras's own, which puts teacher and student into a model of its own, is the oracle."""
    teacher, student = teacher_of(helpers), helpers.build()
    distiller = keras.distillation.Distiller(
        teacher,
        student,
        keras.distillation.LogitsDistillation(temperature, keras.losses.KLDivergence()),
        student_loss_weight=1.0 - weight,
    )
    sgd = keras.optimizers.SGD(0.05)
    distiller.compile(sgd, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    theirs = distiller.fit(*small, batch_size=24, epochs=2, shuffle=False, verbose=0).history
    distill = tfaccel.Distill(teacher_of(helpers), weight, temperature=temperature)
    model, history = fit(helpers, small, [distill], keras.optimizers.SGD(0.05))
    assert np.abs(kernels(model)[1] - kernels(helpers.build())[1]).max() > 1e-2, "it trained"
    for a, b in zip(model.get_weights(), student.get_weights(), strict=True):
        # float32: both differ in how softmax and logarithm are joined, over 20 steps.
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(history["distillation_loss"], theirs["distillation_loss"], rtol=1e-3)
    np.testing.assert_allclose(history["loss"], theirs["total_loss"], rtol=1e-3)


def test_with_all_the_weight_labels_do_not_matter(helpers, small):
    x, y = small
    results = []
    for labels in (y, (y + 3) % 10):
        model, _ = fit(helpers, (x, labels), [tfaccel.Distill(teacher_of(helpers), 1)])
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


AXES = [
    ("float32", True, 4, 2, "subclassed", {}),
    ("mixed_bfloat16", False, 4, None, "functional", {}),
    ("mixed_float16", True, 1, 2, "sequential", {}),
    ("mixed_float16", False, 4, 2, "functional", {}),
    ("mixed_bfloat16", True, 4, None, "subclassed", {}),
    ("float32", False, 1, None, "subclassed", {"run_eagerly": True}),
]


@pytest.mark.parametrize(("policy", "jit", "steps", "accumulation", "kind", "options"), AXES)
def test_learns_the_teacher_in_every_kind_of_step(
    helpers, small, policy, jit, steps, accumulation, kind, options
):
    """With labels that are of no use, the answers come from the teacher alone."""
    teacher = teacher_of(helpers)
    x, answers = small[0], np.argmax(teacher.predict(small[0], verbose=0), -1)
    keras.config.set_dtype_policy(policy)
    adam = keras.optimizers.Adam(2e-2, gradient_accumulation_steps=accumulation)
    options = options or {"jit_compile": jit, "steps_per_execution": steps}
    distill = tfaccel.Distill(teacher, 1, temperature=1.0)
    model, history = fit(helpers, (x, np.zeros(240)), [distill], adam, kind, epochs=25, **options)
    keras.config.set_dtype_policy("float32")
    agree = np.mean(np.argmax(model.predict(x, verbose=0), -1) == answers)
    assert agree > 0.8
    assert history["distillation_loss"][-1] < 0.3 * history["distillation_loss"][0]
    assert "compute_loss" not in vars(model)
    assert "train_step" not in vars(model)


def fit_under(strategy, helpers, small, rows=240):
    accelerator = tfaccel.Accelerator(strategy, "float32", False)
    with accelerator.scope():
        teacher = teacher_of(helpers)
        sgd = keras.optimizers.SGD(0.05)
        model = helpers.compile(helpers.build(), sgd, **accelerator.compile_options())
    data = accelerator.dataset(small[0][:rows], small[1][:rows], batch_size=24, shuffle=False)
    history = model.fit(data, epochs=2, verbose=0, callbacks=[tfaccel.Distill(teacher, 0.7)])
    return model.get_weights(), history.history


def test_all_roads_end_alike(helpers, small):
    """The fused loop, XLA and one Python call a step are plain Keras's road; a last batch of 7 is in it."""

    def plain(**options):
        sgd = keras.optimizers.SGD(0.05)
        few = small[0][:223], small[1][:223]
        return fit(helpers, few, [tfaccel.Distill(teacher_of(helpers), 0.7)], sgd, **options)

    expected, history = plain()
    roads = [plain(jit_compile=True)[0].get_weights(), plain(run_eagerly=True)[0].get_weights()]
    weights, fused = fit_under("one_device", helpers, small, 223)
    for road in (*roads, weights):
        for a, b in zip(road, expected.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)  # sums in another order, over 20 steps
    np.testing.assert_allclose(fused["distillation_loss"], history["distillation_loss"], rtol=1e-4)


def test_two_replicas_end_where_one_device_does(helpers, small):
    """223 samples in batches of 24: the last one has 7, and does not divide."""
    one, history = fit_under("one_device", helpers, small, 223)
    two, both = fit_under(mirrored(2), helpers, small, 223)
    for a, b in zip(two, one, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)  # the same sums in two parts
    np.testing.assert_allclose(both["distillation_loss"], history["distillation_loss"], rtol=1e-5)
    np.testing.assert_allclose(both["loss"], history["loss"], rtol=1e-5)


def test_validation_is_that_of_the_labels(helpers, small):
    model = helpers.compile(helpers.build())
    distill = tfaccel.Distill(teacher_of(helpers))
    history = model.fit(*small, verbose=0, validation_data=small, callbacks=[distill]).history
    assert history["val_loss"][0] == pytest.approx(model.evaluate(*small, verbose=0)[0], rel=1e-5)
    assert history["loss"][0] < 0.7 * history["val_loss"][0], "half of it was the teacher's"


def test_penalties_count_fully(helpers, small):
    """With all the weight at a teacher whose answers are the model's own, the penalty is what is left."""
    layers = keras.layers
    penalty = keras.regularizers.L2(0.1)
    model = keras.Sequential(
        [keras.Input((7, 7, 1)), layers.Flatten(), layers.Dense(10, kernel_regularizer=penalty)]
    )
    teacher = keras.models.clone_model(model)
    teacher.set_weights(model.get_weights())
    before = np.asarray(model.layers[1].kernel)
    helpers.compile(model, keras.optimizers.SGD(0.01))
    model.fit(*small, batch_size=240, verbose=0, callbacks=[tfaccel.Distill(teacher, 1)])
    np.testing.assert_allclose(model.layers[1].kernel, before * (1 - 0.01 * 2 * 0.1), atol=1e-6)


def heads(form):
    """A net with two heads, one of classes, one of numbers."""
    inputs = keras.Input((6,))
    classes = keras.layers.Dense(4, activation="softmax", name="classes")(inputs)
    number = keras.layers.Dense(2, name="number")(inputs)
    outputs = {"classes": classes, "number": number} if form == "dict" else [classes, number]
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("form", ["dict", "list", "names"])
def test_several_outputs_with_their_losses_and_weights(form):
    """One step of gradient descent against numpy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = [rng.integers(0, 4, 32), rng.normal(size=(32, 2)).astype("float32")]
    share = rng.uniform(0.5, 2, 32).astype("float32")
    losses, weights = ["sparse_categorical_crossentropy", "mse"], [0.5, 2.0]
    names = ["classes", "number"]
    model, teacher = heads(form), heads(form)
    if form != "list":
        losses, weights = (dict(zip(names, each, strict=True)) for each in (losses, weights))
        y = dict(zip(names, y, strict=True)) if form == "dict" else y
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=weights)
    kernel, bias = {}, {}
    for each in (model, teacher):
        for name in names:
            layer = each.get_layer(name)
            kernel[each, name], bias[each, name] = layer.get_weights()
    model.fit(x, y, batch_size=32, sample_weight=share, verbose=0, callbacks=[tfaccel.Distill(teacher, 1)])

    def logits(each, name):
        return x @ kernel[each, name] + bias[each, name]

    soft = [softmax(logits(each, "classes") / 3) for each in (model, teacher)]
    gradients = {
        "classes": 0.5 * 3 * (soft[0] - soft[1]),  # of T² · KL for logits: T · (q − p)
        "number": 2.0 * (logits(model, "number") - logits(teacher, "number")),
    }
    for name in names:
        expected = kernel[model, name] - 0.1 * x.T @ (share[:, None] * gradients[name]) / 32
        np.testing.assert_allclose(model.get_layer(name).get_weights()[0], expected, atol=1e-5)


def test_a_loss_of_ones_own_leaves_outputs_out():
    model, teacher = heads("list"), heads("list")
    before = model.get_layer("classes").get_weights()[0]
    model.compile("sgd", ["sparse_categorical_crossentropy", "mse"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)), [rng.integers(0, 4, 32), rng.normal(size=(32, 2))]
    distill = tfaccel.Distill(teacher, 1, loss=[None, keras.losses.Huber()])
    model.fit(x, y, verbose=0, callbacks=[distill])
    np.testing.assert_array_equal(model.get_layer("classes").get_weights()[0], before)


def test_probabilities_and_logits_teach_alike(helpers, small):
    results = []
    for from_logits in (True, False):
        nets = [helpers.build(), teacher_of(helpers)]
        if not from_logits:
            nets = [keras.Sequential([*net.layers, keras.layers.Softmax()]) for net in nets]
            for net in nets:
                net.build((None, 7, 7, 1))
        nets[0].compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits))
        distill = tfaccel.Distill(nets[1], temperature=2.0)
        nets[0].fit(*small, batch_size=24, shuffle=False, verbose=0, callbacks=[distill])
        results.append(nets[0].get_weights())
    for a, b in zip(*results, strict=True):
        # The teacher is sure: its small probabilities are cut off at 1e-7.
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_masked_outputs_are_not_taught():
    layers = keras.layers

    def tagger():
        return keras.Sequential([keras.Input((5,)), layers.Embedding(9, 4, mask_zero=True), layers.Dense(3)])

    model, teacher = tagger(), tagger()
    x = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.layers[0].get_weights()[0]
    model.fit(x, np.zeros((2, 5)), verbose=0, callbacks=[tfaccel.Distill(teacher, 1)])
    changed = np.any(model.layers[0].get_weights()[0] != before, axis=-1)
    np.testing.assert_array_equal(changed, [False, *[True] * 5, False, False, False])


def test_fit_twice_after_and_interrupted(helpers, small):
    distill = tfaccel.Distill(teacher_of(helpers))
    model, _ = fit(helpers, small, [distill])
    assert "distillation_loss" in model.fit(*small, verbose=0, callbacks=[distill]).history
    assert "distillation_loss" not in model.fit(*small, verbose=0).history
    with pytest.raises(KeyboardInterrupt):
        model.fit(*small, verbose=0, callbacks=[distill, Interrupt()])
    plain = model.fit(*small, verbose=0).history
    assert "compute_loss" not in vars(model)
    assert plain["loss"][0] < 5


def test_the_teacher_stays_as_it_is_and_the_file_knows_nothing_of_it(helpers, small, tmp_path):
    teacher = keras.Sequential([*teacher_of(helpers).layers[:1], keras.layers.BatchNormalization()])
    teacher.add(keras.layers.Dropout(0.5))
    teacher.add(keras.layers.Flatten())
    teacher.add(keras.layers.Dense(10))
    teacher.build((None, 7, 7, 1))
    before = teacher.get_weights()
    model, _ = fit(helpers, small, [tfaccel.Distill(teacher)])
    for a, b in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert len(loaded.weights) == len(helpers.build().weights)


def test_it_composes_with_all_that_makes_smaller(helpers, small, tmp_path):
    teacher = teacher_of(helpers)
    model, history = fit(
        helpers, small, [tfaccel.Distill(teacher), tfaccel.PruneWeights(0.7), tfaccel.Profile(verbose=0)]
    )
    assert np.mean(kernels(model)[1] == 0) == pytest.approx(0.7, abs=0.01)
    chain = [tfaccel.ClusterWeights(16), tfaccel.QuantizeAware(8), tfaccel.Distill(teacher)]
    history = model.fit(*small, batch_size=24, epochs=2, verbose=0, callbacks=chain).history
    assert "distillation_loss" in history
    assert np.mean(kernels(model)[1] == 0) >= 0.69
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8").parity.sqnr_db > 20


def other_inputs(helpers):
    return keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])


def more_classes(helpers):
    return keras.Sequential([keras.Input((7, 7, 1)), keras.layers.Flatten(), keras.layers.Dense(11)])


@pytest.mark.parametrize(
    ("teacher", "text"), [(other_inputs, "inputs of shape"), (more_classes, "outputs of shape")]
)
def test_a_teacher_of_another_task_is_refused(helpers, small, teacher, text):
    with pytest.raises(ValueError, match=text):
        fit(helpers, small, [tfaccel.Distill(teacher(helpers))])


def test_a_subclassed_teacher_of_another_task_is_refused(helpers, small):
    class Wide(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.head = keras.layers.Flatten(), keras.layers.Dense(12)

        def call(self, inputs):
            return self.head(self.flatten(inputs))

    teacher = Wide()
    teacher(small[0][:1])
    with pytest.raises(ValueError, match=r"answers with shape \(.*12\)"):
        fit(helpers, small, [tfaccel.Distill(teacher)])


def test_bad_arguments(helpers):
    teacher = teacher_of(helpers)
    for arguments, text in [
        ({"teacher": None}, "a keras.Model"),
        ({"teacher": helpers.Subclassed()}, "a built model"),
        ({"weight": 1.5}, "0 ≤ weight ≤ 1"),
        ({"weight": float("nan")}, "0 ≤ weight ≤ 1"),
        ({"temperature": 0}, "a number > 0"),
        ({"loss": "no such loss"}, "a Keras loss"),
    ]:
        with pytest.raises(ValueError, match=text):
            tfaccel.Distill(**{"teacher": teacher, **arguments})


def test_a_teacher_that_would_change_with_the_model_is_refused(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(ValueError, match="shares weights"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.Distill(model)])


def test_a_teacher_from_outside_of_the_strategy_is_refused(helpers, small):
    accelerator = tfaccel.Accelerator(mirrored(2), "float32", False)
    teacher = teacher_of(helpers)
    with accelerator.scope():
        model = helpers.compile(helpers.build(), **accelerator.compile_options())
    data = accelerator.dataset(*small, batch_size=24)
    with pytest.raises(ValueError, match="outside of the strategy"):
        model.fit(data, verbose=0, callbacks=[tfaccel.Distill(teacher)])
    model.fit(data, verbose=0, callbacks=[tfaccel.Distill(accelerator.adopt(teacher))])


def test_a_step_without_outputs_is_refused(helpers, small):
    class Blind(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(10)

        def call(self, inputs):
            return self.head(inputs)

        def train_step(self, data):
            x, _ = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(x) ** 2)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    model = Blind()
    model.compile("sgd")
    x = small[0].reshape(240, -1)
    teacher = keras.Sequential([keras.Input((49,)), keras.layers.Dense(10)])
    with pytest.raises(ValueError, match="does not give y_pred"):
        model.fit(x, small[1], verbose=0, callbacks=[tfaccel.Distill(teacher)])


@pytest.mark.parametrize("backwards", [False, True])
def test_callbacks_round_the_same_methods_come_off_in_any_order(helpers, small, backwards):
    """They end in the order of the list, whatever it is; a plain fit behind them is plain again."""
    teachers = [teacher_of(helpers), helpers.build("functional")]
    callbacks = [tfaccel.Distill(teachers[0], 1), tfaccel.Profile(verbose=0)]
    callbacks.append(tfaccel.Distill(teachers[1], 0.5))
    callbacks = callbacks[::-1] if backwards else callbacks
    model = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    for _ in range(2):
        model.fit(*small, batch_size=24, shuffle=False, verbose=0, callbacks=callbacks)
        assert not {"train_step", "compute_loss", "make_train_function"} & set(vars(model))
    plain = helpers.compile(helpers.build(), keras.optimizers.SGD(0.05))
    plain.set_weights(model.get_weights())
    for each in (model, plain):
        each.fit(*small, batch_size=24, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_outputs_are_paired_by_their_names():
    """A list beside a dict; flattened, the one goes by position and the other by the alphabet."""
    inputs, dense = keras.Input((4,)), keras.layers.Dense
    model = keras.Model(inputs, [dense(3, name="b")(inputs), dense(3, name="a")(inputs)])
    biases = {"b": 5.0, "a": -5.0}

    def says(name):
        constant = keras.initializers.Constant(biases[name])
        return dense(3, kernel_initializer="zeros", bias_initializer=constant, name=name)(inputs)

    teacher = keras.Model(inputs, {name: says(name) for name in biases})
    model.compile(keras.optimizers.SGD(0.3), ["mse", "mse"])
    x, y = np.zeros((64, 4)), [np.zeros((64, 3))] * 2
    model.fit(x, y, epochs=30, verbose=0, callbacks=[tfaccel.Distill(teacher, 1)])
    learnt = {name: np.asarray(model.get_layer(name).bias).mean() for name in biases}
    assert learnt == pytest.approx(biases, abs=0.1)


def test_outputs_of_other_names_are_refused():
    inputs = keras.Input((4,))
    model, teacher = (
        keras.Model(inputs, {f"{prefix}_{n}": keras.layers.Dense(3)(inputs) for n in ("fine", "coarse")})
        for prefix in ("x", "y")
    )
    model.compile("sgd", "mse")
    y = {f"x_{n}": np.zeros((8, 3)) for n in ("fine", "coarse")}
    with pytest.raises(ValueError, match="Allowed: the same keys"):
        model.fit(np.zeros((8, 4)), y, verbose=0, callbacks=[tfaccel.Distill(teacher)])


def test_a_loss_for_some_outputs_has_to_say_which():
    model, teacher = heads("dict"), heads("dict")
    model.compile("sgd", {"classes": "sparse_categorical_crossentropy", "number": "mse"})
    y = {"classes": np.zeros(8), "number": np.zeros((8, 2))}
    distill = tfaccel.Distill(teacher, loss={"number": "mae"})
    with pytest.raises(ValueError, match="None leaves an output out"):
        model.fit(np.zeros((8, 6)), y, verbose=0, callbacks=[distill])
    before = model.get_layer("classes").get_weights()[0]
    distill = tfaccel.Distill(teacher, 1, loss={"number": "mae", "classes": None})
    model.fit(np.ones((8, 6)), y, verbose=0, callbacks=[distill])
    np.testing.assert_array_equal(model.get_layer("classes").get_weights()[0], before)


def test_weights_of_samples_by_output():
    """As Keras looks them up: an output of weight zero stays as it is."""
    model, teacher = heads("dict"), heads("dict")
    model.compile("sgd", {"classes": "sparse_categorical_crossentropy", "number": "mse"})
    y = {"classes": np.zeros(8), "number": np.zeros((8, 2))}
    weights = {"classes": np.ones(8), "number": np.zeros(8)}
    before = {name: model.get_layer(name).get_weights()[0] for name in weights}
    distill = tfaccel.Distill(teacher)
    model.fit(np.ones((8, 6)), y, sample_weight=weights, verbose=0, callbacks=[distill])
    changed = {n: bool((model.get_layer(n).get_weights()[0] != before[n]).any()) for n in weights}
    assert changed == {"classes": True, "number": False}


def fitted_with(helpers, small, loss, optimizer, weight=0.5):
    labels = loss.name if isinstance(loss, keras.losses.Loss) else ""
    y = small[1] if "sparse" in labels else keras.utils.to_categorical(small[1], 10)
    model = helpers.build()
    model.compile(optimizer, loss, jit_compile=False)
    distill = tfaccel.Distill(teacher_of(helpers), weight)
    model.fit(small[0], y, batch_size=24, shuffle=False, verbose=0, callbacks=[distill])
    return model.get_weights()


def test_a_partial_cross_entropy_is_one(helpers, small):
    losses = [
        functools.partial(keras.losses.categorical_crossentropy, from_logits=True),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    ]
    found, expected = (fitted_with(helpers, small, loss, keras.optimizers.SGD(0.05)) for loss in losses)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_loss_of_ones_own_for_labels_is_not_guessed_at(helpers, small):
    def own(y_true, y_pred):
        return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)

    with pytest.raises(ValueError, match="'own' is made for labels"):
        fitted_with(helpers, small, own, "sgd")


def test_a_loss_without_a_reduction_is_summed(helpers, small):
    losses = [
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction, name="sparse")
        for reduction in ("sum", None)
    ]
    found, expected = (fitted_with(helpers, small, each, keras.optimizers.SGD(1e-3), 0.6) for each in losses)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # the same sums in another order, over ten steps


class OwnNames(keras.Model):
    """Calls compute_loss as Keras allows it, with batches of four parts."""

    def __init__(self):
        super().__init__()
        self.flatten, self.head = keras.layers.Flatten(), keras.layers.Dense(10)

    def call(self, inputs):
        return self.head(self.flatten(inputs))

    def compute_loss(self, x, y, predictions, weights, training=True):
        return super().compute_loss(x, y, predictions, weights, training)

    def train_step(self, data):
        x, y, _, _ = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True), None, True)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_steps_and_losses_of_ones_own(helpers, small):
    model = OwnNames()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = small
    model(x[:1])
    data = tf.data.Dataset.from_tensor_slices((x, y, y, y)).batch(24)
    callbacks = [tfaccel.Distill(teacher_of(helpers)), tfaccel.Profile(verbose=0)]
    history = model.fit(data, verbose=0, callbacks=callbacks).history
    assert history["distillation_loss"][0] > 0


def test_a_frozen_layer_may_be_shared():
    shared = keras.layers.Dense(4, trainable=False)
    inputs = keras.Input((4,))
    teacher, model = (keras.Model(inputs, keras.layers.Dense(2)(shared(inputs))) for _ in range(2))
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[tfaccel.Distill(teacher)])
