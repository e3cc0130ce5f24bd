"""Which weights of a model are made smaller, and why the others are left alone.

Kernels are; biases and normalization are not; depthwise kernels and embeddings, few or sensitive, only if
they are asked for, and so what scales or shifts every sample alike (slopes of a PReLU, positions). So are the
first and the last layer, where accuracy is lost soonest, if they are as small as they usually are: under a
tenth of the weights. A kernel that LoRA adds to is a sum, and can't be made smaller by its parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfaccel.errors import refuse
from tfaccel.fit._layout import is_depthwise
from tfaccel.keras_fixes.inner_layers import inner_layers
from tfaccel.selection import Selector, check_selector, matches, no_match

SPARED = ("embedding", "depthwise", "first layer", "last layer")
LORA = "LoRA adds to it"
MOST_REASONS = 5  # that an error tells
SMALL_SHARE = 0.1  # of the weights: a first or last layer above it is most of the model
NORMALIZATION = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
    keras.layers.SpectralNormalization,
)

Layers = Selector | Sequence[Selector] | Mapping[Selector, Any] | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """One weight of a model.

    Args:
        variable: The weight.
        layer: The innermost layer that it belongs to.
        amount: How far it is changed, such as its sparsity; the technique's own, or that asked for by layer.
        skipped: Why it is left alone, or an empty text.
        asked_for: Whether a selector has named it.
    """

    variable: keras.Variable
    layer: keras.layers.Layer
    amount: Any
    skipped: str = ""
    asked_for: bool = False


def check_layers(layers: Layers) -> None:
    """Raises ValueError for what can't choose layers."""
    for selector in _selectors(layers):
        check_selector("layers", selector)
    if layers is not None and not _selectors(layers):
        raise refuse("layers", layers, "at least one layer", "Leave it out for the default.")


def choose_weights(
    model: keras.Model, layers: Layers, amount: Any, spared: tuple[str, ...] = SPARED
) -> list[Choice]:
    """A choice for each weight of the model, in its own order.

    Args:
        model: A built model.
        layers: Selectors: only what matches. A mapping: another amount for what matches. None: the default.
        amount: How far the others are changed.
        spared: What the default leaves alone, of `SPARED`.

    Raises:
        ValueError: The model isn't built, a selector matches no weight, or it matches a frozen one.
    """
    if not model.weights:
        raise ValueError(
            f"{model.name!r} has no weights yet. Allowed: a built model. Give it a keras.Input, or call it "
            "on one batch before fit."
        )
    holders = _holders(model)
    trainable = {id(variable) for variable in model.trainable_variables}
    usable = {
        id(v): _why_not(v, holders[id(v)][-1], id(v) in trainable) for v in model.weights if id(v) in holders
    }
    if layers is None or isinstance(layers, Mapping):
        usual = _usual(model, holders, usable, spared)
        choices = {key: (amount, reason, False) for key, reason in usual.items()}
    else:
        choices = {key: (amount, reason or "not chosen", False) for key, reason in usable.items()}
    for selector in _selectors(layers):
        mine = _matching(selector, model, holders, usable)
        own = layers[selector] if isinstance(layers, Mapping) else amount
        choices.update((key, (own, "", True)) for key in mine)
    return [
        Choice(variable, holders[id(variable)][-1], *choices[id(variable)])
        for variable in model.weights
        if id(variable) in choices
    ]


def skipped_weights(model: keras.Model, choices: Sequence[Choice]) -> dict[str, str]:
    """Why weights were left alone, by their name, for a report."""
    names = weight_names(model)
    return {names[id(each.variable)]: each.skipped for each in choices}


def weight_names(model: keras.Model) -> dict[int, str]:
    """A name for each weight of a model, by `id`: its path, and a number where another has the same path."""
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    for variable in model.weights:
        seen[variable.path] = number = seen.get(variable.path, 0) + 1
        names[id(variable)] = variable.path if number == 1 else f"{variable.path} ({number})"
    return names


