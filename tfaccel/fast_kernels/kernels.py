"""Which kernels a model trains with: chosen and proven at the beginning of its first `fit`.

`acceleration.py` puts them on a model. Optimizer and layers are touched only while a step is being traced.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.trainer import model_supports_jit

from tfaccel.fast_kernels import resident
from tfaccel.fast_kernels.chunks import CallLength, count_exactly, is_stream, running_loop, watches_batches
from tfaccel.fast_kernels.class_weights import weigh_classes
from tfaccel.fast_kernels.functions import FastFunction, LoopClock
from tfaccel.fast_kernels.prediction import PredictFunction, in_order, sliced
from tfaccel.fast_kernels.proofs import Proofs
from tfaccel.fast_kernels.resident import ATTRIBUTE, Pass, ResidentBatches
from tfaccel.fast_kernels.settings import Report, Settings
from tfaccel.fast_kernels.step_loop import OneDeviceStep, Step
from tfaccel.fast_kernels.trial import Way
from tfaccel.keras_fixes.chief_writes import only_chief_writes
from tfaccel.keras_fixes.control_flow_captures import captured_outside
from tfaccel.keras_fixes.first_batch import build_from_specification, build_state, check_enough
from tfaccel.keras_fixes.input_clock import CLOCK_ATTRIBUTE
from tfaccel.keras_fixes.iterator_stall import prompt_iterator, untuned_iterator
from tfaccel.keras_fixes.replica_step import (
    ReplicatedStep,
    batches_function,
    distribute_anew,
    eager_function,
    is_replicated,
)
from tfaccel.keras_fixes.replica_update import on_one_replica
from tfaccel.keras_fixes.replica_xla import compiled_on_replica
from tfaccel.keras_fixes.restored_epoch import forget_restored_epoch
from tfaccel.keras_fixes.workers import is_multi_worker, same_order


class Kernels:
    """The kernels of one model, from one `compile` to the next. See `accelerate` for the arguments."""

    def __init__(self, model: keras.Model, settings: Settings, report: Report):
        self._model = weakref.ref(model)
        self._optimizer, self._compilation = model.optimizer, _compilation(model)
        self._settings = settings
        self._report = report
        self.replicated = is_replicated(model.distribute_strategy)
        self._proofs = Proofs(model.optimizer, report, self.replicated)
        self._plain_functions: dict[str, Any] = {}

    def make_train_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `fit` and by callbacks that want a new trace.

        Raises:
            ValueError: A callback of the `fit` can't write where it is to, or there are fewer samples than
                replicas.
        """
        self._make("train", force)

    def make_test_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `evaluate`."""
        self._make("test", force)

    def make_predict_function(self, force: bool = False) -> None:
        """As Keras has it; called at the beginning of `predict`."""
        model = self._trained_model()
        if self._is_plain(model) or self.replicated:
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
        x, batch_size, steps = in_order(x, batch_size, steps)
        x = x if self._is_plain(model) or self.replicated else sliced(x, batch_size, steps)
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
        return not self._is_current(model) or self._is_debugged(model)

    def _is_current(self, model: keras.Model) -> bool:
        return all(now is then for now, then in zip(_compilation(model), self._compilation, strict=True))

    def _is_debugged(self, model: keras.Model) -> bool:
        return model.run_eagerly or tf.config.functions_run_eagerly()

    def _make(self, kind: str, force: bool) -> None:
        model = self._trained_model()
        if is_multi_worker(model.distribute_strategy):
            only_chief_writes(running_loop().get("callbacks"), model.distribute_strategy)
        name = f"{kind}_function"
        present = getattr(model, name)
        if present is self._plain_functions.get(kind):
            present = None  # made below, in a fit that was debugged
        if self._is_plain(model):
            if not self._is_current(model):
                self._report.clear()
                self._report["loop"] = "Keras's own: the model was compiled again outside of the scope"
            if self.replicated and self._is_current(model):
                step = self._replicated_step(kind).on_batch
                setattr(model, name, eager_function(model, step, model.steps_per_execution))
            else:
                anew = force or present is None or isinstance(present, FastFunction)
                getattr(type(model), f"make_{name}")(model, anew)
            self._plain_functions[kind] = getattr(model, name)
            return
        if present is None or force:
            if self._settings.fused:
                self._proofs.prove(model._flatten_layers())
            setattr(model, name, self._function(model, kind))
        # A function that the user put there is theirs, as Keras has it.
        if isinstance(getattr(model, name), FastFunction):
            self._bind(model, getattr(model, name), kind)

    def _function(self, model: keras.Model, kind: str) -> FastFunction:
        ways, report = self._ways(model, kind), functools.partial(self._report.__setitem__, "xla")
        if not self.replicated:
            step_of = functools.partial(self._fused_step, kind)
            plain = model._make_function(step_of(Way.PLAIN).on_batch)
            return FastFunction(plain, step_of, self._state, ways, report)
        step = self._replicated_step(kind)
        plain = batches_function(model, step.on_batch)
        return FastFunction(plain, lambda way: step, self._state, ways, report, captured_outside)

    def _ways(self, model: keras.Model, kind: str) -> list[Way]:
        """How the loop may be compiled: the first one to begin with, the others to be tried."""
        if self.replicated or not model_supports_jit(model):
            return [Way.PLAIN]  # a layer that XLA can't compile, or deterministic ops: as Keras decides
        if model.jit_compile is True or (kind == "train" and self._settings.xla is True):
            return [Way.LOOP]
        if kind != "train" or self._settings.xla is False:
            return [Way.PLAIN]
        recurrent = self._proofs.can_fuse_recurrent(model._flatten_layers())
        return [Way.PLAIN, *([Way.RECURRENT] if recurrent else []), Way.LOOP]

    def _bind(self, model: keras.Model, function: FastFunction, kind: str) -> None:
        """Lets the `fit` or `evaluate` that is running hand over chunks."""
        loop, strategy = running_loop("fit" if kind == "train" else "evaluate"), model.distribute_strategy
        epoch_iterator = loop.get("epoch_iterator")
        if epoch_iterator is None or loop.get("self") is not model or not is_stream(epoch_iterator):
            return
        if getattr(epoch_iterator, CLOCK_ATTRIBUTE, None) is function.clock:
            return  # a callback trains on single batches, or it is the validation of another epoch
        # Workers must cut their epochs alike: each would go by its own clock.
        may_grow = self._settings.growing_calls and not is_multi_worker(strategy)
        grows = may_grow and not watches_batches(loop.get("callbacks"))
        function.length = CallLength(epoch_iterator.steps_per_execution, grows)
        if not hasattr(epoch_iterator, CLOCK_ATTRIBUTE):  # `fit` keeps that of its validation
            if kind == "train":
                forget_restored_epoch(model)
            if kind == "train" and not self.replicated:
                batch = epoch_iterator._distributed_dataset.element_spec
                function.before_tracing = lambda: build_state(self._trained_model(), batch)
            epoch_iterator.resident_data = self._resident_data(epoch_iterator, loop)
            if self.replicated and not isinstance(epoch_iterator.resident_data, ResidentBatches):
                distribute_anew(epoch_iterator)
            setattr(epoch_iterator, CLOCK_ATTRIBUTE, LoopClock())
        function.clock = getattr(epoch_iterator, CLOCK_ATTRIBUTE)
        data = epoch_iterator.resident_data
        resident_now = isinstance(data, ResidentBatches)
        if resident_now and kind == "train":
            check_enough(data.samples, strategy)
        if resident_now:
            count_exactly(epoch_iterator, self._passes(model, data), function)
        else:
            begin = untuned_iterator if self.replicated else prompt_iterator
            it = weakref.proxy(epoch_iterator)  # which keeps the function, and so must not be kept by it
            count_exactly(epoch_iterator, lambda: begin(it._distributed_dataset), function)
        if kind == "train":
            where = "resident in memory" if resident_now else f"streamed: {data}"
            self._report["loop"] = f"compiled, data {where}"
        epochs = loop.get("epochs", 1) - loop.get("initial_epoch", 0)
        function.expect_steps(epochs * (epoch_iterator.num_batches or 0))

    def _passes(self, model: keras.Model, data: ResidentBatches) -> Callable[[], Pass]:
        """What begins a pass; the order of its rows is the same for all workers."""
        started = False

        def begin() -> Pass:
            nonlocal started
            if not started:
                # `BackupAndRestore` goes on at a later epoch: with the order that a seed gives that one.
                for _ in range(model._initial_epoch or 0):
                    data.new_order()
                started = True
            order = data.new_order()
            if self.replicated:  # each replica fetches its rows out of the host's memory
                return Pass(data, same_order(model.distribute_strategy, order))
            return data.on_device(order)

        return begin

    def _resident_data(self, epoch_iterator: Any, loop: dict[str, Any]) -> ResidentBatches | str:
        adapter, workers = epoch_iterator.data_adapter, is_multi_worker(loop["self"].distribute_strategy)
        if not self._settings.fused and not workers:
            return 'kernels="plain"'
        if isinstance(adapter, ArrayDataAdapter):
            inputs, shuffle = adapter._inputs, adapter._shuffle
            # All workers must decide alike, whatever memory each has.
            reason = resident.why_not_arrays(inputs, shuffle, limited=not workers)
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
        named = tuple(sorted((int(number), float(weight)) for number, weight in weights.items()))
        return batches.with_transform(weigh_classes(weights), key=named)

    def _state(self) -> tuple[list[tf.Variable], list[tf.Variable]]:
        """The variables that Keras knows of: all, and those of the optimizer."""
        model = self._trained_model()
        slots = [variable.value for variable in getattr(self._optimizer, "variables", ())]
        slots += self._proofs.variables
        return [v.value for v in (*model.variables, *model.metrics_variables)] + slots, slots

    def _fused_step(self, kind: str, way: Way) -> Step:
        """The step, traced with fused kernels."""
        model = self._trained_model()
        step = getattr(model, f"{kind}_step")

        def fused_step(data: Any) -> Any:
            with self._proofs.updating(way), self._proofs.tracing(way), on_one_replica():
                return step(data)

        return OneDeviceStep(model._autoconvert_optionals(fused_step))

    def _replicated_step(self, kind: str) -> ReplicatedStep:
        """The step on every replica, traced with fused kernels."""
        model = self._trained_model()
        step = model._autoconvert_optionals(getattr(model, f"{kind}_step"))

        xla = model.jit_compile and not self._is_debugged(model)

        def fused_step(data: Any) -> Any:
            with self._proofs.tracing(Way.PLAIN):
                return step(data)

        return ReplicatedStep(
            model.distribute_strategy,
            compiled_on_replica(step, lambda: self._proofs.tracing(Way.LOOP)) if xla else fused_step,
            self._proofs.updating,
            self._settings.synchronize,
            can_reduce=not xla,
        )

    def build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """In place of `_maybe_symbolic_build`, which Keras calls at the beginning of `fit` and `evaluate`."""
        build_from_specification(self._trained_model(), iterator, data_batch)


def _compilation(model: keras.Model) -> tuple[Any, Any]:
    """What `compile` makes anew each time it is called."""
    return model.optimizer, getattr(model, "_compile_config", None)
