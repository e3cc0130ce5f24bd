"""Puts the kernels on a model when it is compiled in a scope, and takes them off.

Nothing of the user's is replaced for good. The model gets a `make_train_function` of its own, and one each
for testing and predicting, which Keras calls at the beginning of every `fit`, `evaluate` and `predict`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import keras

from tfaccel.fast_kernels.kernels import Kernels
from tfaccel.fast_kernels.settings import Report, Settings
from tfaccel.keras_fixes.compile_checks import around_compile
from tfaccel.keras_fixes.replica_step import is_replicated
from tfaccel.keras_fixes.replica_xla import check_train_step

REPLACED = (
    "make_train_function",
    "make_test_function",
    "make_predict_function",
    "predict",
    "_maybe_symbolic_build",
)


def accelerate_at_compile(
    settings: Settings, reports: list[Report]
) -> contextlib.AbstractContextManager[None]:
    """Makes `compile` accelerate every model for as long as the block lasts. Arguments: see `accelerate`."""

    def wrap(original: Callable) -> Callable:
        def compile(self: keras.Model, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)
            accelerate(self, settings, reports)

        return compile

    return around_compile(wrap)


def accelerate(model: keras.Model, settings: Settings, reports: list[Report]) -> None:
    """Lets a compiled model train with fused kernels and compiled loops, on every replica of its strategy.

    Args:
        model: Just compiled. Models that run eagerly on one device, and subclasses that make their own train
            function, stay as they are; the report says so.
        settings: How.
        reports: Is given a report in the place of that of another model: by name, what was chosen and why.

    Raises:
        ValueError: Several replicas, XLA, and a `train_step` of the user's own.
    """
    report: Report = {}
    reports[:] = [report]
    reason = _why_not(model)
    if reason:
        report["loop"] = f"Keras's own: {reason}"
        return
    release(model)
    kernels = Kernels(model, settings, report)
    if kernels.replicated:
        if model.jit_compile:
            check_train_step(model)
        model._maybe_symbolic_build = kernels.build
    model.make_train_function = kernels.make_train_function
    model.make_test_function = kernels.make_test_function
    model.make_predict_function = kernels.make_predict_function
    if type(model).predict is keras.Model.predict:
        model.predict = kernels.predict


def _why_not(model: keras.Model) -> str:
    for name in ("make_train_function", "make_test_function", "make_predict_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            return f"{type(model).__name__} has a {name} of its own"
    if model.run_eagerly and not is_replicated(model.distribute_strategy):
        return "the model runs eagerly"
    return ""


def release(model: keras.Model) -> None:
    """Takes off what `accelerate` put on a model, and what an interrupted fit left on it."""
    if "make_train_function" not in vars(model):
        return
    model.make_train_function()
    for name in REPLACED:
        if name in vars(model):
            delattr(model, name)
    model.train_function = model.test_function = model.predict_function = None
