"""Which kernels a model trains with: put on it when it is compiled in a scope, proven at its first `fit`.

Nothing of the user's is replaced for good. The model gets a `make_train_function` of its own, and one each
for testing and predicting, which Keras calls at the beginning of every `fit`, `evaluate` and `predict`;
optimizer and layers are touched only while a step is being traced.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter, make_class_weight_map_fn
from keras.src.trainers.trainer import model_supports_jit

from tfaccel.fast_kernels import (
    fused_attention,
    fused_batch_norm,
    fused_einsum,
    fused_gelu,
    fused_optimizer,
    fused_recurrent,
    resident,
)
from tfaccel.fast_kernels.agreement import EPSILON
from tfaccel.fast_kernels.chunks import CallLength, count_exactly, is_stream, running_loop, watches_batches
from tfaccel.fast_kernels.functions import FastFunction, LoopClock
from tfaccel.fast_kernels.prediction import PredictFunction, sliced
from tfaccel.fast_kernels.resident import ATTRIBUTE, Pass, ResidentBatches
from tfaccel.fast_kernels.same_random import same_random_numbers
from tfaccel.fast_kernels.trial import Way
from tfaccel.keras_fixes.compile_checks import around_compile
from tfaccel.keras_fixes.input_clock import CLOCK_ATTRIBUTE

Report = MutableMapping[str, str]
ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def accelerate_at_compile(
    *, xla: bool | None, growing_calls: bool, report: Report
) -> contextlib.AbstractContextManager[None]:
    """Makes `compile` accelerate every model for as long as the block lasts. Arguments: see `accelerate`."""

    def wrap(original: Callable) -> Callable:
        def compile(self: keras.Model, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)
            accelerate(self, xla=xla, growing_calls=growing_calls, report=report)

        return compile

    return around_compile(wrap)


def accelerate(model: keras.Model, *, xla: bool | None, growing_calls: bool, report: Report) -> None:
    """Lets a compiled model train with fused kernels and compiled loops.

    Args:
        model: Just compiled. Models that run eagerly, and subclasses that make their own train function,
            stay as they are; the report says so.
        xla: Whether the loop is compiled by XLA: True, False, or None to find out while it runs.
        growing_calls: Whether a call into TensorFlow may run more than `model.steps_per_execution` steps.
        report: Is given, by name, what was chosen and why; what it says of another model goes.
    """
    report.clear()
    reason = _why_not(model)
    if reason:
        report["loop"] = f"Keras's own: {reason}"
        return
    if "make_train_function" in vars(model):
        model.make_train_function()  # what an interrupted fit left on the model comes off
        model.train_function = None
    kernels = Kernels(model, xla, growing_calls, report)
    model.make_train_function = kernels.make_train_function
    model.make_test_function = kernels.make_test_function
    model.make_predict_function = kernels.make_predict_function
    if type(model).predict is keras.Model.predict:
        model.predict = kernels.predict


def _why_not(model: keras.Model) -> str:
    for name in ("make_train_function", "make_test_function", "make_predict_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            return f"{type(model).__name__} has a {name} of its own"
    if model.run_eagerly:
        return "the model runs eagerly"
    return ""


class Kernels:
    """The kernels of one model, from one `compile` to the next. See `accelerate` for the arguments."""

    def __init__(self, model: keras.Model, xla: bool | None, growing_calls: bool, report: Report):
        self._model = weakref.ref(model)
        self._optimizer = model.optimizer
        self._xla = xla
        self._growing_calls = growing_calls
        self._report = report
        self._update: fused_optimizer.Update | str | None = None
        self._batch_norm: dict[str, bool] = {}
        self._einsum: dict[str, bool] = {}
        self._attention: bool | None = None
        self._gelu: bool | None = None
        self._plain_functions: dict[str, Any] = {}

    def make_train_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `fit` and by callbacks that want a new trace."""
        self._make("train", force)

    def make_test_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `evaluate`."""
        self._make("test", force)

    def make_predict_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `predict`."""
        model = self._trained_model()
        if self._is_plain(model):
            anew = force or isinstance(model.predict_function, PredictFunction)
            type(model).make_predict_function(model, anew)
        elif model.predict_function is None or force:
            model.predict_function = PredictFunction(model)

    @functools.wraps(keras.Model.predict)
    def predict(  # noqa: D102
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        model = self._trained_model()
        x = x if self._is_plain(model) else sliced(x, batch_size, steps)
        return type(model).predict(
            model, x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
        )

    def _trained_model(self) -> keras.Model:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these kernels is gone")
        return model

    def _is_plain(self, model: keras.Model) -> bool:
        """Compiled anew outside of the scope, or being debugged: plain Keras was asked for."""
        anew = model.optimizer is not self._optimizer
        return anew or model.run_eagerly or tf.config.functions_run_eagerly()

    def _make(self, kind: str, force: bool) -> None:
        model = self._trained_model()
        name = f"{kind}_function"
        present = getattr(model, name)
        if present is self._plain_functions.get(kind):
            present = None  # made below, in a fit that was debugged
        if self._is_plain(model):
            anew = force or present is None or isinstance(present, FastFunction)
            getattr(type(model), f"make_{name}")(model, anew)
            self._plain_functions[kind] = getattr(model, name)
            return
        if present is None or force:
            self._prove()
            step = functools.partial(self._fused, getattr(model, f"{kind}_step"))
            report = functools.partial(self._report.__setitem__, "xla")
            keras_function = model._make_function(step(Way.PLAIN))
            ways = self._ways(model, kind)
            setattr(model, name, FastFunction(keras_function, step, self._state, ways, report))
        # A function that the user put there is theirs, as Keras has it.
        if isinstance(getattr(model, name), FastFunction):
            self._bind(model, getattr(model, name), kind)

    def _ways(self, model: keras.Model, kind: str) -> list[Way]:
        """How the loop may be compiled: the first one to begin with, the others to be tried."""
        if not model_supports_jit(model):
            return [Way.PLAIN]  # a layer that XLA can't compile, or deterministic ops: as Keras decides
        if model.jit_compile is True or (kind == "train" and self._xla is True):
            return [Way.LOOP]
        if kind != "train" or self._xla is False:
            return [Way.PLAIN]
        recurrent = any(fused_recurrent.is_supported(layer) for layer in model._flatten_layers())
        return [Way.PLAIN, *([Way.RECURRENT] if recurrent else []), Way.LOOP]

    def _bind(self, model: keras.Model, function: FastFunction, kind: str) -> None:
        """Lets the `fit` or `evaluate` that is running hand over chunks."""
        loop = running_loop()
        epoch_iterator = loop.get("epoch_iterator")
        if epoch_iterator is None or loop.get("self") is not model or not is_stream(epoch_iterator):
            return
        grows = self._growing_calls and not watches_batches(loop.get("callbacks"))
        function.length = CallLength(epoch_iterator.steps_per_execution, grows)
        if not hasattr(epoch_iterator, CLOCK_ATTRIBUTE):  # `fit` keeps that of its validation
            if kind == "train":
                _build_state(model, epoch_iterator._distributed_dataset.element_spec)
            epoch_iterator.resident_data = self._resident_data(epoch_iterator, loop)
            setattr(epoch_iterator, CLOCK_ATTRIBUTE, LoopClock())
        function.clock = getattr(epoch_iterator, CLOCK_ATTRIBUTE)
        data = epoch_iterator.resident_data
        resident_now = isinstance(data, ResidentBatches)
        if resident_now:
            count_exactly(epoch_iterator, lambda: Pass(data, data.new_order()), function)
        else:
            count_exactly(epoch_iterator, lambda: iter(epoch_iterator._distributed_dataset), function)
        if kind == "train":
            where = "resident in memory" if resident_now else f"streamed: {data}"
            self._report["loop"] = f"compiled, data {where}"
        epochs = loop.get("epochs", 1) - loop.get("initial_epoch", 0)
        function.expect_steps(epochs * (epoch_iterator.num_batches or 0))

    def _resident_data(self, epoch_iterator: Any, loop: dict[str, Any]) -> ResidentBatches | str:
        adapter = epoch_iterator.data_adapter
        if isinstance(adapter, ArrayDataAdapter):
            inputs, shuffle = adapter._inputs, adapter._shuffle
            reason = resident.why_not_arrays(inputs, shuffle)
            if reason:
                return reason
            # Keras has put a copy into its pipeline, which nobody will read.
            epoch_iterator._distributed_dataset = tf.data.Dataset.range(0)
            return resident.of_arrays(inputs, adapter._num_samples, adapter._batch_size, shuffle)
        if not isinstance(adapter, TFDatasetAdapter):
            return "they come from Python"
        given = loop.get("x")
        batches = getattr(given, ATTRIBUTE, None)
        if batches is None:
            return "only arrays can stay in memory"
        weights = loop.get("class_weight")
        if weights is None:
            return batches
        return batches.with_transform(make_class_weight_map_fn(weights), key=tuple(sorted(weights.items())))

    def _state(self) -> tuple[list[tf.Variable], list[tf.Variable]]:
        """The variables that Keras knows of: all, and those of the optimizer."""
        model = self._trained_model()
        slots = [variable.value for variable in getattr(self._optimizer, "variables", ())]
        return [v.value for v in (*model.variables, *model.metrics_variables)] + slots, slots

    def _fused(self, step: Callable[[Any], Any], way: Way) -> Callable[[Any], Any]:
        """The step, traced with fused kernels."""

        def fused_step(data: Any) -> Any:
            with self._tracing(way):
                return step(data)

        return self._trained_model()._autoconvert_optionals(fused_step)

    @contextlib.contextmanager
    def _tracing(self, way: Way) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if callable(self._update):
                stack.enter_context(fused_optimizer.fused(_inner(self._optimizer), self._update))
            if any(self._batch_norm.values()):
                stack.enter_context(fused_batch_norm.fused(_allowed(self._batch_norm)))
            if way is Way.LOOP:
                stack.enter_context(same_random_numbers())
            else:  # XLA does these better by itself
                self._enter_matrix_kernels(stack, way)
            yield

    def _enter_matrix_kernels(self, stack: contextlib.ExitStack, way: Way) -> None:
        if any(self._einsum.values()):
            stack.enter_context(fused_einsum.fused(_allowed(self._einsum)))
        if self._attention:
            stack.enter_context(fused_attention.fused())
        if self._gelu:
            stack.enter_context(fused_gelu.fused())
        if way is Way.RECURRENT:
            stack.enter_context(fused_recurrent.fused())

    def _prove(self) -> None:
        """Runs the probes that this model needs; not while tracing, since they make variables."""
        if self._update is None and self._optimizer is not None:
            self._update = self._proven_update(_inner(self._optimizer))
        layers = self._trained_model()._flatten_layers()
        self._prove_by_dtype(
            "batch_norm",
            self._batch_norm,
            [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)],
            fused_batch_norm.probe,
            "one fused op for each layer",
        )
        self._prove_by_dtype(
            "einsum",
            self._einsum,
            [layer for layer in layers if isinstance(layer, (keras.layers.EinsumDense, *ATTENTION))],
            fused_einsum.probe,
            "one matrix product each",
        )
        attends = any(isinstance(layer, ATTENTION) for layer in layers)
        if self._attention is None and attends:
            self._attention = self._proven("attention", fused_attention.probe(), "two matrix products each")
        squashes = any(getattr(layer, "activation", None) is keras.activations.gelu for layer in layers)
        if self._gelu is None and squashes:
            self._gelu = self._proven("gelu", fused_gelu.probe(), "gradient written out")

    def _proven(self, name: str, far: float, fused: str) -> bool:
        """Takes what a probe gave into the report."""
        self._report[name] = fused if far <= 1 else f"Keras's own: the fused way lay {far:.1f} × off"
        return far <= 1

    def _prove_by_dtype(
        self,
        name: str,
        known: dict[str, bool],
        layers: list[keras.layers.Layer],
        probe: Callable[[str], float],
        fused: str,
    ) -> None:
        """Finds the compute dtypes of some layers in which a kernel agrees with Keras."""
        for dtype in sorted({layer.compute_dtype for layer in layers} - set(known)):
            far = probe(dtype) if dtype in EPSILON else np.inf
            known[dtype] = self._proven(name, far, fused)

    def _proven_update(self, optimizer: keras.optimizers.Optimizer) -> fused_optimizer.Update | str:
        update = fused_optimizer.fused_update(optimizer)
        if not isinstance(update, str):
            far = fused_optimizer.probe(optimizer, update)
            update = update if far <= 1 else f"the fused op lay {far:.1f} × what rounding allows from it"
        own = isinstance(update, str)
        self._report["optimizer"] = f"Keras's own: {update}" if own else "one fused op for each weight"
        return update


def _allowed(known: dict[str, bool]) -> set[str]:
    return {dtype for dtype, agrees in known.items() if agrees}


def _inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    return getattr(optimizer, "inner_optimizer", optimizer)


def _build_state(model: keras.Model, batch: Any) -> None:
    """Makes the variables of optimizer, loss and metrics before the step is traced.

    TensorFlow traces a function that makes variables a second time; Keras traces every first `fit` twice.
    """
    specs = keras.tree.flatten(batch)
    if not model.built or not all(isinstance(spec, tf.TensorSpec) for spec in specs):
        return
    shaped = [types.SimpleNamespace(shape=tuple(spec.shape), dtype=spec.dtype) for spec in specs]
    # What can't be built from shapes alone is made in the trace, as Keras does.
    with contextlib.suppress(ValueError, TypeError, RuntimeError, AttributeError, LookupError):
        model._symbolic_build(data_batch=keras.tree.pack_sequence_as(batch, shaped))
