"""The export as a callback: at the end, behind what changes the weights."""

import keras
import numpy as np
import pytest

import tfaccel


def test_exports_the_model_that_the_user_ends_with(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", calibration=small)
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    model = helpers.compile(helpers.build())
    model.fit(*small, epochs=4, verbose=0, callbacks=[stop, export])
    assert tfaccel.compare(model, export.file.path, small).sqnr_db > 100


@pytest.mark.parametrize(
    "late",
    [
        keras.callbacks.EarlyStopping("loss", restore_best_weights=True),
        keras.callbacks.SwapEMAWeights(),
    ],
    ids=lambda c: type(c).__name__,
)
def test_wrong_order_is_refused_before_the_first_step(helpers, small, tmp_path, late):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite")
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(use_ema=True))
    with pytest.raises(ValueError, match=f"before {type(late).__name__}"):
        model.fit(*small, verbose=0, callbacks=[export, late])
    assert int(model.optimizer.iterations) == 0


def test_an_early_stopping_that_keeps_the_last_weights_may_stand_anywhere(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite")
    stop = keras.callbacks.EarlyStopping("loss")
    helpers.compile(helpers.build()).fit(*small, verbose=0, callbacks=[export, stop])
    assert export.file is not None


def test_a_refused_export_leaves_the_trained_model(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", evaluate=iter_scores(0.9, 0.1), max_drop=0.1)
    model = helpers.compile(helpers.build())
    before = model.get_weights()
    with pytest.raises(tfaccel.ExportError, match=r"fell by 0\.8"):
        model.fit(*small, verbose=0, callbacks=[export])
    assert not np.array_equal(before[0], model.get_weights()[0])
    assert list(tmp_path.iterdir()) == []
    model.fit(*small, verbose=0)


def iter_scores(*values):
    scores = iter(values)
    return lambda predict: next(scores)


def test_max_drop_takes_the_labels_of_calibration(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8", calibration=small, max_drop=0.1)
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(1e-2))
    model.fit(*small, epochs=3, verbose=0, callbacks=[export])
    assert export.file.score.samples == 240


def test_bad_arguments_at_construction(tmp_path):
    with pytest.raises(ValueError, match="recipe='tiny'"):
        tfaccel.ExportTFLite(tmp_path / "m.tflite", "tiny")


def test_without_samples_or_learned_ranges_the_fit_does_not_begin(helpers, small, tmp_path):
    model = helpers.compile(helpers.build())
    before = model.get_weights()
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8")
    with pytest.raises(ValueError, match="needs calibration"):
        model.fit(*small, verbose=0, callbacks=[export])
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"calibration": np.zeros((4, 9, 9, 1))}, "shape"),
        ({"calibration": np.zeros((4, 7, 7, 1)), "max_drop": 0.1}, "no labels"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(helpers, small, tmp_path, arguments, text):
    model = helpers.compile(helpers.build())
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", **arguments)
    with pytest.raises(ValueError, match=text):
        model.fit(*small, verbose=0, callbacks=[export])
    assert int(model.optimizer.iterations) == 0


class Spoil(keras.callbacks.Callback):
    """Sets the weights to a constant of the epoch, and says how good that was."""

    def on_epoch_end(self, epoch, logs):
        self.model.set_weights([np.full_like(weight, epoch) for weight in self.model.get_weights()])
        logs["val_figure"] = logs["val_accuracy"] = logs["val_loss"] = [0.5, 0.1, 0.9, 0.4][epoch]


@pytest.mark.parametrize(
    ("monitor", "mode", "best"),
    [
        ("val_figure", "min", 1),
        ("val_figure", "max", 2),
        ("val_accuracy", "auto", 2),
        ("val_loss", "auto", 1),
    ],
)
def test_the_best_epoch_is_exported_and_the_model_keeps_its_own(small, tmp_path, monitor, mode, best):
    model = keras.Sequential([keras.Input((49,)), keras.layers.Dense(10)])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", monitor=monitor, mode=mode)
    x = small[0].reshape(-1, 49)
    model.fit(x, small[1], epochs=4, verbose=0, callbacks=[Spoil(), export])
    assert {float(weight.max()) for weight in model.get_weights()} == {3.0}
    expected = keras.models.clone_model(model)
    expected.set_weights([np.full_like(weight, best) for weight in model.get_weights()])
    assert tfaccel.compare(expected, export.file.path, x).sqnr_db > 100


def test_a_figure_whose_direction_nobody_knows(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", monitor="val_figure")
    with pytest.raises(ValueError, match=r"mode='auto'.*'min' or 'max'"):
        helpers.compile(helpers.build()).fit(*small, epochs=4, verbose=0, callbacks=[Spoil(), export])


def test_a_figure_that_does_not_exist_is_named_after_the_first_epoch(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(tmp_path / "m.tflite", monitor="val_acuracy")
    with pytest.raises(ValueError, match=r"monitor='val_acuracy'.*Allowed: .*loss"):
        helpers.compile(helpers.build()).fit(*small, epochs=3, verbose=0, callbacks=[export])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "best"}, "mode='best'"),
        ({"options": {"layer": {}}}, "options="),
        ({"options": {"recipe": "int8"}}, "options="),
        ({"options": {"layers": {"a": "int3"}}}, "recipe='int3'"),
        ({"recipe": "auto"}, "needs max_drop"),
    ],
)
def test_bad_arguments_are_refused_at_construction(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=text):
        tfaccel.ExportTFLite(tmp_path / "m.tflite", **arguments)


def test_a_search_at_the_end_of_fit(helpers, small, tmp_path):
    export = tfaccel.ExportTFLite(
        tmp_path / "m.tflite", tfaccel.AutoRecipe(budget_s=1), calibration=small, max_drop=0.1
    )
    helpers.compile(helpers.build()).fit(*small, verbose=0, callbacks=[export])
    assert export.file.score.drop <= 0.1
    assert export.file.search.trials
