"""Export through the real converter and interpreter: what comes out, what is refused, what is kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.recipes import RECIPES
from tfaccel.export.tflite import find_problem
from tfaccel.export.workbench import Candidate

RECIPE_NAMES = list(RECIPES)


@pytest.fixture(scope="module")
def trained(helpers):
    """A model of each kind, trained a little on real images."""
    models = {}

    def get(kind, small):
        if kind not in models:
            models[kind] = helpers.compile(helpers.build(kind), keras.optimizers.Adam(1e-2))
            models[kind].fit(*small, epochs=4, verbose=0)
        return models[kind]

    return get


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_recipe_for_every_kind(trained, small, tmp_path, kind, recipe):
    model = trained(kind, small)
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=small, evaluate=small)
    assert file.path.stat().st_size == file.size_bytes
    assert file.on_real_data
    assert file.samples == 240
    assert file.score.samples == 240
    # 24 and 11 bits of mantissa, 8 and 4 bits of 7 sigma ranges; sums of 100 terms keep most of them.
    floor = {"float32": 100, "float16": 50, "int4_weights": 10, "int16x8": 30}.get(recipe, 25)
    assert file.parity.sqnr_db > floor
    assert file.parity.top1_agreement > (0.7 if recipe == "int4_weights" else 0.9)
    assert file.float_operations == ()
    model_accuracy = model.evaluate(*small, verbose=0)[1]
    assert file.score.model == pytest.approx(model_accuracy, abs=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


@pytest.fixture
def file(trained, small, tmp_path):
    return tfaccel.export_tflite(trained("sequential", small), tmp_path / "m.tflite")


def test_batch_size_stays_open(trained, small, file):
    runner = TFLiteRunner(file.path)
    for rows in (1, 7, 3):
        (output,) = runner.run((small[0][:rows],)).values()
        assert output.shape == (rows, 10)


def test_runs_in_the_plain_interpreter_by_signature(trained, small, file):
    """As a user of the file would: no tfaccel in it."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file.path))
    runner = interpreter.get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    (output,) = runner(**{name: small[0][:5]}).values()
    expected = trained("sequential", small).predict(small[0][:5], verbose=0)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors")  # it is for looking inside
def test_int8_file_computes_in_int8(trained, small, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    path = tmp_path / "m.tflite"
    tfaccel.export_tflite(trained("sequential", small), path, "int8", calibration=small)
    interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    kinds = [np.dtype(d["dtype"]).name for d in interpreter.get_tensor_details()]
    # Input and output stay float, and each has one conversion; everything between is integer.
    assert kinds.count("int8") >= 5
    assert kinds.count("float32") == 2


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
def test_mixed_precision_models_convert(helpers, small, tmp_path, policy, kind):
    keras.config.set_dtype_policy(policy)
    model = helpers.compile(helpers.build(kind), keras.optimizers.Adam(1e-2))
    keras.config.set_dtype_policy("float32")
    model.fit(*small, epochs=1, verbose=0)
    before = model.get_weights()
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=small)
    # The model itself computes with 8 or 11 bits: 48 or 66 dB, less the sums.
    assert file.parity.sqnr_db > (30 if policy == "mixed_bfloat16" else 45)
    assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixed_precision_with_lambda_and_plain_functions(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    layers = [keras.layers.Dense(8, activation=lambda x: x * 0.5), keras.layers.Lambda(lambda x: x + 1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    keras.config.set_dtype_policy("float32")
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite").parity.sqnr_db > 30
    assert model.layers[0].dtype_policy.name == "mixed_bfloat16"


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_models_with_half_precision_weights_convert(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    layers = keras.layers
    stack = [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((8, 8, 3)), *stack, layers.Dense(5)])
    keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).random((40, 8, 8, 3), dtype="float32")
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x)
    assert file.parity.sqnr_db > (30 if policy == "bfloat16" else 45)  # 8 or 11 bits, less the sums
    assert {layer.dtype_policy.name for layer in model.layers} == {policy}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_canary_the_converter_refuses_half_precision(helpers, policy):
    keras.config.set_dtype_policy(policy)
    model = helpers.build()
    keras.config.set_dtype_policy("float32")
    with pytest.raises(Exception, match=r"convert|legalize|failed|Converter"):
        tf.lite.TFLiteConverter.from_keras_model(model).convert()


def test_a_dict_goes_to_list_inputs_by_name(tmp_path):
    first, second = keras.Input((2,), name="b"), keras.Input((2,), name="a")
    model = keras.Model([first, second], keras.layers.Subtract()([first, second]))
    x = {"a": np.full((4, 2), 1.0, "float32"), "b": np.full((4, 2), 5.0, "float32")}
    seen = []

    def score(predict):
        seen.append(predict(x).mean())
        return 0.0

    tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=x, evaluate=score)
    assert seen == [4.0, 4.0]
    with pytest.raises(ValueError, match=r"inputs named \['a', 'c'\]"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration={"a": x["a"], "c": x["b"]})


