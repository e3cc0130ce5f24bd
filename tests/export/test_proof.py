"""What proves a file: calibration checks, the report by layer, the text in the file, the search."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel import cli
from tfaccel.export.interpreter import TFLiteRunner
from tfaccel.export.metadata import with_metadata
from tfaccel.export.samples import Samples
from tfaccel.export.serving import ServingFunction
from tfaccel.export.workbench import Workbench

L = keras.layers


@pytest.fixture(scope="module")
def net(images):
    """A convolutional net with batch normalization, trained on real images until it has learnt something."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), name="image"),
            L.Conv2D(8, 3, strides=2, use_bias=False, name="stem"),
            L.BatchNormalization(name="norm"),
            L.ReLU(name="relu"),
            L.Conv2D(16, 3, strides=2, activation="relu", name="middle"),
            L.Flatten(name="flat"),
            L.Dense(10, name="scores"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    model.fit(images["x_train"][:1000], images["y_train"][:1000], batch_size=50, epochs=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def data(images):
    return images["x_train"][:200], images["y_train"][:200]


# Calibration


def test_real_samples_pass_without_a_word(net, data, tmp_path):
    tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=data)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda x: x * 255,
            r"other values than the model was trained on: at 'norm' .* divide by 255",
        ),
        (lambda x: x / 255, "other values than the model was trained on"),
        (lambda x: x * 0 + 0.5, "holds 200 equal samples"),
        (lambda x: np.where(x > 0.9, np.nan, x), "not finite"),
    ],
)
def test_other_values_than_in_training_are_refused(net, data, tmp_path, change, text):
    with pytest.raises(ValueError, match=text):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=change(data[0]))
    assert list(tmp_path.iterdir()) == []


def plain(shape=(28, 28, 1)):
    return keras.Sequential([keras.Input(shape), L.Conv2D(2, 3), L.Flatten(), L.Dense(3)])


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, shown again by pytest.warns
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: np.round(x * 255), "looks like bytes"),
        (lambda x: np.random.default_rng(0).random(x.shape, dtype="float32"), "looks like noise"),
        (lambda x: x[:8], "holds 8 samples"),
    ],
)
def test_doubtful_samples_are_spoken_of(data, tmp_path, make, text):
    with pytest.warns(UserWarning, match=text):
        tfaccel.export_tflite(plain(), tmp_path / "m.tflite", "int8", calibration=make(data[0]))


def test_bytes_are_fine_where_the_model_scales_them(data, tmp_path):
    model = keras.Sequential([keras.Input((28, 28, 1)), L.Rescaling(1 / 255), L.Conv2D(2, 3)])
    tfaccel.export_tflite(model, tmp_path / "m.tflite", "int8", calibration=np.round(data[0] * 255))


def test_calibration_and_evaluation_on_two_scales_are_refused(data, tmp_path):
    x, y = data
    with pytest.raises(ValueError, match=r"is 0.28.* in the mean, that of the data it is scored on 7"):
        tfaccel.export_tflite(
            plain(), tmp_path / "m.tflite", "int8", calibration=x, evaluate=(x * 255, y % 3), max_drop=1
        )


def test_the_model_is_as_before_a_check(net, data, tmp_path):
    with pytest.raises(ValueError, match="other values"):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=data[0] * 255)
    assert not any("call" in vars(layer) for layer in net.layers)


# The report by layer


def test_the_layer_with_few_bits_is_ranked_first(net, data, tmp_path):
    path = tmp_path / "m.tflite"
    tfaccel.export_tflite(net, path, "dynamic_int8", calibration=data, layers={"middle": "int4_weights"})
    report = tfaccel.layer_report(net, path, data)
    assert report.rows[0].layer == "middle"
    assert report.rows[0].added_noise > 10 * report.rows[-1].added_noise
    assert {row.layer for row in report.rows} == {"stem", "middle", "flat", "scores"}  # the others are fused
    assert report.samples == 64
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "added", "noise", "SQNR", "behind", "it", "weights", "computes"]
    assert "CONV_2D" in lines[1]


def test_the_last_row_is_the_models_own_output(net, data, tmp_path):
    file = tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=data[0][:64])
    report = tfaccel.layer_report(net, file.path, data[0][:64])
    (scores,) = [row for row in report.rows if row.layer == "scores"]
    # Reference kernels and the delegate round differently in the last bit.
    assert scores.sqnr_db == pytest.approx(file.parity.sqnr_db, abs=1.5)


