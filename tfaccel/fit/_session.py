"""What a callback hangs onto a model for the length of one `fit`, and how it comes off again.

Two traps of Keras decide the form. The train function is traced once and kept, so whatever is attached
or detached later is not seen until `make_train_function(force=True)`. And Ctrl-C or an exception skips
`on_train_end`: what was attached would silently stay on for the next, plain `fit`. Every `fit`, `evaluate`
and `predict` asks for its function when it begins, so that is where leftovers of an interrupted `fit` are
taken off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras

from tfaccel.keras_fixes.input_clock import is_running, running_epoch_iterator

SEAMS = ("make_train_function", "make_test_function", "make_predict_function")


class Attachment:
    """Something attached to a model until `detach()`, or until something else begins behind its `fit`.

    Args:
        model: The model that is being fitted. Its train function is traced anew.
        undo: Takes off what was attached. Called once.
        made_anew: Is told each time that the model has a new train function, until it comes off.
    """

    def __init__(
        self,
        model: keras.Model,
        undo: Callable[[], None],
        made_anew: Callable[[], None] | None = None,
    ):
        self._model = weakref.ref(model)
        self._undo: Callable[[], None] | None = undo
        self.made_anew = made_anew
        running = running_epoch_iterator()
        self._fit = None if running is None else weakref.ref(running)
        attached = _attached(model)
        if attached is None:
            attached = _watch(model)
        attached.append(self)
        model.make_train_function(force=True)

    @property
    def is_left_over(self) -> bool:
        """Whether the `fit` is over; a callback that trains on single batches does not end it."""
        running = None if self._fit is None else self._fit()
        return running is None or not is_running(running)

    def detach(self) -> None:
        """Takes it off; calling it again does nothing."""
        model = self._model()
        if self._undo is None or model is None:
            return
        undo, self._undo = self._undo, None
        try:
            undo()
        finally:
            attached = _attached(model)
            if attached is not None:
                attached.remove(self)
                if not attached:
                    _stop_watching(model)
            model.make_train_function(force=True)


def detach_leftovers(model: keras.Model) -> None:
    """Takes off what an interrupted fit left on the model."""
    for attachment in reversed(list(_attached(model) or ())):
        if attachment.is_left_over:
            attachment.detach()


def _attached(model: keras.Model) -> list[Attachment] | None:
    """What is on a model; None where nothing is.

    It is kept by what stands on the model: a table of models would keep them alive, as undoing needs them.
    """
    return getattr(vars(model).get(SEAMS[0]), "attached", None)


def _watch(model: keras.Model) -> list[Attachment]:
    """Lets what begins next on the model begin by detaching what an interrupted `fit` left."""
    attached: list[Attachment] = []
    for name in SEAMS:
        setattr(model, name, _watching(model, name, attached))
    return attached


def _watching(model: keras.Model, name: str, attached: list[Attachment]) -> Any:
    # A bound method would keep the model alive; one that stands on the model itself doesn't.
    own = vars(model).get(name)
    reference = weakref.ref(model)

    def make_function(force: bool = False) -> object:
        model = reference()
        if model is None:
            raise ReferenceError("the model of this function is gone")
        # Only callbacks that want a new trace force it.
        if not force:
            detach_leftovers(model)
        function = own(force) if own is not None else getattr(type(model), name)(model, force)
        for attachment in list(attached) if name == SEAMS[0] else ():
            if attachment.made_anew is not None:
                attachment.made_anew()
        return function

    make_function.attached, make_function.own = attached, own  # type: ignore[attr-defined]
    return make_function


def _stop_watching(model: keras.Model) -> None:
    for name in SEAMS:
        own = vars(model)[name].own
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)
