"""Invariant 1: forced to plain Keras, tfaccel gives bit-identical weights and optimizer state."""

import numpy as np
import pytest

import tfaccel


def fit(helpers, small, accelerator=None, kind="sequential", data="arrays", **options):
    x, y = small
    if accelerator is None:
        model = helpers.compile(helpers.build(kind), jit_compile=False)
        model.fit(x, y, batch_size=25, epochs=2, shuffle=False, verbose=0)
        return model
    with accelerator.scope():
        model = helpers.compile(helpers.build(kind), **accelerator.compile_options())
    if data == "arrays":
        model.fit(x, y, batch_size=25, epochs=2, shuffle=False, verbose=0)
    else:
        model.fit(accelerator.dataset(x, y, batch_size=25, shuffle=False), epochs=2, verbose=0)
    return model


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
@pytest.mark.parametrize("data", ["arrays", "dataset"])
@pytest.mark.parametrize("steps", [1, 16])
def test_strength_zero_is_plain_keras(helpers, small, kind, data, steps):
    plain = fit(helpers, small, kind=kind)
    accelerator = tfaccel.Accelerator(
        "one_device", "float32", jit=False, kernels="plain", steps_per_execution=steps
    )
    accelerated = fit(helpers, small, accelerator, kind, data)
    for a, b in zip(plain.get_weights(), accelerated.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(plain.optimizer.variables, accelerated.optimizer.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
