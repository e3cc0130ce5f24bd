"""What a Keras user would do, one case each: forms of data, scores, layers of layers, resumed searches."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.export.measures import measure_for
from tfaccel.export.samples import clean_name

L = keras.layers


def classifier(seed=0):
    """Two inputs' worth of a small classifier of 8 features, trained to something."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(16, "relu", name="inner"), L.Dense(3, name="scores")]
    )
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*labelled(), epochs=5, verbose=0)
    return model


def labelled(rows=300):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 8)).astype("float32")
    return x, x[:, :3].argmax(1)


@pytest.fixture(scope="module")
def net():
    return classifier()


# Scores.


@pytest.mark.parametrize("value", [float("nan"), None, "good"])
def test_a_score_that_is_no_number(net, tmp_path, value):
    with pytest.raises(ValueError, match="evaluate returned"):
        tfaccel.export_tflite(
            net, tmp_path / "m.tflite", calibration=labelled()[0], evaluate=lambda p: value, max_drop=0.1
        )


@pytest.mark.parametrize(
    ("labels", "units"),
    [
        (np.zeros((1, 300)), 2),
        (np.full((300, 2), np.nan), 2),
        (np.zeros(150), 2),
        (np.full(300, 7), 3),
        (np.full(300, 0.5), 3),
    ],
)
def test_labels_that_do_not_go_with_the_outputs(tmp_path, labels, units):
    model = keras.Sequential([keras.Input((8,)), L.Dense(units)])
    with pytest.raises(ValueError, match="don't go with outputs of"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", evaluate=(labelled()[0], labels), max_drop=0.1)


def measured(labels, outputs):
    measure = measure_for(np.asarray(labels), [np.asarray(outputs, "float32")])
    return measure.name, measure.of(np.asarray(outputs, "float32"))


def test_what_labels_are_scored_by():
    """Against what one would count by hand."""
    scores = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]]
    for labels in ([1, 0, 2, 2], [[1], [0], [2], [2]], np.eye(3)[[1, 0, 2, 2]]):
        assert measured(labels, scores) == ("accuracy", 0.75)
    pixels = np.eye(3)[[[1, 0], [2, 2]]]  # two pictures of two pixels
    assert measured([[1, 0], [2, 0]], pixels) == ("accuracy", 0.75)
    assert measured([[[1], [0]], [[2], [0]]], pixels) == ("accuracy", 0.75)
    for labels in ([1, 0, 1, 1], [[1], [0], [1], [1]]):
        assert measured(labels, [[0.9], [0.2], [0.4], [0.7]]) == ("accuracy", 0.75)
        assert measured(labels, [[3.0], [-2.0], [0.4], [-0.1]]) == ("accuracy", 0.75)  # logits
    assert measured([[1, 1], [0, 1]], [[0.9, 0.2], [0.4, 0.6]]) == ("accuracy", 0.75)  # several at once
    whole = np.array([1, 0, 2, 2])  # a model that gives classes
    assert measure_for(np.array([1, 0, 2, 0]), [whole]).of(whole) == 0.75
    assert measured([1.0, 2.0, 3.0, 4.0], [[1.0], [2.0], [3.0], [3.0]]) == ("R²", 1 - 1 / 5)


def test_a_binary_classifier_and_a_regression_are_scored_without_a_function(tmp_path):
    x, y = labelled()
    for last, labels, loss, name in (
        (L.Dense(1, "sigmoid"), y == 0, "binary_crossentropy", "accuracy"),
        (L.Dense(1), x.sum(1), "mse", "R²"),
    ):
        model = keras.Sequential([keras.Input((8,)), L.Dense(16, "relu"), last])
        model.compile(keras.optimizers.Adam(1e-2), loss)
        model.fit(x, labels, epochs=20, verbose=0)
        path = tmp_path / f"{name}.tflite"
        file = tfaccel.export_tflite(model, path, "int8", calibration=x, evaluate=(x, labels), max_drop=0.05)
        assert file.score.name == name
        assert file.score.model > 0.8
        assert f"{name} 0." in str(file)
        assert tfaccel.TFLiteFile.load(file.path).score == file.score
        predicted = model.predict(x, verbose=0)[:, 0]
        share = np.mean((predicted > 0.5) == labels)
        explained = 1 - np.sum((labels - predicted) ** 2) / np.sum((labels - np.mean(labels)) ** 2)
        assert file.score.model == pytest.approx(share if name == "accuracy" else explained, abs=1e-5)


