"""The outputs of two models side by side: which of the one is which of the other."""

from __future__ import annotations

from typing import Any


def by_path(structure: Any) -> dict[tuple, Any]:
    """The leaves of nested dicts, lists and tuples, by the keys and indices that lead to each."""
    if isinstance(structure, dict):
        items = list(structure.items())
    elif isinstance(structure, list | tuple):
        items = list(enumerate(structure))
    else:
        return {(): structure}
    return {(key, *path): leaf for key, value in items for path, leaf in by_path(value).items()}


def alongside(given: Any, given_names: list[str], outputs: Any, names: list[str]) -> list | None:
    """What was given for each output, in the order of `by_path(outputs)`; None where their forms differ.

    Lists go by position, dicts by key, and a list beside a dict by the names of its outputs.

    Args:
        given: Nested as outputs are.
        given_names: Of the outputs that a list stands for.
        outputs: Nested.
        names: The same of them.
    """
    if len(by_path(given)) == len(by_path(outputs)) == 1:
        return list(by_path(given).values())
    if isinstance(given, dict) != isinstance(outputs, dict):
        given, outputs = _named(given, given_names), _named(outputs, names)
    theirs, ours = by_path(given), by_path(outputs)
    return [theirs[path] for path in ours] if ours.keys() == theirs.keys() else None


def leaf_at(structure: Any, path: tuple, names: list[str]) -> Any:
    """The leaf that a path leads to; a list is looked up by its outputs' names where the path has one."""
    if path and path[0] in names and not isinstance(structure, dict):
        structure = _named(structure if isinstance(structure, list | tuple) else [structure], names)
    for key in path:
        structure = structure[key]
    return structure


def _named(structure: Any, names: list[str]) -> Any:
    is_list = isinstance(structure, list | tuple) and len(structure) == len(names)
    return dict(zip(names, structure, strict=True)) if is_list else structure
