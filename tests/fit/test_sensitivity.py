"""What each layer's weights can lose: figures by hand, the model as before."""

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel.fit.sensitivity import _reduced


def test_rounding_by_hand():
    values = np.array([-1.0, -0.4, 0.0, 0.3, 0.9], "float32")
    np.testing.assert_allclose(_reduced(values, "bits", 2), [-1, 0, 0, 0, 1])
    np.testing.assert_allclose(_reduced(values, "bits", 3), [-1, -1 / 3, 0, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_array_equal(_reduced(np.zeros(3, "float32"), "bits", 4), 0)


@pytest.fixture(scope="module")
def net(helpers, small):
    model = helpers.compile(helpers.build(), keras.optimizers.Adam(1e-2))
    model.fit(*small, epochs=10, verbose=0)
    return model


def test_scores_are_those_of_evaluate(net, small):
    before = net.get_weights()
    report = tfaccel.sensitivity(net, small, sparsities=[0.0, 0.5, 0.95], bits=[16, 2])
    for a, b in zip(net.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert report.monitor == "accuracy"
    assert report.score == pytest.approx(net.evaluate(*small, verbose=0)[1])
    assert report.rows[0].weight.endswith("/kernel")
    assert len(report.rows) == 5  # the first layer is small, and left alone
    scores = {(row.kind, row.amount): row.score for row in report.rows}
    assert scores["sparsity", 0.0] == report.score
    assert scores["sparsity", 0.95] < report.score - 0.1
    assert abs(scores["bits", 16] - report.score) < 0.01
    kernel = before[2].copy()
    kernel[np.abs(kernel) < np.median(np.abs(kernel))] = 0
    net.set_weights([*before[:2], kernel, before[3]])
    expected = net.evaluate(*small, verbose=0)[1]
    net.set_weights(before)
    assert scores["sparsity", 0.5] == pytest.approx(expected, abs=1e-6)


def test_table_and_plot(net, small, tmp_path):
    layers = [keras.layers.Conv2D, keras.layers.Dense]
    report = tfaccel.sensitivity(net, small, sparsities=[0.5, 0.9], bits=[4], layers=layers, monitor="loss")
    assert len(report.rows) == 6
    text = str(report)
    assert "loss" in text.splitlines()[0]
    assert "50%" in text
    assert report.plot(tmp_path / "both.png").stat().st_size > 5000
    one = tfaccel.sensitivity(net, small, sparsities=[], bits=[4], layers=layers)
    assert one.plot(tmp_path / "one.png").stat().st_size > 5000


def test_the_weights_come_back_after_an_error(net, small):
    before = net.get_weights()
    with pytest.raises(ValueError, match="monitor='auc'"):
        tfaccel.sensitivity(net, small, monitor="auc")

    calls = []

    def data():
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        yield small

    class Once(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return next(data())

    with pytest.raises(KeyboardInterrupt):
        tfaccel.sensitivity(net, Once(), sparsities=[0.9, 0.95], bits=[])
    for a, b in zip(net.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": [1.0]}, "0 ≤ sparsity < 1"),
        ({"bits": [1]}, "2 to 16"),
        ({"bits": [4.0]}, "2 to 16"),
        ({"layers": "nothing"}, "what matches one of"),
    ],
)
def test_bad_arguments(net, small, arguments, message):
    with pytest.raises(ValueError, match=message):
        tfaccel.sensitivity(net, small, **arguments)
    with pytest.raises(ValueError, match="not compiled"):
        tfaccel.sensitivity(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), small)