def test_output_names_that_clean_to_the_same_stay_two(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, {"p/x": keras.layers.Dense(1)(inputs), "p.x": keras.layers.Dense(2)(inputs)})
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite")
    assert len(TFLiteRunner(file.path).run((np.ones((1, 2), "float32"),))) == 2


def test_a_dataset_without_end_is_refused(trained, small, tmp_path):
    endless = tf.data.Dataset.from_tensor_slices(small).batch(8).repeat()
    with pytest.raises(ValueError, match="has no end"):
        tfaccel.export_tflite(
            trained("sequential", small), tmp_path / "m.tflite", calibration=endless, max_drop=0.1
        )


def test_several_inputs_and_outputs_keep_their_names(tmp_path):
    first, second = keras.Input((8,), name="numbers"), keras.Input((6, 6, 2), name="picture")
    flat = keras.layers.Flatten()(keras.layers.Conv2D(4, 3)(second))
    joined = keras.layers.Concatenate()([first, flat])
    outputs = {"score": keras.layers.Dense(3)(joined), "size": keras.layers.Dense(1)(joined)}
    model = keras.Model({"numbers": first, "picture": second}, outputs)
    generator = np.random.default_rng(0)
    x = {"numbers": generator.random((40, 8)), "picture": generator.random((40, 6, 6, 2))}
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)
    assert file.parity.sqnr_db > 25
    runner = TFLiteRunner(file.path)
    rows = {name: array[:3].astype("float32") for name, array in x.items()}
    assert {k: v.shape for k, v in runner.run(rows).items()} == {"score": (3, 3), "size": (3, 1)}


def test_layer_names_that_upset_the_saved_model_step(tmp_path):
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Conv2D(2, 3, name="_under.score"), layers.Flatten(name="a.b")]
    )
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite").parity.sqnr_db > 100


def test_without_data_it_is_said(trained, small, tmp_path):
    file = tfaccel.export_tflite(trained("sequential", small), tmp_path / "m.tflite")
    assert not file.on_real_data
    assert "random samples" in str(file)


def test_integer_input(tmp_path):
    model = keras.Sequential(
        [keras.Input((5,), dtype="int32"), keras.layers.Embedding(2, 4), keras.layers.Flatten()]
    )
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite").parity.max_abs_error == 0


def calibration_forms(x, y):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[index * 80 : (index + 1) * 80], y[index * 80 : (index + 1) * 80]

    slices = tf.data.Dataset.from_tensor_slices
    return {
        "array": x,
        "float64": x.astype("float64"),
        "pair": (x, y),
        "batches": slices((x, y)).batch(50),
        "samples": slices(x),
        "samples with labels": slices((x, y)),
        "pydataset": Batches(),
    }


@pytest.mark.parametrize("form", calibration_forms(np.zeros((240, 1)), np.zeros(240)))
def test_calibration_takes_every_form_alike(trained, small, tmp_path, form):
    model = trained("sequential", small)
    data = calibration_forms(*small)[form]
    file = tfaccel.export_tflite(model, tmp_path / "a.tflite", "int8", calibration=data)
    again = tfaccel.export_tflite(model, tmp_path / "b.tflite", "int8", calibration=small[0])
    assert file.samples == 240
    assert file.parity == again.parity


