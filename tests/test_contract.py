"""Every public name keeps the house's promises; they are found by reflection."""

import dataclasses
import doctest
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfaccel

MODULES = {name: value for name, value in vars(tfaccel).items() if inspect.ismodule(value)}
OBJECTS = {name: getattr(tfaccel, name) for name in tfaccel.__all__ if name not in MODULES}
LAUNCH = {f"launch.{name}": getattr(tfaccel.launch, name) for name in tfaccel.launch.__all__}
OBJECTS |= {name: value for name, value in LAUNCH.items() if callable(value)}
NAMES = list(OBJECTS)
CALLBACKS = [
    name
    for name, value in OBJECTS.items()
    if inspect.isclass(value) and issubclass(value, keras.callbacks.Callback)
]
RESULTS = [name for name, value in OBJECTS.items() if dataclasses.is_dataclass(value)]
DOERS = [name for name, value in OBJECTS.items() if inspect.isfunction(value) or name in CALLBACKS] + [
    "Accelerator"
]


def test_something_was_found():
    assert len(CALLBACKS) >= 4
    assert len(DOERS) >= 8
    assert len(RESULTS) >= 5


def test_all_is_sorted_and_complete():
    public = {n for n, v in vars(tfaccel).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert set(tfaccel.__all__) == public | {"launch", "schedules"}
    for module in (tfaccel, tfaccel.launch):
        assert sorted(module.__all__) == list(module.__all__)


@pytest.mark.parametrize("name", DOERS)
def test_docstring_has_every_section(name):
    text = inspect.getdoc(OBJECTS[name])
    for section in ("Args:", "Raises:", "Example:", "Reference:"):
        assert section in text, f"{name} lacks {section}"


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_every_argument(name):
    value = OBJECTS[name]
    if inspect.isclass(value) and issubclass(value, Exception):
        pytest.skip("takes a message")
    signature = inspect.signature(value)
    documented = inspect.getdoc(value)
    assert documented.splitlines()[0].endswith("."), "the first line is a sentence"
    for argument in signature.parameters:
        assert f"{argument}:" in documented, f"{name} does not say what {argument} is"


@pytest.mark.parametrize("name", DOERS)
def test_arguments_behind_the_first_few_are_keyword_only(name):
    parameters = list(inspect.signature(OBJECTS[name]).parameters.values())
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    optional = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    assert len(optional) <= 8  # export_tflite's; more go into a dataclass, as AutoRecipe


@pytest.mark.parametrize("name", DOERS)
def test_public_signatures_have_type_hints(name):
    for parameter in inspect.signature(OBJECTS[name]).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"keras": keras, "np": np, "tf": tf, "tfaccel": tfaccel}
    finder = doctest.DocTestFinder()
    tests = finder.find(OBJECTS[name], name, globs=environment)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0
    if name in DOERS:
        assert runner.tries > 0


@pytest.mark.parametrize(
    "callback",
    [
        tfaccel.OneCycle(1e-2, warmup_epochs=2, momentum_range=None),
        tfaccel.WarmupCosine(0.1, warmup=0.2),
        tfaccel.LearningRate(0.1, tfaccel.schedules.warmup(tfaccel.schedules.cosine(), 0.2)),
        tfaccel.Throughput(verbose=1),
        tfaccel.ExportTFLite("model.tflite", "float16"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_repr_makes_the_callback_again(callback):
    again = eval(repr(callback), OBJECTS | {"schedules": tfaccel.schedules})
    assert repr(again) == repr(callback)
    assert type(again).__name__ in CALLBACKS


def test_accelerator_repr_makes_the_same_choices():
    accelerator = tfaccel.Accelerator("one_device", "float32", False, "plain")
    again = eval(repr(accelerator), dict(OBJECTS))
    assert repr(again) == repr(accelerator)


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_frozen(name):
    assert OBJECTS[name].__dataclass_params__.frozen