def test_names_of_classes_are_no_labels(net, tmp_path):
    with pytest.raises(ValueError, match="the index of a class, not its name"):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", evaluate=(labelled()[0], np.full(300, "cat")))


def test_labels_of_several_outputs_want_a_function(tmp_path):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, {"a": L.Dense(3)(inputs), "b": L.Dense(2)(inputs)})
    x, y = labelled()
    for labels in ({"a": y, "b": y}, [y, y]):
        with pytest.raises(ValueError, match="labels for several outputs"):
            tfaccel.export_tflite(model, tmp_path / "m.tflite", evaluate=(x, labels))


def test_a_score_on_a_scale_of_its_own(net, tmp_path):
    x, _ = labelled()

    def evaluate(predict):
        return -1e4 * float(np.mean(np.abs(predict(x) - net.predict(x, verbose=0))))

    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", "float16", evaluate=evaluate, max_drop=50.0)
    assert 0 < file.score.drop < 50


def test_a_score_of_named_outputs(tmp_path):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, {"label": L.Dense(3)(inputs), "size": L.Dense(1)(inputs)})
    x, y = labelled()
    seen = []

    def evaluate(predict):
        outputs = predict(x)
        seen.append(sorted(outputs))
        return float(np.mean(outputs["label"].argmax(1) == y))

    tfaccel.export_tflite(model, tmp_path / "m.tflite", evaluate=evaluate, max_drop=0.1)
    assert seen == [["label", "size"]] * 2


def test_a_stateful_model_and_rows_that_fill_no_batch(tmp_path):
    model = keras.Sequential([keras.Input(batch_shape=(4, 5, 2)), L.GRU(3, stateful=True), L.Dense(2)])
    x = np.random.default_rng(0).random((10, 5, 2), dtype="float32")
    tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x)
    assert tfaccel.compare(model, tmp_path / "m.tflite", x).sqnr_db > 80
    with pytest.raises(ValueError, match="multiples of 4"):
        tfaccel.export_tflite(
            model, tmp_path / "m.tflite", evaluate=lambda predict: float(predict(x).mean()), max_drop=0.1
        )


# Data.


def two_inputs():
    sequence, age = keras.Input((5, 3), name="seq"), keras.Input((1,), name="age")
    joined = L.Concatenate()([L.Flatten()(sequence), age])
    return keras.Model({"seq": sequence, "age": age}, L.Dense(2)(joined))


def test_a_batched_dataset_of_dicts_whatever_their_order(tmp_path):
    random = np.random.default_rng(0)
    data = {"age": random.random((40, 1)), "seq": random.random((40, 5, 3)), "unused": np.ones((40, 7))}
    data = {name: array.astype("float32") for name, array in data.items()}
    dataset = tf.data.Dataset.from_tensor_slices((data, np.zeros(40)))
    for form in (dataset.batch(8), dataset, data):
        file = tfaccel.export_tflite(two_inputs(), tmp_path / "m.tflite", calibration=form)
        assert file.samples == 40


@pytest.mark.parametrize("name", ["class", "self", "lambda"])
def test_features_named_like_a_word_of_python(tmp_path, name):
    inputs = {each: keras.Input((1,), name=each) for each in ("age", name)}
    model = keras.Model(inputs, L.Dense(2)(L.Concatenate()(list(inputs.values()))))
    data = {each: np.ones((8, 1), "float32") for each in inputs}
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=data)
    assert file.samples == 8
    assert clean_name(name) == f"{name}_"


def test_labels_in_a_list(net, tmp_path):
    x, y = labelled()
    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", evaluate=(x, y.tolist()), max_drop=0.1)
    assert file.score.samples == 300


def test_sequences_of_several_lengths(tmp_path):
    model = keras.Sequential([keras.Input((None, 2)), L.GlobalAveragePooling1D(), L.Dense(2)])
    rows = tf.data.Dataset.from_generator(
        lambda: (np.ones((n, 2), "float32") for n in (3, 5, 9, 7)),
        output_signature=tf.TensorSpec((None, 2), tf.float32),
    )
    with pytest.raises(ValueError, match="Pad all to one length"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=rows.padded_batch(2))