def test_a_function_scores_model_and_file(trained, small, tmp_path):
    seen = []

    def score(predict):
        outputs = predict(small[0])
        seen.append(outputs)
        return float((outputs.argmax(-1) == small[1]).mean())

    model = trained("sequential", small)
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", evaluate=score, max_drop=0.01)
    assert len(seen) == 2
    assert file.score.model == file.score.file
    assert file.score.samples is None


def test_a_drop_that_is_too_large_leaves_the_older_file(trained, small, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"older")
    scores = iter([0.9, 0.8])
    with pytest.raises(tfaccel.ExportError, match=r"fell by 0.1000.*Nothing was written"):
        tfaccel.export_tflite(
            trained("sequential", small), path, evaluate=lambda predict: next(scores), max_drop=0.05
        )
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_interrupted_writing_leaves_the_older_file(trained, small, tmp_path, monkeypatch):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"older")

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tfaccel.export_tflite(trained("sequential", small), path)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_a_layer_that_cannot_be_converted_is_named(tmp_path):
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Resizing(16, 16, "bicubic", name="enlarges")]
    )
    with pytest.raises(tfaccel.ExportError, match="no operation ResizeBicubic, which layer enlarges of"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite")
    assert list(tmp_path.iterdir()) == []
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", allow_select_ops=True)
    assert file.parity is None
    assert "NOT RUN" in str(file)
    assert tfaccel.TFLiteFile.load(file.path) == file
    with pytest.raises(tfaccel.ExportError, match="can't run this file"):
        TFLiteRunner(file.path)
    with pytest.raises(tfaccel.ExportError, match="can't be proven"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "dynamic_int8", allow_select_ops=True)


def test_a_table_is_refused_with_its_layer(tmp_path):
    lookup = keras.layers.IntegerLookup(vocabulary=[1, 2, 3], name="codes")
    model = keras.Sequential([keras.Input((4,), dtype="int64"), lookup])
    with pytest.raises(tfaccel.ExportError, match="codes can't be converted: it looks values up"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite")


RECURRENT = {
    "lstm": lambda layers: [layers.LSTM(5)],
    "gru": lambda layers: [layers.GRU(5, return_sequences=True)],
    "simple": lambda layers: [layers.SimpleRNN(5)],
    "bidirectional": lambda layers: [layers.Bidirectional(layers.GRU(3))],
    "stacked": lambda layers: [layers.LSTM(5, return_sequences=True), layers.Dropout(0.5), layers.GRU(3)],
    "masked": lambda layers: [layers.Masking(), layers.LSTM(5)],
    "convolutional": lambda layers: [
        layers.Reshape((6, 4, 1, 1)),
        layers.ConvLSTM2D(2, (3, 1), padding="same"),
    ],
    "embedding": lambda layers: [layers.Lambda(lambda x: x[:, :, 0]), layers.Embedding(9, 4), layers.LSTM(5)],
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("recipe", ["float32", "float16", "dynamic_int8"])
def test_recurrent_layers_run_one_sample_a_call(tmp_path, kind, recipe):
    model = keras.Sequential([keras.Input((6, 4)), *RECURRENT[kind](keras.layers), keras.layers.Flatten()])
    x = np.random.default_rng(0).integers(0, 9, (20, 6, 4)).astype("float32")
    x[:, 4:] = 0  # what Masking leaves out
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
    assert file.batch_size == 1
    assert "takes 1 sample a call" in str(file)
    # float16 weights carry 11 bits (66 dB), int8 ones about 40 dB, less what six steps add up.
    assert file.parity.sqnr_db > {"float32": 90, "float16": 50, "dynamic_int8": 25}[recipe]


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("recipe", ["int8", "int16x8"])
def test_recurrent_layers_with_fixed_ranges_are_unrolled(tmp_path, kind, recipe):
    model = keras.Sequential([keras.Input((6, 4)), *RECURRENT[kind](keras.layers), keras.layers.Flatten()])
    x = np.random.default_rng(0).integers(0, 9, (64, 6, 4)).astype("float32")
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
    assert file.batch_size is None
    # 8 bits are about 40 dB, less what six steps add up, and less where values are a hundredth of a range.
    assert file.parity.sqnr_db > (10 if kind == "embedding" else 18)
    assert not any(getattr(layer, "unroll", False) for layer in model.layers)


def test_a_long_sequence_is_not_unrolled(tmp_path):
    model = keras.Sequential([keras.Input((500, 2)), keras.layers.GRU(2, name="long")])
    x = np.random.default_rng(0).random((40, 500, 2), dtype="float32")
    with pytest.raises(
        tfaccel.ExportError, match="long can't be converted to fixed ranges: it takes 500 steps"
    ):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=x)


@pytest.mark.parametrize("recipe", ["float32", "dynamic_int8", "int8"])
def test_a_stateful_layer_keeps_its_state_in_the_file(tmp_path, recipe):
    model = keras.Sequential(
        [keras.Input((6, 4), batch_size=2), keras.layers.LSTM(5, stateful=True), keras.layers.Dense(3)]
    )
    x = np.random.default_rng(0).random((41, 6, 4), dtype="float32")
    model(x[:2])  # the model has seen something, and goes on from there afterwards
    before = [state.numpy() for state in model.layers[0].states]
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
    assert file.batch_size == 2
    assert file.samples == 40
    np.testing.assert_array_equal([state.numpy() for state in model.layers[0].states], before)
    model.layers[0].reset_states()
    runner = TFLiteRunner(file.path)
    for rows in (x[:2], x[:2], x[2:4]):
        (output,) = runner.run((rows,)).values()
        np.testing.assert_allclose(output, model(rows), atol={"float32": 1e-6}.get(recipe, 0.03))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_recurrent_layers_in_half_precision(tmp_path, policy):
    layers = [keras.layers.LSTM(5, dtype=policy), keras.layers.Dense(3, dtype="float32")]
    model = keras.Sequential([keras.Input((6, 4)), *layers])
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite")
    assert file.batch_size == 1


class Summed(keras.layers.Layer):
    """Adds up its input in a loop that is not one of Keras's layers."""

    def call(self, x):
        return keras.ops.scan(
            lambda sums, step: (sums + step, sums), x[:, 0] * 0, keras.ops.swapaxes(x, 0, 1)
        )[0]


def test_a_loop_in_a_layer_of_the_users(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), Summed(), keras.layers.Dense(2)])
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite").batch_size == 1


