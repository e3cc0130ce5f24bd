"""`Accelerator`: looks at the machine once and says what makes `compile` and `fit` faster on it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fast_kernels.acceleration import accelerate, accelerate_at_compile, release
from tfaccel.fast_kernels.settings import Report, Settings
from tfaccel.keras_fixes import compile_checks
from tfaccel.keras_fixes.compile_checks import is_distributed
from tfaccel.keras_fixes.keras_distribution import check_no_keras_distribution
from tfaccel.keras_fixes.moved_model import rebuilt
from tfaccel.keras_fixes.replica_step import is_replicated
from tfaccel.prepare.choice import Choice
from tfaccel.prepare.devices import Devices
from tfaccel.prepare.execution import (
    choose_batch_norm,
    choose_jit,
    choose_kernels,
    choose_steps_per_execution,
    explain_replicas,
)
from tfaccel.prepare.inputs import is_array_data, make_dataset
from tfaccel.prepare.precision import choose_precision
from tfaccel.prepare.strategy import choose_strategy
from tfaccel.tuned_options import TunedOptions


class Accelerator:
    """Chooses strategy, precision, XLA and steps per execution for this machine, and explains each.

    Use it around the construction of a model; `model.compile` and `model.fit` stay yours. Making one
    takes milliseconds: the choices come from the hardware and from published measurements, not from
    runs of your model.

    Args:
        strategy: `"auto"`, `"one_device"`, `"mirrored"`, `"multi_worker"`, `"tpu"`, or a
            `tf.distribute.Strategy` object. Default `"auto"`.
        precision: `"auto"`, the name of a Keras dtype policy (`"float32"`, `"mixed_bfloat16"`,
            `"mixed_float16"`, `"bfloat16"`, `"float16"`, `"float64"`) or a `keras.DTypePolicy`.
            Default `"auto"`.
        jit: `"auto"`, True or False: whether steps are compiled by XLA. Default `"auto"`.
        kernels: `"auto"`, `"fused"` or `"plain"`. `"fused"` trains with compiled loops and fused
            operations, each of which is used only once it agreed with Keras's own; `print(accelerator)`
            says after `fit` which were. `"plain"` is Keras's own step, bit for bit. Default `"auto"`.
        steps_per_execution: `"auto"`, or how many steps one call into TensorFlow runs. Batch hooks of
            callbacks fire once per call. Default `"auto"`.
        batch_norm: `"auto"`, `"synchronized"` or `"local"`: whether `BatchNormalization` takes its
            statistics over the samples of all replicas, as one device would, or each replica over its own,
            as Keras has it. Default `"auto"`, which synchronizes.
        tuned: From `tune`: decides precision, jit, kernels, steps_per_execution and the batch size of
            `dataset` wherever you leave them at their default.

    Raises:
        ValueError: Unknown name, or a choice that this machine can't carry out.

    Example:
        >>> accelerator = tfaccel.Accelerator("one_device", "float32")
        >>> with accelerator.scope():
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        ...     model.compile("adam", "mse", **accelerator.compile_options())
        >>> history = model.fit(accelerator.dataset(np.ones((8, 4)), np.ones((8, 2))), verbose=0)

    Reference:
        The tables in `tfaccel.prepare.strategy` and `tfaccel.prepare.precision` give each rule and
        where it comes from.
    """

    def __init__(
        self,
        strategy: str | tf.distribute.Strategy = "auto",
        precision: str | keras.DTypePolicy = "auto",
        jit: str | bool = "auto",
        kernels: str = "auto",
        *,
        steps_per_execution: str | int = "auto",
        batch_norm: str = "auto",
        tuned: TunedOptions | None = None,
    ):
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"Keras runs on {keras.backend.backend()!r}. Allowed: the TensorFlow backend. Set "
                "KERAS_BACKEND=tensorflow before keras is imported."
            )
        check_no_keras_distribution()
        self.devices = Devices.find()
        if tuned is not None and not isinstance(tuned, TunedOptions):
            raise refuse("tuned", tuned, "what tfaccel.tune gave back", "Leave it out for the defaults.")
        self._tuned = tuned
        given: dict[str, Any] = {"precision": precision, "jit": jit, "kernels": kernels}
        given["steps_per_execution"] = steps_per_execution
        options = given if tuned is None else tuned.instead_of_auto(given)
        precision, jit, kernels, steps_per_execution = options.values()
        # The cheap check comes first: making a strategy may start TensorFlow's runtime.
        self._precision = choose_precision(precision, self.devices)
        self._strategy = choose_strategy(strategy, self.devices)
        self._kernels = choose_kernels(kernels, self.devices, self.strategy)
        self._jit = choose_jit(jit, self.devices, self.strategy)
        self._steps_per_execution = choose_steps_per_execution(steps_per_execution, kernels, self.strategy)
        self._batch_norm = choose_batch_norm(batch_norm, self.strategy)
        self._kernel_reports: list[Report] = []  # of the model that was compiled last
        if tuned is not None:
            self._give_reason(tuned.reason, [name for name, value in given.items() if value == "auto"])

    def _give_reason(self, reason: str, names: list[str]) -> None:
        """What `tune` decided has its measurement for a reason, instead of the user's word."""
        for name in names:
            choice = getattr(self, f"_{name}")
            if choice.by_user:
                setattr(self, f"_{name}", dataclasses.replace(choice, reason=reason))

    @property
    def strategy(self) -> tf.distribute.Strategy:
        """The strategy; TensorFlow's default (no-op) strategy where one device is used."""
        return self._strategy.value

    @property
    def precision(self) -> keras.DTypePolicy:
        """The dtype policy that layers built in `scope()` get."""
        return self._precision.value

    @property
    def is_chief(self) -> bool:
        """Whether this process is the first worker, or the only one: the one that writes files.

        `fit` sees to the callbacks of Keras itself. Use it around what a script writes after `fit`; but
        `evaluate` and `predict` are waited for by the other workers, so all must call them.
        """
        return self.strategy.extended.should_checkpoint

    @contextlib.contextmanager
    def scope(self) -> Iterator[Accelerator]:
        """Build and compile the model in here.

        Enters the strategy's scope, sets the dtype policy and installs what `tfaccel.keras_fixes`
        heals. All of it is undone on leaving, also when an exception leaves. May be entered again.

        Raises:
            ValueError: From `model.compile`, for a model that was built outside.
        """
        previous = keras.config.dtype_policy()
        with contextlib.ExitStack() as stack:
            stack.callback(keras.config.set_dtype_policy, previous)
            if is_distributed(self.strategy):
                stack.enter_context(self.strategy.scope())
            keras.config.set_dtype_policy(self.precision)
            stack.enter_context(compile_checks.refuse_at_compile(self.strategy, self.precision))
            settings = self._settings()
            if settings is not None:
                stack.enter_context(accelerate_at_compile(settings, self._kernel_reports))
            yield self

    def _settings(self) -> Settings | None:
        """What is put on a model at `compile`; None where it stays plain Keras."""
        fused = self._kernels.value == "fused"
        if not fused and not is_replicated(self.strategy):
            return None
        return Settings(
            fused=fused,
            xla=self._jit.value if self._jit.by_user else None,
            growing_calls=not self._steps_per_execution.by_user,
            synchronize=self._batch_norm.value == "synchronized",
        )

    def adopt(self, model: keras.Model) -> keras.Model:
        """Takes a model that was built, compiled and trained outside into the scope, exactly.

        It goes on where it was: weights, moving statistics, random seeds, the optimizer's slots and steps,
        and what it was compiled with. On one device the model itself gets the kernels; under a strategy
        another one, equal to it, is built in the scope. It keeps its precision.

        Args:
            model: Built.

        Returns:
            The model to train with.

        Raises:
            ValueError: It is not built, can't be made from its configuration, or has another precision than
                this accelerator.

        Example:
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            >>> model.compile("adam", "mse")
            >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
            >>> model = tfaccel.Accelerator("one_device", "float32").adopt(model)
            >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
        """
        with self.scope():
            if is_distributed(self.strategy):
                return rebuilt(model)
            compile_checks.check_built_inside(model, self.strategy, self.precision)
            settings = self._settings()
            if settings is not None and model.compiled:
                accelerate(model, settings, self._kernel_reports)
            return model

    def release(self, model: keras.Model) -> keras.Model:
        """Brings a plain Keras model back out of the scope, exactly.

        Args:
            model: Built or adopted in the scope.

        Returns:
            The model itself without the kernels on one device; under a strategy another one, equal to it,
            whose variables are ordinary ones.

        Raises:
            ValueError: Called inside of a strategy's scope, or the model can't be made from its
                configuration.

        Example:
            >>> accelerator = tfaccel.Accelerator("one_device", "float32")
            >>> with accelerator.scope():
            ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
            ...     model.compile("adam", "mse")
            >>> model = accelerator.release(model)
        """
        if tf.distribute.has_strategy():
            raise ValueError(
                f"{model.name!r} was to be released inside of a scope. Allowed: outside of every strategy's "
                "scope. Call release after the `with` block."
            )
        if is_distributed(self.strategy):
            return rebuilt(model)
        release(model)
        return model

    def dataset(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        shuffle: bool = True,
    ) -> Any:
        """The fastest input for `fit` with the same samples in the same batches.

        Args:
            x: Arrays of shape `(samples, ...)`, nested or not; a tuple `(x, y)` when `y` is left
                out; a batched `tf.data.Dataset`; a `keras.utils.PyDataset`; a generator of batches.
            y: Targets, for arrays only.
            sample_weight: Weights of the samples, for arrays only.
            batch_size: Samples a batch over all replicas, for arrays only; default 32, as in `fit`, or what
                `tune` chose.
            shuffle: For arrays only: a new order every epoch. Other data keep their own order.

        Returns:
            A `tf.data.Dataset` (a `PyDataset` comes back as it is). The last, partial batch is kept.

        Raises:
            ValueError: Empty or malformed data, or an argument that this kind of data can't take.
        """
        if batch_size is None and self._tuned is not None and is_array_data(x):
            batch_size = self._tuned.batch_size
        return make_dataset(x, y, sample_weight, batch_size=batch_size, shuffle=shuffle)

    def compile_options(self) -> dict[str, Any]:
        """Keyword arguments for `model.compile`: `jit_compile` and `steps_per_execution`."""
        return {"jit_compile": self._jit.value, "steps_per_execution": self._steps_per_execution.value}

    def choices(self) -> dict[str, Choice]:
        """Every choice by its name, each with its value and reason."""
        return {
            "strategy": self._strategy,
            "precision": self._precision,
            "jit": self._jit,
            "kernels": self._kernels,
            "steps_per_execution": self._steps_per_execution,
            "batch_norm": self._batch_norm,
            **explain_replicas(self.strategy, self.devices),
        }

    def show(self, name: str) -> str:
        """The value of the choice `name`, for a person."""
        return str(self.choices()[name])

    def __str__(self) -> str:
        """The machine and every choice with its reason, a line each."""
        rows = [(name, self.show(name), choice.reason) for name, choice in self.choices().items()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        used = [f"  {name}: {text}" for of in self._kernel_reports for name, text in of.items()]
        return "\n".join(
            [str(self.devices), *lines, *(["kernels of the model compiled last", *used] if used else [])]
        )

    def __repr__(self) -> str:
        """The call that makes the same choices again."""
        arguments = inspect.signature(type(self)).parameters
        values = {name: choice.value for name, choice in self.choices().items() if name in arguments}
        values["precision"] = self.precision.name
        if not is_distributed(self.strategy):
            values["strategy"] = "one_device"
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"Accelerator({shown})"