def check_some(model: keras.Model, choices: Sequence[Choice], purpose: str) -> None:
    """Raises ValueError where all weights are skipped; `purpose` is the technique's verb."""
    if all(each.skipped for each in choices):
        reasons = "; ".join(f"{each.variable.path}: {each.skipped}" for each in choices[:MOST_REASONS])
        more = ", and so on" * (len(choices) > MOST_REASONS)
        raise ValueError(
            f"{model.name!r} has no weights to {purpose} ({reasons}{more}). Allowed: models with kernels "
            "that are trained. Unfreeze a layer, or name one with layers=."
        )


def check_finite(choices: Sequence[Choice]) -> None:
    """Raises ValueError for weights that hold NaN or infinity."""
    for each in choices:
        if not bool(tf.reduce_all(tf.math.is_finite(each.variable.value))):
            raise ValueError(
                f"{each.variable.path} holds values that aren't finite. Allowed: finite weights. Load a "
                "checkpoint from before the training diverged, or lower the learning rate."
            )


def _selectors(layers: Layers) -> list[Any]:
    if layers is None:
        return []
    if isinstance(layers, Mapping | list | tuple | set | frozenset):
        return list(layers)
    return [layers]


def _holders(model: keras.Model) -> dict[int, list[keras.layers.Layer]]:
    """The layers that each weight is in, from the outermost to the innermost."""
    holders: dict[int, list[keras.layers.Layer]] = {}
    for layer in inner_layers(model):
        for variable in layer.weights if layer is not model else ():
            holders.setdefault(id(variable), []).append(layer)
    for mine in holders.values():
        mine.sort(key=lambda layer: len(layer.weights), reverse=True)
    return holders


def _why_not(variable: keras.Variable, layer: keras.layers.Layer, trainable: bool) -> str:
    """Why a weight can't be chosen at all, or an empty text."""
    if isinstance(layer, NORMALIZATION):
        return "normalization"
    if len(variable.shape) < 2 or "bias" in variable.name:
        return "bias or vector"
    if getattr(layer, "lora_enabled", False):
        return LORA
    if not keras.backend.is_float_dtype(variable.dtype):
        return f"holds {variable.dtype}"
    return "" if trainable else "frozen"


def _usual(
    model: keras.Model,
    holders: dict[int, list[keras.layers.Layer]],
    usable: dict[int, str],
    spared: tuple[str, ...],
) -> dict[int, str]:
    """The reasons, with what is left alone unless asked for."""
    reasons = dict(usable)
    for variable in model.weights:
        layer = holders.get(id(variable), [None])[-1]
        if reasons.get(id(variable)) == "":
            if isinstance(layer, keras.layers.Embedding):
                reasons[id(variable)] = "embedding" * ("embedding" in spared)
            elif is_depthwise(layer, variable):
                reasons[id(variable)] = "depthwise" * ("depthwise" in spared)
            elif isinstance(layer, keras.layers.PReLU):
                reasons[id(variable)] = "slopes"
            elif variable.shape[0] == 1 and "kernel" not in variable.name:
                reasons[id(variable)] = "one for all samples"
    kernels = [v for v in model.trainable_variables if reasons.get(id(v)) == ""]
    sizes = {id(v): math.prod(v.shape) for v in kernels}
    for which, variable in (("first layer", kernels[:1]), ("last layer", kernels[-1:])):
        owner = holders[id(variable[0])][-1] if variable else None
        mine = [id(v) for v in kernels if holders[id(v)][-1] is owner]
        if which in spared and sum(sizes[key] for key in mine) < SMALL_SHARE * sum(sizes.values()):
            reasons.update((key, which) for key in mine)
    return reasons


def _matching(
    selector: Selector,
    model: keras.Model,
    holders: dict[int, list[keras.layers.Layer]],
    usable: dict[int, str],
) -> list[int]:
    mine = [key for key, layers in holders.items() if any(matches(selector, layer) for layer in layers)]
    free = [key for key in mine if not usable[key]]
    if free:
        return free
    if any(usable[key] == LORA for key in mine):
        raise refuse(
            "layers", selector, "layers without LoRA: a kernel that it adds to is a sum", "Name others."
        )
    if any(usable[key] == "frozen" for key in mine):
        raise refuse("layers", selector, "layers that are trained", "Set layer.trainable = True and compile.")
    kernels = [v for v in model.weights if not usable.get(id(v), "not in a layer")]
    raise no_match(selector, (holders[id(v)][0].name for v in kernels))