def test_an_unrolled_layer_keeps_the_batch_open(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), keras.layers.GRU(5, unroll=True)])
    x = np.random.default_rng(0).random((50, 6, 4), dtype="float32")
    for recipe in ("float32", "int8"):
        file = tfaccel.export_tflite(model, tmp_path / "m.tflite", recipe, calibration=x)
        assert file.batch_size is None
        assert file.parity.sqnr_db > 15


def test_the_batch_stays_open_without_loops(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite")
    assert file.batch_size is None
    assert "a call" not in str(file)


def test_a_file_that_disagrees_is_refused():
    def problem(recipe, sqnr_db, max_drop=None, score=None, error=1.0):
        figures = tfaccel.Parity(error, sqnr_db, top1_agreement=0.5)
        return find_problem(Candidate(RECIPES[recipe], b"", figures, score, None, ()), max_drop)

    assert "does not agree" in problem("float32", 3.0)
    assert "does not agree" in problem("int8", 3.0)
    assert "does not agree" in problem("int8", float("nan"), 0.1, tfaccel.Score(1, 1), error=float("nan"))
    assert problem("int8", 11.0) == ""
    assert problem("int8", 3.0, 0.1, tfaccel.Score(0.9, 0.85)) == ""  # judged by the score
    assert "fell by" in problem("int8", 30.0, 0.1, tfaccel.Score(0.9, 0.7))
    assert 0.838 - 0.833 > 0.005  # in floats
    assert problem("int8", 30.0, 0.005, tfaccel.Score(0.838, 0.833)) == ""
    assert "fell by" in problem("int8", 30.0, 0.005, tfaccel.Score(0.838, 0.832))
    assert "does not agree" in problem("float32", 3.0, 0.1, tfaccel.Score(0.9, 0.9))


def test_a_layer_that_is_random_at_inference_is_caught(tmp_path):
    class Noisy(keras.layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    tf.random.set_seed(None)  # with a seed, model and file draw the same numbers
    model = keras.Sequential([keras.Input((4,)), Noisy()])
    with pytest.raises(tfaccel.ExportError):
        tfaccel.export_tflite(model, tmp_path / "m.tflite")


def test_a_subclassed_model_with_two_inputs_needs_a_signature(tmp_path):
    class Sum(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(inputs["a"] + inputs["b"])

    model = Sum()
    model({"a": np.zeros((1, 3), "float32"), "b": np.zeros((1, 3), "float32")})
    with pytest.raises(ValueError, match="input_signature"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite")
    spec = tf.TensorSpec([None, 3], "float32")
    file = tfaccel.export_tflite(model, tmp_path / "m.tflite", input_signature={"a": spec, "b": spec})
    assert file.parity.max_abs_error < 1e-5


def test_a_mirrored_model_exports(helpers, small, tmp_path):
    accelerator = tfaccel.Accelerator("mirrored", "float32")
    with accelerator.scope():
        model = helpers.compile(helpers.build())
    model.fit(*small, batch_size=24, verbose=0)
    assert tfaccel.export_tflite(model, tmp_path / "m.tflite", calibration=small).parity.sqnr_db > 100


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"recipe": "int4"}, "recipe='int4'"),
        ({"recipe": "int8"}, "needs calibration data"),
        ({"max_drop": 0.01}, "without data"),
        ({"max_drop": 5, "calibration": np.zeros((3, 7, 7, 1))}, "max_drop=5"),
        ({"calibration": np.zeros((3, 8, 8, 1))}, r"shape \(8, 8, 1\)"),
        ({"calibration": np.zeros((0, 7, 7, 1))}, "no samples"),
        ({"calibration": np.full((3, 7, 7, 1), "a")}, "holds text"),
        ({"calibration": [np.zeros((3, 7, 7, 1))] * 2}, "2 inputs"),
        ({"calibration": (i for i in range(3))}, "is not data"),
        ({"calibration": np.zeros((3, 7, 7, 1)), "max_drop": 0.1}, "no labels"),
        ({"evaluate": (np.zeros((3, 7, 7, 1)), None), "max_drop": 0.1}, "no labels"),
    ],
)
def test_bad_arguments(helpers, tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        tfaccel.export_tflite(helpers.build(), tmp_path / "m.tflite", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_do_not_vary_have_no_coefficient_of_determination(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="labels that vary"):
        tfaccel.export_tflite(model, tmp_path / "m.tflite", evaluate=(np.ones((4, 3)), np.full(4, 2.0)))


@pytest.mark.parametrize("where", ["missing/m.tflite", "."])
def test_unwritable_path_is_refused_before_anything_is_done(helpers, tmp_path, where):
    with pytest.raises(ValueError, match="can't be written"):
        tfaccel.export_tflite(helpers.build(), tmp_path / where)
    with pytest.raises(ValueError, match="can't be written"):
        tfaccel.ExportTFLite(tmp_path / where)


def test_not_a_model_and_not_built(tmp_path):
    with pytest.raises(ValueError, match="can't be exported"):
        tfaccel.export_tflite("model.keras", tmp_path / "m.tflite")
    with pytest.raises(ValueError, match="not built"):
        tfaccel.export_tflite(keras.Sequential([keras.layers.Dense(1)]), tmp_path / "m.tflite")
