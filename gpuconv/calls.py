"""Calls that were made before: what one of them passed is not asked of the next.

Whether a call is right, and how it goes, follows from its options and from the *signature* of its
arrays: types, shapes, strides, dtypes, where in 16 bytes their memory begins, on which device. The
first call with a signature is checked and taken in by ``execute``, which leaves behind a `Call`:
the same without the questions. Arrays of other libraries than the backend's own have no signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv import arrays, backends

Signature = tuple[Any, ...]
Options = tuple[Any, ...]
Call = Callable[[Any, Any, Any, Any], Any]  # of x, w, bias and out, with the result

_PLAIN = frozenset({int, float, bool, str, type, type(None), np.float64, np.int64})


class Calls(dict[Any, Call]):
    """Calls by all that decides how they go; threads may share it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def remember(self, key: Any, call: Call) -> None:
        """Keep `call`, and no more than `most` of them: programs have few, or ever other ones."""
        if len(self) >= self._most:
            self.clear()
        self[key] = call


def plain(*values: Any) -> Options | None:
    """Options as a key: by value and type, as 1 == 1.0 == True, which checks tell apart.

    None where one is neither a plain value nor a sequence of such.
    """
    kinds = tuple(map(type, values))
    if _PLAIN.issuperset(kinds):
        return values, kinds
    flat: list[Any] = []
    for value in values:
        if type(value) in (list, tuple):
            if not _PLAIN.issuperset(map(type, value)):
                return None
            flat.append((tuple(value), *map(type, value)))
        elif type(value) in _PLAIN:
            flat.append((value, type(value)))
        else:
            return None
    return tuple(flat)


def signature(x: Any, w: Any, bias: Any, out: Any) -> Signature | None:
    """The arrays' signature; None where they are not all the serving backend's own."""
    cls: Any = type(x)
    own = arrays.home(cls)
    if own is None:
        return None
    backend = backends.backend(backends.forced_backend() or own)
    return backend.signature(x, w, bias, out)  # type: ignore[no-any-return]