def test_text_is_refused_with_the_reason(tmp_path):
    model = keras.Sequential([keras.Input((), dtype="string"), L.Hashing(8), L.Embedding(8, 2), L.Dense(2)])
    with pytest.raises(ValueError, match="look up before"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=np.array(["a", "b"]))


def test_data_with_a_long_tail_is_not_held_against_itself(net, tmp_path):
    x = np.random.default_rng(0).lognormal(sigma=2, size=(5000, 8)).astype("float32")
    y = net.predict(x, verbose=0).argmax(1)
    for evaluate in (None, (x, y)):
        tfaccel.export_tflite(
            net, tmp_path / "m.tflite", "int8", calibration=(x, y), evaluate=evaluate, max_drop=0.5
        )


def test_nan_weights_are_the_models_own(tmp_path):
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    model.layers[0].kernel.assign(np.full((4, 2), np.nan))
    with pytest.raises(tfaccel.ExportError, match="itself are NaN"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "dynamic_int8", calibration=np.ones((8, 4)))


@pytest.mark.parametrize(
    "signature", [(None, 4), tf.TensorSpec([4], tf.float32), tf.TensorSpec([None, 3], tf.float32)]
)
def test_a_signature_that_does_not_fit(tmp_path, signature):
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    with pytest.raises(ValueError, match="batch axis"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", input_signature=signature)


# Layers.


def attention():
    inputs = keras.Input((6, 8))
    hidden = L.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    inner = keras.Sequential([L.Dense(8, name="deep"), L.ReLU()], name="backbone")
    return keras.Model(inputs, L.TimeDistributed(L.Dense(3), name="each")(inner(hidden)))


@pytest.mark.parametrize(
    ("rule", "count"), [(keras.layers.MultiHeadAttention, 5), ("backbone", 1), ("each", 2)]
)
def test_a_rule_for_a_layer_of_layers_is_for_all_inside(tmp_path, rule, count):
    x = np.random.default_rng(0).normal(size=(64, 6, 8)).astype("float32")
    file = tfaccel.export_tflite(
        attention(), tmp_path / "m.tflite", "int8", calibration=x, layers={rule: "float32"}
    )
    assert len(file.layers) == count  # the projections of attention, and what it computes itself
    left = " ".join(file.float_operations)
    for name in file.layers:
        assert name in left


def test_an_embedding_that_is_also_the_last_layer(tmp_path):
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.words = L.Embedding(20, 8)
            self.inner = L.Dense(8)

        def call(self, tokens):
            return keras.ops.matmul(
                self.inner(self.words(tokens)), keras.ops.transpose(self.words.embeddings)
            )

    model = Tied()
    x = np.random.default_rng(0).integers(0, 20, (64, 6)).astype("int32")
    model(x[:1])
    signature = tf.TensorSpec([None, 6], tf.int32)
    for recipe in ("int8", "dynamic_int8", "int4_weights"):
        file = tfaccel.export_tflite(
            model, tmp_path / "m.tflite", recipe, calibration=x, input_signature=signature
        )
        assert file.parity.sqnr_db > (15 if recipe == "int4_weights" else 25)


def test_one_tensor_that_is_two_outputs(tmp_path):
    inputs = keras.Input((4,))
    hidden = L.Dense(3)(inputs)
    x = np.random.default_rng(0).random((64, 4), dtype="float32")
    model = keras.Model(inputs, [hidden, hidden])
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x)
    assert len(file.parity.outputs) == 2
    with pytest.raises(ValueError, match="output_0 and output_1 are one tensor"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)


class Keeps(L.Layer):
    """Adds the last sample of the call before."""

    def build(self, shape):
        self.last = self.add_weight(shape=(1, shape[-1]), initializer="zeros", trainable=False, name="last")

    def call(self, x):
        out = x + self.last
        self.last.assign(x[-1:])
        return out