def test_few_rows_of_sorted_samples_are_of_all_classes(net, data, tmp_path, monkeypatch):
    x = data[0][np.argsort(data[1], kind="stable")]
    serving = ServingFunction(net)
    bench = Workbench(net, serving, Samples((x,)), None, None)
    runner = TFLiteRunner(tfaccel.export_tflite(net, tmp_path / "m.tflite", "float32").path)
    seen = []
    predict = runner.predict
    monkeypatch.setattr(runner, "predict", lambda samples, *args: seen.append(samples) or predict(samples))
    assert bench.parity(runner, 20).sqnr_db > 100  # rows of the reference are those of the samples
    labels = {int(np.flatnonzero((x == row).all((1, 2, 3)))[0]) // 20 for row in seen[0].inputs[0]}
    assert labels == set(range(10))


def test_the_report_is_drawn(net, data, tmp_path):
    tfaccel.export_tflite(net, tmp_path / "m.tflite", "int8", calibration=data)
    picture = tfaccel.layer_report(net, tmp_path / "m.tflite", data).plot(tmp_path / "layers.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_file_of_another_model_is_refused(net, data, tmp_path):
    tfaccel.export_tflite(plain(), tmp_path / "m.tflite")
    with pytest.raises(tfaccel.ExportError, match="Is it the file of this model"):
        tfaccel.layer_report(net, tmp_path / "m.tflite", data)


def test_a_failed_gate_names_the_layers(net, data, tmp_path):
    with pytest.raises(tfaccel.ExportError, match=r"Most is lost at .*dB behind it.*layers=\{'") as caught:
        tfaccel.export_tflite(
            net,
            tmp_path / "m.tflite",
            "int4_weights",
            evaluate=iter_scores(0.9, 0.1),
            max_drop=0.1,
            calibration=data,
        )
    assert "fell by 0.8000" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def iter_scores(*values):
    scores = iter(values)
    return lambda predict: next(scores)


# What the file says of itself


def test_the_file_is_read_back(net, data, tmp_path):
    facts = {"labels": ["a", "b"], "input": {"range": [0, 1]}}
    file = tfaccel.export_tflite(
        net,
        tmp_path / "m.tflite",
        "int8",
        calibration=data,
        max_drop=1.0,
        metadata=facts,
        layers={"scores": "float32"},
    )
    loaded = tfaccel.TFLiteFile.load(file.path)
    assert loaded == file
    assert loaded.metadata == facts
    assert loaded.layers == {"scores": "float32"}
    assert loaded.tfaccel == tfaccel.__version__
    assert loaded.score.samples == 200


@pytest.mark.parametrize("metadata", [{"x": np.zeros(2)}, ["labels"], {"f": print}])
def test_metadata_that_no_file_can_hold(net, tmp_path, metadata):
    with pytest.raises(ValueError, match="metadata="):
        tfaccel.export_tflite(net, tmp_path / "m.tflite", metadata=metadata)


def test_foreign_and_damaged_files_are_told_apart(net, data, tmp_path):
    path = tmp_path / "m.tflite"
    content = tfaccel.export_tflite(net, path).path.read_bytes()
    cases = {
        "not a TFLite file": b"PK\x03\x04 a zip archive",
        "damaged|not a TFLite file": content[: len(content) // 3],
        "was not written by tfaccel": with_metadata(content, {}).replace(b"tfaccel", b"another"),
        "another version of tfaccel": with_metadata(content, {"size": 1}),
    }
    for text, damaged in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(tfaccel.ExportError, match=text):
            tfaccel.TFLiteFile.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_not_run(net, data, tmp_path, share):
    content = tfaccel.export_tflite(net, tmp_path / "m.tflite").path.read_bytes()
    path = tmp_path / "short.tflite"
    path.write_bytes(content[: int(share * len(content))])
    for use in (lambda: tfaccel.compare(net, path, data), lambda: tfaccel.benchmark_tflite(path)):
        with pytest.raises(tfaccel.ExportError, match="can't run this file"):
            use()


def test_no_space_left_leaves_the_older_file(net, tmp_path, monkeypatch):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"older")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        tfaccel.export_tflite(net, path)
    assert path.read_bytes() == b"older"
    assert [each.name for each in tmp_path.iterdir()] == ["m.tflite"]


# recipe="auto"


def search(net, data, path, max_drop=0.02, layers=None, **options):
    recipe = tfaccel.AutoRecipe(**options) if options else "auto"
    return tfaccel.export_tflite(
        net, path, recipe, calibration=data, evaluate=data, max_drop=max_drop, layers=layers
    )


def test_the_smallest_that_holds_is_taken(net, data, tmp_path):
    file = search(net, data, tmp_path / "m.tflite")
    assert file.score.drop <= 0.02
    tried = file.search.trials
    assert {trial.recipe for trial in tried} >= {"float32", "dynamic_int8", "int8", "int4_weights"}
    holding = [trial for trial in tried if trial.drop <= 0.02]
    assert file.search.chosen.size_bytes == min(trial.size_bytes for trial in holding)
    assert file.recipe == file.search.chosen.recipe
    assert tfaccel.compare(net, file.path, data[0]).sqnr_db == pytest.approx(file.parity.sqnr_db, abs=0.1)
    assert len(str(file.search).splitlines()) == len(tried) + 1
    front = file.search.pareto()
    assert not any(a.beats(b) for a in front for b in front)


def test_a_drop_of_nothing_mixes_or_falls_back(net, data, tmp_path):
    # 0.5 % of 200 samples is one: four bits everywhere lose more, and some layers are spared.
    file = search(net, data, tmp_path / "m.tflite", max_drop=0.0)
    assert file.score.drop <= 0
    assert any(trial.layers for trial in file.search.trials) or file.recipe == "int4_weights"


def test_the_fastest_that_holds_is_taken(net, data, tmp_path):
    file = search(net, data, tmp_path / "m.tflite", minimize="latency")
    holding = [trial for trial in file.search.trials if trial.drop <= 0.02]
    assert file.search.chosen.latency_ms == min(trial.latency_ms for trial in holding)


def test_a_search_that_was_cut_off_goes_on(net, data, tmp_path):
    log = tmp_path / "trials.jsonl"
    seen = []

    def stop(minimize, trial):
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(net, data, tmp_path / "m.tflite", resume_from=log, report=stop)
    assert len(log.read_text().splitlines()) == 3
    assert not (tmp_path / "m.tflite").exists()
    log.write_text(log.read_text() + '{"recipe": "int8", "lay')  # cut off in the middle of a line
    file = search(net, data, tmp_path / "m.tflite", resume_from=log)
    assert list(file.search.trials[:3]) == seen
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
    assert len(lines) == len(file.search.trials)


def test_trials_of_other_weights_are_passed_over(net, data, tmp_path):
    log = tmp_path / "trials.jsonl"
    first = search(net, data, tmp_path / "m.tflite", resume_from=log)
    other = keras.models.clone_model(net)
    other.set_weights([1.01 * weight for weight in net.get_weights()])
    again = search(other, data, tmp_path / "m.tflite", resume_from=log, max_drop=1.0)
    assert again.search.trials[0].sqnr_db != first.search.trials[0].sqnr_db


def test_a_short_budget_still_gives_a_file(net, data, tmp_path):
    file = search(net, data, tmp_path / "m.tflite", max_drop=0.0, budget_s=1e-6)
    assert file.score.drop <= 0
    assert not any(trial.layers for trial in file.search.trials)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": None}, "needs max_drop"),
        ({"minimize": "speed"}, "minimize='speed'"),
        ({"budget_s": 0}, "budget_s=0"),
        ({"layers": {"stem": "float32"}}, "layers="),
        ({"resume_from": __file__}, "resume_from"),
    ],
)
def test_a_search_that_cannot_be_done(net, data, tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        search(net, data, tmp_path / "m.tflite", **options)


# The command line


def test_the_command_line_does_all_of_it(net, data, tmp_path, capsys):
    model, samples, labels = tmp_path / "m.keras", tmp_path / "d.npz", tmp_path / "labels.txt"
    net.save(model)
    np.savez(samples, x=data[0], y=data[1])
    labels.write_text("\n".join("abcdefghij"))
    path = tmp_path / "m.tflite"

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, capsys.readouterr()

    options = ("--calibration", samples, "--max-drop", 0.1, "--labels", labels)
    code, said = run("export", model, path, "--recipe", "int8", "--layer", "scores=float32", *options)
    assert code == 0
    assert "1 layer otherwise" in said.out
    assert tfaccel.TFLiteFile.load(path).metadata["labels"] == list("abcdefghij")
    code, said = run("compare", model, path, samples, "--layers", "--plot", tmp_path / "p.png")
    assert code == 0
    assert "added noise" in said.out
    code, said = run("export", model, path, "--recipe", "auto", "--minimize", "latency", *options)
    assert code == 0
    assert "→" in said.out
    assert "float32: " in said.err
    assert run("bench", path, "--runs", 5)[0] == 0
    code, said = run("export", model, path, "--layer", "scores")
    assert code == 2
    assert "NAME=RECIPE" in said.err
    path.write_bytes(b"")
    assert run("bench", path)[0] == 1


def test_a_file_of_keras_2_is_exported(tmp_path, capsys):
    """As Keras 2.15 wrote it, but for the version: the configuration says `groups`."""
    import h5py

    path = tmp_path / "old.h5"
    keras.Sequential([keras.Input((8, 8, 4)), L.DepthwiseConv2D(3), L.Flatten(), L.Dense(3)]).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            if layer["class_name"] == "DepthwiseConv2D":
                layer["config"]["groups"] = 1
        file.attrs["model_config"] = json.dumps(config)
    assert cli.main(["export", str(path), str(tmp_path / "m.tflite")]) == 0


@pytest.mark.slow
def test_a_killed_export_leaves_the_older_file_or_a_whole_one(net, tmp_path):
    model, path = tmp_path / "m.keras", tmp_path / "m.tflite"
    net.save(model)
    path.write_bytes(b"older")
    command = [sys.executable, "-m", "tfaccel", "export", str(model), str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.kill()
    process.wait()
    if path.read_bytes() != b"older":  # it had just been done, where the machine is fast
        assert TFLiteRunner(path).run((np.zeros((1, *net.input_shape[1:]), "float32"),))
