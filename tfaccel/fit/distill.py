"""Distillation inside `fit`: the model learns from a teacher's answers, besides the labels.

When to use: for a small model, or one that is being pruned, clustered or rounded, with a better one at hand:
a larger net, or the net as it was before. A teacher's answers say how alike the classes look to it, where a
label says one of them. `keras.distillation.Distiller` puts both into a third model; this one leaves the
model what it is, so that what changes its weights (`PruneWeights`, `QuantizeAware`) finds them. Besides, by
default Keras 3.15's `LogitsDistillation` takes logits / T for probabilities, cut off below 1e-7 and above
1: it looks for a `KLDivergence` object and is given a function. With an object it computes what this does.

What it costs: the teacher's forward pass in every step, a quarter of a step for one of the same form
(`benchmarks/compression_overhead.py`).

    loss = (1 − weight) · own + weight · T² · KL(softmax(teacher / T) ‖ softmax(model / T))
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tfaccel.errors import is_number, refuse
from tfaccel.fit._calls import undo_all, wrap_method
from tfaccel.fit._outputs import alongside, by_path, leaf_at
from tfaccel.fit._session import Attachment, detach_leftovers
from tfaccel.fit._soft_targets import Whole, as_loss, of_answers
from tfaccel.fit._state import beside
from tfaccel.keras_fixes.compiled_losses import compiled_losses


class Distill(keras.callbacks.Callback):
    """Lets the model learn from a teacher, besides the labels.

    The teacher sees what the model sees, in inference mode, and stays as it is. All of it happens in the
    compiled step, so it holds under `steps_per_execution`, XLA, gradient accumulation, mixed precision and
    every strategy. Validation is that of the labels alone; the logs have `distillation_loss`, the teacher's
    part of the loss before it is weighted. Layers inside of the model that change images at random do so for
    the model only: to show both the same, put them into the data pipeline.

    For outputs with one of Keras's cross-entropies, the teacher's and the model's answers are softened by the
    temperature and compared by their divergence, logits or probabilities as the loss takes them. A loss of
    numbers, such as "mse", takes the teacher's answers as labels. Others have to be given. Weights of
    samples, classes and outputs count as they do for the labels; `ignore_class` does not, there it
    is heard. Outputs in lists go by their order, in dicts by their keys.

    Args:
        teacher: A built model with the same inputs, and outputs of the same shapes. Under a strategy it
            has to be made in the scope, as the model: `accelerator.adopt(teacher)`.
        weight: The teacher's share, 0 ≤ weight ≤ 1; the labels have the rest. 0 leaves plain Keras; with 1
            labels have to be valid and don't count. Penalties of layers count fully. Default 0.5.
        temperature: T > 0, in units of logits: how much of the small probabilities is learnt. Default 3.
        loss: Instead of what is said above, a Keras loss, by name or as an object, of the teacher's outputs
            and the model's, as they are; for several outputs a structure like theirs. Default None.

    Raises:
        ValueError: A bad argument; or, before the first step, a teacher with other inputs or outputs or of
            another strategy, or one that shares weights with the model; a `train_step` that does not call
            `compute_loss`; a loss that needs one of its own for answers.

    Example:
        >>> teacher = keras.Sequential([keras.Input((8,)), keras.layers.Dense(64), keras.layers.Dense(3)])
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
        >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> history = model.fit(
        ...     np.random.rand(64, 8), np.arange(64) % 3, verbose=0,
        ...     callbacks=[tfaccel.Distill(teacher, 0.7), tfaccel.PruneWeights(0.5)],
        ... )
        >>> sorted(history.history)
        ['distillation_loss', 'loss', 'sparsity']

    Reference:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531, section 2.
    """

    def __init__(
        self, teacher: keras.Model, weight: float = 0.5, *, temperature: float = 3.0, loss: Any = None
    ):
        super().__init__()
        if not isinstance(teacher, keras.Model):
            raise refuse("teacher", teacher, "a keras.Model", "Load one with keras.models.load_model.")
        if not teacher.built:
            raise refuse("teacher", teacher, "a built model", "Call it once, or load its weights.")
        if not (is_number(weight, 0, 1) or weight == 1):
            raise refuse("weight", weight, "a share, 0 ≤ weight ≤ 1", "Take 0.5.")
        if not is_number(temperature, 0) or temperature == 0:
            raise refuse("temperature", temperature, "a number > 0", "3 to 5 are usual.")
        self.teacher, self.weight, self.temperature, self.loss = teacher, weight, temperature, loss
        self._given = keras.tree.map_structure(as_loss, loss)
        self._attachment: Attachment | None = None

    def set_model(self, model: keras.Model) -> None:
        """Takes off what an interrupted fit left on the model."""
        super().set_model(model)
        detach_leftovers(model)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks the teacher, and puts it beside the loss."""
        self._attachment = None
        if not self.weight:
            return
        self._check_teacher()
        self._step = threading.local()  # what this thread's training step works on, while it is traced
        with self.model.distribute_strategy.scope():
            self._sum, self._count = (beside(np.zeros([], "float32"), "mean") for _ in range(2))
        undo = [
            wrap_method(self.model, "train_step", self._run_step),
            wrap_method(self.model, "compute_loss", self._compute_loss),
        ]

        self._attachment = Attachment(self.model, undo_all(undo))

    def _check_teacher(self) -> None:
        name, model = f"teacher {self.teacher.name!r}", self.model
        ours, theirs = model.distribute_strategy, self.teacher.distribute_strategy
        if ours.num_replicas_in_sync > 1 and theirs is not ours:
            raise ValueError(
                f"The {name} was made outside of the strategy that {model.name!r} is trained under. Allowed: "
                "a teacher made in the same scope. Pass Distill(accelerator.adopt(teacher))."
            )
        trained = {id(variable) for variable in model.trainable_variables}
        if any(id(variable) in trained for variable in self.teacher.variables):
            raise ValueError(
                f"The {name} shares weights with {model.name!r}, and would change with it. Allowed: a model "
                "of its own. Make a copy: keras.models.clone_model(model), then set_weights."
            )
        for what in ("inputs", "outputs"):
            theirs, ours = (_only_shape(getattr(each, what, None)) for each in (self.teacher, model))
            if not _fit_each_other(theirs, ours):
                raise ValueError(
                    f"The {name} has {what} of shape {theirs}, {model.name!r} of {ours}. Allowed: the same. "
                    "Give both models the same inputs, and as many classes."
                )

    def _run_step(self, train_step: Any, data: Any) -> Any:
        """Runs as Python only where the step is traced."""
        self._step.data, self._step.taught = data, False
        try:
            logs = train_step(data)
            if not self._step.taught:
                raise ValueError(
                    f"The train_step of {self.model.name!r} does not give y_pred to compute_loss: a teacher "
                    "has nothing to compare its answers with. Allowed: a train_step that does. Let it call "
                    "self.compute_loss(x, y, y_pred)."
                )
            return logs
        finally:
            del self._step.data

    def _compute_loss(self, compute_loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = compute_loss(*args, **kwargs)
        # An override of the user's may have other names, in Keras's order.
        known = dict(zip(("x", "y", "y_pred", "sample_weight"), args, strict=False)) | kwargs
        if not hasattr(self._step, "data") or known.get("y_pred") is None:  # validation
            return own
        self._step.taught = True
        x = known.get("x")
        x = keras.utils.unpack_x_y_sample_weight(self._step.data)[0] if x is None else x
        answers = keras.tree.map_structure(tf.stop_gradient, self.teacher(x, training=False))
        taught = self._distillation_loss(answers, known["y_pred"], known.get("sample_weight"))
        replicas = float(self.model.distribute_strategy.num_replicas_in_sync)
        self._sum.assign(self._sum + replicas * taught)
        self._count.assign(self._count + 1.0)
        share = ops.cast(self.weight * (self._penalty() + taught), own.dtype)
        if len(own.shape) > 0:  # reduction=None: Keras differentiates the sum
            share /= ops.cast(ops.size(own), own.dtype)
        return (1.0 - self.weight) * own + share

    def _penalty(self) -> Any:
        """What layers add to the loss: it does not depend on who teaches."""
        if not self.model.losses:
            return 0.0
        whole = ops.sum(ops.stack([ops.sum(ops.cast(each, "float32")) for each in self.model.losses]))
        return Whole()(ops.zeros([1]), ops.reshape(whole, [1]))

    def _distillation_loss(self, answers: Any, outputs: Any, sample_weight: Any) -> Any:
        terms = []
        for loss, weight, theirs, ours, weights in self._pairs(answers, outputs, sample_weight):
            if tuple(theirs.shape)[1:] != tuple(ours.shape)[1:]:
                raise ValueError(
                    f"Teacher {self.teacher.name!r} answers with shape {tuple(theirs.shape)}, "
                    f"{self.model.name!r} with {tuple(ours.shape)}. Allowed: the same. Take a teacher for "
                    "the same task."
                )
            terms.append(weight * ops.cast(loss(theirs, ours, sample_weight=weights), "float32"))
        if not terms:
            raise ValueError(
                f"{self.model.name!r} has no compiled loss to take for the teacher's answers, or its "
                "compute_loss does not call it. Allowed: a loss in compile, or one here. Pass "
                'loss="mse" or another.'
            )
        return ops.sum(ops.stack(terms))

    def _pairs(self, answers: Any, outputs: Any, sample_weight: Any) -> list[tuple]:
        """For each output that is taught: loss, weight, the teacher's answer, the model's, sample weights."""
        names, theirs = (
            list(getattr(each, "output_names", None) or []) for each in (self.model, self.teacher)
        )
        ours, taught = list(by_path(outputs).values()), alongside(answers, theirs, outputs, names)
        if taught is None:
            raise ValueError(
                f"Teacher {self.teacher.name!r} has outputs {list(by_path(answers))}, {self.model.name!r} "
                f"has {list(by_path(outputs))}. Allowed: the same keys, or as many in one order. Take a "
                "teacher for the same task."
            )
        if self.loss is not None:
            losses, weights = (
                self._for_each(what, given, outputs, names)
                for what, given in (("loss", self._given), ("sample_weight", sample_weight))
            )
            rows = zip(losses, [1.0] * len(ours), taught, ours, weights, strict=True)
            return [row for row in rows if row[0] is not None]
        place = {id(output): index for index, output in enumerate(ours)}
        pairs = []
        for each in compiled_losses(self.model):
            index = place[id(leaf_at(outputs, each.path, names))]
            weights = sample_weight
            if keras.tree.is_nested(weights):  # Keras has looked it up alike
                weights = leaf_at(weights, each.path, names)
            loss = of_answers(each.loss, self.temperature)
            pairs.append((loss, each.weight, taught[index], ours[index], weights))
        return pairs

    def _for_each(self, what: str, given: Any, outputs: Any, names: list[str]) -> list:
        """What was given for each output, or for all of them."""
        if not keras.tree.is_nested(given):
            return [given] * len(by_path(outputs))
        found = alongside(given, names, outputs, names)
        if found is None:
            allowed = f"one for all, or one for each of {list(by_path(outputs))}; None leaves an output out"
            raise refuse(what, given, allowed, "Nest it as the outputs are.")
        return found

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Begins a new mean."""
        if self._attachment is not None:
            self._sum.assign(0.0)
            self._count.assign(0.0)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the mean over the epoch's batches into the logs."""
        if self._attachment is not None and logs is not None:
            total, count = (float(ops.convert_to_numpy(each)) for each in (self._sum, self._count))
            logs["distillation_loss"] = total / max(count, 1.0)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Takes the teacher away."""
        if self._attachment is not None:
            self._attachment.detach()

    def __repr__(self) -> str:
        """What was given; a model can't be written down."""
        given = f"temperature={self.temperature}, loss={self.loss!r}"
        return f"Distill(<{self.teacher.name}>, {self.weight}, {given})"


def _only_shape(tensors: Any) -> tuple | None:
    """Of a model's one input or output; None where there are several, or the model does not say."""
    flat = keras.tree.flatten(tensors)
    return tuple(flat[0].shape) if len(flat) == 1 and flat[0] is not None else None


def _fit_each_other(theirs: tuple | None, ours: tuple | None) -> bool:
    if theirs is None or ours is None:
        return True
    sizes_fit = (a == b or None in (a, b) for a, b in zip(theirs, ours, strict=False))
    return len(theirs) == len(ours) and all(sizes_fit)
