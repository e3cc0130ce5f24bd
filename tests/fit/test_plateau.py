"""The rule against Keras's own, on any schedule, and over an interruption."""

import keras
import numpy as np
import pytest

import tfaccel
from tfaccel import Plateau, schedules


class Figures(keras.callbacks.Callback):
    """Gives `fit` the figures of a list."""

    def __init__(self, values, name="val_loss"):
        super().__init__()
        self.values, self.name = values, name

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.values[epoch]


def model():
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    net.compile(keras.optimizers.SGD(0.5), "mse")
    return net


X, Y = np.ones((8, 4), "float32"), np.zeros((8, 2), "float32")


def rates(values, callback, net=None, **options):
    callbacks = [Figures(values), *options.pop("before", ()), callback]
    history = (net or model()).fit(
        X, Y, epochs=options.pop("epochs", len(values)), verbose=0, callbacks=callbacks, **options
    )
    return history.history["learning_rate"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_falls_where_keras_own_does(seed, cooldown, mode):
    values = (
        np.random.default_rng(seed).random(30).cumsum() * (-1) ** seed
        + np.random.default_rng(9).random(30) * 8
    )
    given = {
        "monitor": "val_loss",
        "factor": 0.5,
        "patience": 2,
        "min_delta": 0.1,
        "cooldown": cooldown,
        "mode": mode,
    }
    keras_own = keras.callbacks.ReduceLROnPlateau(**given)
    net = model()
    net.optimizer.learning_rate = 0.1
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    net.fit(X, Y, epochs=30, verbose=0, callbacks=[Figures(values), keras_own, Note()])
    ours = rates(values, tfaccel.LearningRate(0.1, schedules.constant(), plateau=Plateau(**given)))
    np.testing.assert_allclose(ours, seen, rtol=1e-6)
    assert len(set(ours)) > 1


def test_a_first_figure_that_is_no_number_is_waited_for():
    given = {"monitor": "val_loss", "factor": 0.5, "patience": 2}
    rate = tfaccel.LearningRate(0.1, schedules.constant(), plateau=Plateau(**given))
    found = rates([np.nan, np.nan, 0.7, 0.6], rate)
    np.testing.assert_allclose(found, [0.1, 0.1, 0.05, 0.05], rtol=1e-6)  # as ReduceLROnPlateau


def test_it_multiplies_the_schedule():
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    shape = schedules.linear()
    alone = rates(values, tfaccel.LearningRate(0.1, shape))
    rule = Plateau(factor=0.5, patience=2, least=0.3)
    both = rates(values, tfaccel.LearningRate(0.1, shape, plateau=rule))
    np.testing.assert_allclose(np.array(both[:-1]) / alone[:-1], [1, 1, 1, 0.5, 0.5], rtol=1e-5)
    longer = rates([1.0] * 9, tfaccel.LearningRate(0.1, schedules.constant(), plateau=rule))
    np.testing.assert_allclose(longer, [0.1] * 3 + [0.05] * 2 + [0.03] * 4, rtol=1e-5)


def test_the_learning_rate_comes_back_and_the_next_fit_begins_anew():
    net, callback = model(), tfaccel.LearningRate(0.1, schedules.constant(), plateau=Plateau(patience=1))
    first = rates([1.0] * 4, callback, net)
    assert float(keras.ops.convert_to_numpy(net.optimizer.learning_rate)) == 0.5
    assert rates([1.0] * 4, callback, net) == first


def test_it_goes_on_where_an_interrupted_run_was(tmp_path):
    values = [5.0, 4.0, 4.0, 4.0, 4.0, 3.9, 3.9, 3.9, 3.9, 3.9]
    rule = Plateau(factor=0.5, patience=2)

    def callback():
        return tfaccel.LearningRate(0.1, schedules.cosine(0.1), plateau=rule)

    whole = rates(values, callback())

    class Stops(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 5:
                raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        rates(values, callback(), before=[backup, Stops()])
    resumed = rates(
        values, callback(), model(), before=[keras.callbacks.BackupAndRestore(tmp_path / "backup")]
    )
    np.testing.assert_allclose(resumed, whole[5:], rtol=1e-5)
    assert not list(tmp_path.rglob("*plateau*"))


def test_validation_may_come_less_often():
    rule = Plateau(patience=1, factor=0.5, min_delta=1e6)
    callback = tfaccel.LearningRate(0.1, schedules.constant(), plateau=rule)
    seen = (
        model()
        .fit(X, Y, epochs=7, verbose=0, callbacks=[callback], validation_data=(X, Y), validation_freq=2)
        .history["learning_rate"]
    )
    np.testing.assert_allclose(seen, [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025], rtol=1e-6)
    wrong = tfaccel.LearningRate(0.1, schedules.constant(), plateau=Plateau("val_los"))
    with pytest.raises(ValueError, match="val_los"):
        model().fit(X, Y, verbose=0, callbacks=[wrong], validation_data=(X, Y))


def test_a_backup_that_is_kept_keeps_what_was_seen(tmp_path):
    rule = Plateau(factor=0.5, patience=1)

    def fit(epochs):
        keep = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        callback = tfaccel.LearningRate(0.1, schedules.constant(), plateau=rule)
        return rates([1.0] * 6, callback, model(), epochs=epochs, before=[keep])

    np.testing.assert_allclose(fit(3), [0.1, 0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(fit(5), [0.025, 0.0125], rtol=1e-6)


def test_bad_arguments_are_refused():
    for given, words in [
        ({"monitor": 3}, "monitor=3"),
        ({"factor": 1.0}, "factor=1.0"),
        ({"patience": 0}, "patience=0"),
        ({"mode": "up"}, "mode='up'"),
        ({"min_delta": -1}, "min_delta=-1"),
        ({"cooldown": 0.5}, "cooldown=0.5"),
        ({"least": 2}, "least=2"),
    ]:
        with pytest.raises(ValueError, match=words):
            Plateau(**given)
    with pytest.raises(ValueError, match="plateau='loss'"):
        tfaccel.LearningRate(0.1, plateau="loss")
    with pytest.raises(ValueError, match="validation_data"):
        model().fit(X, Y, verbose=0, callbacks=[tfaccel.LearningRate(0.1, plateau=Plateau())])


def test_among_the_callbacks_it_says_where_it_belongs(helpers, small):
    model = helpers.compile(helpers.build())
    with pytest.raises(ValueError, match=r"LearningRate\(plateau=.*monitor='loss'"):
        model.fit(*small, verbose=0, callbacks=[tfaccel.Plateau("loss")])
