"""What a callback hangs onto a model for the length of one `fit`, and how it comes off again.

Two traps of Keras decide the form. The train function is traced once and kept, so whatever is attached
or detached later is not seen until `make_train_function(force=True)`. And Ctrl-C or an exception skips
`on_train_end`: what was attached would silently stay on for the next, plain `fit`. Every `fit` asks for
the train function when it begins, so that is where leftovers of an interrupted one are taken off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import keras

_attached: weakref.WeakKeyDictionary[keras.Model, list[Attachment]] = weakref.WeakKeyDictionary()
_shadowed: weakref.WeakKeyDictionary[keras.Model, Callable | None] = weakref.WeakKeyDictionary()


class Attachment:
    """Something attached to a model until `detach()`, or until the next `fit` begins.

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
        if not _attached.get(model):
            _attached[model] = []
            _watch_for_next_fit(model)
        _attached[model].append(self)
        model.make_train_function(force=True)

    def detach(self) -> None:
        """Takes it off; calling it again does nothing."""
        model = self._model()
        if self._undo is None or model is None:
            return
        undo, self._undo = self._undo, None
        undo()
        _attached[model].remove(self)
        if not _attached[model]:
            _stop_watching(model)
        model.make_train_function(force=True)


def detach_leftovers(model: keras.Model) -> None:
    """Takes off what an interrupted fit left on the model."""
    for attachment in reversed(list(_attached.get(model, ()))):
        attachment.detach()


def _watch_for_next_fit(model: keras.Model) -> None:
    """Lets the next `fit` (or `train_on_batch`) begin by detaching what an interrupted one left."""
    # A bound method would keep the model alive; one that stands on the model itself doesn't.
    own = vars(model).get("make_train_function")
    reference = weakref.ref(model)

    def make_train_function(force: bool = False) -> object:
        model = reference()
        if model is None:
            raise ReferenceError("the model of this train function is gone")
        # `fit` never forces; callbacks that want a retrace do.
        if not force:
            detach_leftovers(model)
        function = own(force) if own is not None else type(model).make_train_function(model, force)
        for attachment in _attached.get(model, ()):
            if attachment.made_anew is not None:
                attachment.made_anew()
        return function

    _shadowed[model] = own
    model.make_train_function = make_train_function


def _stop_watching(model: keras.Model) -> None:
    own = _shadowed.pop(model)
    if own is None:
        del model.make_train_function
    else:
        model.make_train_function = own
