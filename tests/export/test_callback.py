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
    with pytest.raises(ValueError, match="needs calibration"):
        tfaccel.ExportTFLite(tmp_path / "m.tflite", "int8")
    with pytest.raises(ValueError, match="recipe='tiny'"):
        tfaccel.ExportTFLite(tmp_path / "m.tflite", "tiny")


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