def test_what_a_layer_keeps_from_call_to_call_is_refused_and_not_changed(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Keeps(), L.Dense(2)])
    x = np.random.default_rng(0).random((64, 4), dtype="float32")
    before = model.get_weights()
    with pytest.raises(tfaccel.ExportError, match=r"changes .*keeps.*last"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_encoder_and_a_decoder_are_unrolled(tmp_path):
    inputs = keras.Input((5, 3))
    _, *states = L.LSTM(4, return_state=True)(inputs)
    outputs = L.LSTM(4, return_sequences=True)(L.RepeatVector(5)(states[0]), initial_state=states)
    x = np.random.default_rng(0).normal(size=(64, 5, 3)).astype("float32")
    file = tfaccel.export_tflite(keras.Model(inputs, outputs), tmp_path / "m.tflite", "int8", calibration=x)
    assert file.parity.sqnr_db > 20


def test_open_sizes_are_those_of_the_samples(tmp_path):
    model = keras.Sequential(
        [keras.Input((None, None, 1)), L.Conv2D(4, 9, 3), L.Conv2D(4, 9), L.GlobalMaxPooling2D(), L.Dense(2)]
    )
    x = np.random.default_rng(0).random((8, 48, 40, 1), dtype="float32")
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x).parity.sqnr_db > 80


def test_volumes_of_open_depth(tmp_path):
    model = keras.Sequential([keras.Input((None, 8, 8, 2)), L.MaxPooling3D(2), L.GlobalAveragePooling3D()])
    x = np.random.default_rng(0).random((4, 6, 8, 8, 2), dtype="float32")
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x).parity.sqnr_db > 80


# Options that don't go together.


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "auto", "strict": True, "max_drop": 0.1},
        {"recipe": "auto", "allow_select_ops": True, "max_drop": 0.1},
        {"recipe": "dynamic_int8", "strict": True},
        {"recipe": "float32", "layers": {"nothing": "float16"}},
        {"recipe": "auto", "max_drop": 5.0},
    ],
)
def test_options_that_would_do_nothing_are_refused(net, tmp_path, options):
    with pytest.raises(ValueError, match="Allowed"):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", calibration=labelled(), **options)
    assert not (tmp_path / "m.tflite").exists()


def test_select_operations_cannot_be_held_to_a_score(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Resizing(16, 16, "bicubic")])
    with pytest.raises(tfaccel.ExportError, match="Leave them out"):
        tfaccel.export_tflite(
            model,
            tmp_path / "m.tflite",
            calibration=np.random.default_rng(0).random((8, 8, 8, 3), dtype="float32"),
            evaluate=lambda predict: 1.0,
            max_drop=0.1,
            allow_select_ops=True,
        )


# Reports and comparisons.


def test_files_of_other_models_are_told_apart(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")

    def dense(units, names):
        return keras.Sequential(
            [keras.Input((4,), name="x"), L.Dense(units, "relu", name=names[0]), L.Dense(3, name=names[1])]
        )

    tfaccel.export_tflite(dense(8, "ab"), tmp_path / "m.tflite", "int8", calibration=x)
    with pytest.raises(tfaccel.ExportError, match="Is it the file of this model"):
        tfaccel.layer_report(dense(16, "ce"), tmp_path / "m.tflite", x)
    images = keras.Sequential([keras.Input((2, 2, 1), name="x"), L.Flatten(), L.Dense(3)])
    with pytest.raises(tfaccel.ExportError, match="takes samples of shape"):
        tfaccel.compare(images, tmp_path / "m.tflite", x.reshape(64, 2, 2, 1))
    with pytest.raises(ValueError, match="max_samples"):
        tfaccel.compare(dense(8, "ab"), tmp_path / "m.tflite", x, max_samples=-1)


# Searches.


def test_a_resumed_search_knows_other_labels(net, tmp_path):
    x, y = labelled()
    log = tmp_path / "trials.jsonl"
    search = tfaccel.AutoRecipe(resume_from=log)
    wrong = (x, np.random.default_rng(1).permutation(y))
    tfaccel.export_tflite(net, tmp_path / "m.tflite", search, calibration=wrong, max_drop=0.0)
    before = len(log.read_text().splitlines())
    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", search, calibration=(x, y), max_drop=0.0)
    assert file.score.drop <= 0
    assert len(log.read_text().splitlines()) > before
    assert (
        json.loads(log.read_text().splitlines()[0])["of"]
        != json.loads(log.read_text().splitlines()[-1])["of"]
    )


def test_a_recipe_that_cannot_be_built_does_not_end_a_search(tmp_path):
    model = keras.Sequential([keras.Input((None, 2)), L.GRU(4), L.Dense(3)])
    x = np.random.default_rng(0).normal(size=(64, 6, 2)).astype("float32")
    y = model.predict(x, verbose=0).argmax(1)
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "auto", calibration=(x, y), max_drop=0.05)
    problems = [trial for trial in file.search.trials if trial.problem]
    assert [trial.recipe for trial in problems] == ["int8"]
    assert "any number of steps" in problems[0].problem
    assert "any number of steps" in str(file.search)
    assert not set(problems) & set(file.search.pareto())


