"""A patch of one attribute of the host that acts in the threads that asked for it, while they trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Patch:
    """Replaces `owner.name` while any thread needs it; in other threads the replacement does nothing.

    Args:
        owner: A class or module.
        name: Its attribute, a function or a property.
        wrap: From `(original, setting)` to the replacement; `setting()` is what the present thread asked
            for, or None.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[[Any, Callable[[], Any]], Any]):
        self._owner = owner
        self._name = name
        self._wrap = wrap
        self._lock = threading.Lock()
        self._users = 0
        self._original: Any = None
        self._local = threading.local()

    @contextlib.contextmanager
    def active(self, setting: Any) -> Iterator[None]:
        """Lets the patch act in this thread while the block lasts; may be nested."""
        before = self.setting()
        with self._installed():
            self._local.setting = setting
            try:
                yield
            finally:
                self._local.setting = before

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._original = getattr(self._owner, self._name)
                setattr(self._owner, self._name, self._wrap(self._original, self.setting))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    setattr(self._owner, self._name, self._original)

    def setting(self) -> Any:
        """What the present thread asked for; None where it asked for nothing."""
        return getattr(self._local, "setting", None)


@contextlib.contextmanager
def all_active(patches: Iterable[Patch], setting: Any) -> Iterator[None]:
    """Lets several patches act in this thread while the block lasts, all with the same setting."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.active(setting))
        yield
