"""The axes multiply: every pair of values of any two axes trains as plain Keras does."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from distribution_cells import Batches

import tfaccel

AXES = {
    "precision": ("float32", "mixed_bfloat16", "mixed_float16"),
    "jit": (False, True),
    "steps": (1, 3),
    "accumulation": (None, 2),
    "kind": ("sequential", "functional", "subclassed"),
    "data": ("arrays", "dataset", "stream", "python"),
    "optimizer": ("adam", "sgd", "lion"),
}


def pairwise(axes):
    """Few cells in which every pair of values of two axes occurs; greedy, always the same."""
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b]}
    everything = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    cells = []
    while pairs:
        best = max(everything, key=lambda cell: len(pairs & set(itertools.combinations(cell.items(), 2))))
        pairs -= set(itertools.combinations(best.items(), 2))
        cells.append(best)
    return cells


CELLS = pairwise(AXES)


def test_every_pair_occurs():
    assert len(CELLS) < 30
    for a, b in itertools.combinations(AXES, 2):
        assert {(cell[a], cell[b]) for cell in CELLS} == set(itertools.product(AXES[a], AXES[b]))


def train(helpers, small, cell, plain):
    accelerator = tfaccel.Accelerator(
        precision=keras.DTypePolicy(cell["precision"]),  # by name, a CPU without float16 would refuse it
        jit=False if plain else cell["jit"],
        kernels="plain" if plain else "fused",
        steps_per_execution=1 if plain else cell["steps"],
    )
    make = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD, "lion": keras.optimizers.Lion}
    options = {"learning_rate": 1e-3, "gradient_accumulation_steps": cell["accumulation"]}
    with accelerator.scope():
        model = helpers.build(cell["kind"])
        optimizer = make[cell["optimizer"]](**options)
        helpers.compile(model, optimizer, **accelerator.compile_options())
    x, y = small
    data = {
        "arrays": lambda: {"x": x, "y": y, "batch_size": 50},
        "dataset": lambda: {"x": accelerator.dataset(x, y, batch_size=50, shuffle=False)},
        "stream": lambda: {"x": tf.data.Dataset.from_tensor_slices(small).batch(50)},
        "python": lambda: {"x": Batches(x, y, 50)},
    }[cell["data"]]()
    history = model.fit(**data, epochs=2, verbose=0, shuffle=False)
    return model, history.history


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(str(value) for value in cell.values()))
def test_a_cell_trains_as_plain_keras_does(helpers, small, cell):
    """240 samples in batches of 50 for two epochs: ten steps, two of them partial."""
    plain, expected = train(helpers, small, cell, plain=True)
    fused, history = train(helpers, small, cell, plain=False)
    # In float32 a change is off by some thousand roundings of itself. In half precision the gradient has 8
    # or 11 bits, Adam makes full steps of what is noise, and Lion takes signs: those may differ in part.
    half = cell["precision"] != "float32"
    signs = cell["optimizer"] == "lion" or (half and cell["optimizer"] == "adam")
    allowed = 0.35 if signs else 0.1 if half else 1e-3
    start = helpers.build(cell["kind"]).get_weights()
    for a, b, c in zip(plain.get_weights(), fused.get_weights(), start, strict=True):
        moved = np.linalg.norm(a - c)
        assert moved > 1e-4
        assert np.linalg.norm(a - b) <= allowed * moved + 4e-7 * np.linalg.norm(a)
    np.testing.assert_allclose(expected["loss"], history["loss"], rtol=2e-2 if half else 1e-4)
    steps = [int(keras.ops.convert_to_numpy(m.optimizer.iterations)) for m in (plain, fused)]
    assert steps[0] == steps[1] == (5 if cell["accumulation"] else 10)