@pytest.mark.parametrize("place", ["", "missing/trials.jsonl"])
def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path, place):
    with pytest.raises(ValueError, match="a folder that exists"):
        tfaccel.AutoRecipe(resume_from=tmp_path / place)


def test_metadata_is_what_will_be_read_back(net, tmp_path):
    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", metadata={"labels": {0: "cat"}})
    assert tfaccel.TFLiteFile.load(tmp_path / "m.tflite") == file


# The callback.


@pytest.mark.parametrize("metric", ["recall", "f1_score", "accuracy"])
def test_the_best_epoch_is_that_of_keras_own_callbacks(tmp_path, metric):
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 4)).astype("float32")
    y = keras.utils.to_categorical(x[:, 0] > 0, 2)
    metrics = {"recall": keras.metrics.Recall(), "f1_score": keras.metrics.F1Score("macro")}
    model = keras.Sequential([keras.Input((4,)), L.Dense(2, "softmax")])
    model.compile(
        keras.optimizers.Adam(0.05), "categorical_crossentropy", metrics=[metrics.get(metric, metric)]
    )
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", metric, save_best_only=True)
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", calibration=x, monitor=metric)
    model.fit(x, y, epochs=5, verbose=0, callbacks=[best, export])
    theirs = keras.models.load_model(tmp_path / "best.keras")
    assert tfaccel.compare(theirs, tmp_path / "m.tflite", x).sqnr_db > 100


class Figures(keras.callbacks.Callback):
    """Logs a figure that is better when it falls."""

    def __init__(self, values):
        super().__init__()
        self.values = values
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())
        if self.values[epoch] is not None:
            logs["val_figure"] = self.values[epoch]


@pytest.mark.parametrize(("values", "best"), [([np.nan, 3.0, 1.0, 2.0], 2), ([None, 2.0, None, 3.0], 1)])
def test_epochs_without_a_figure_are_passed_over(tmp_path, values, best):
    model = keras.Sequential([keras.Input((8,)), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    figures = Figures(values)
    export = tfaccel.ExportTFLite(
        tmp_path / "m.tflite", calibration=labelled()[0], monitor="val_figure", mode="min"
    )
    model.fit(*labelled(), epochs=4, verbose=0, callbacks=[figures, export])
    model.set_weights(figures.weights[best])
    assert tfaccel.compare(model, tmp_path / "m.tflite", labelled()[0]).sqnr_db > 100


def test_a_validation_figure_that_never_comes(tmp_path):
    model = keras.Sequential([keras.Input((8,)), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", monitor="val_loss")
    with pytest.raises(ValueError, match="Pass validation_data"):
        model.fit(*labelled(), epochs=2, verbose=0, callbacks=[export])


@pytest.mark.parametrize("kind", ["layer", "nan"])
def test_what_can_be_known_before_a_training_is(tmp_path, kind):
    x, y = labelled()
    x = np.where(np.arange(8) == 3, np.nan, x) if kind == "nan" else x
    model = keras.Sequential([keras.Input((8,)), L.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    options = {"layers": {"scroes": "float32"}} if kind == "layer" else {}
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8", calibration=x, options=options)
    with pytest.raises(ValueError, match="Allowed"):
        model.fit(*labelled(), epochs=2, verbose=0, callbacks=[export])
    assert model.optimizer.iterations == 0
    del y
