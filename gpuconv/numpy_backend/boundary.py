"""What lies beyond the edge: which input element each padded position reads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=1024)
def source_index(extent: int, lo: int, hi: int, mode: str) -> npt.NDArray[np.intp]:
    """The input index behind each of the ``lo + extent + hi`` padded positions; -1 reads a zero.

    It is as long as the padded axis: where a few positions are wanted, ``sources`` needs no more.
    """
    i = sources(-lo, lo + extent + hi, 1, extent, mode)
    i.flags.writeable = False  # it is cached, and shared by every caller
    return i


def sources(start: int, count: int, step: int, extent: int, mode: str) -> npt.NDArray[np.intp]:
    """The input index behind `count` positions, the first at `start`; -1 reads a zero.

    Positions count from the input's first element. Pads may be longer than the input: every mode
    but "zeros" and "replicate" is periodic.
    """
    i = start + step * np.arange(count, dtype=np.intp)
    if mode == "zeros":
        i[(i < 0) | (i >= extent)] = -1
    elif mode == "replicate":
        np.clip(i, 0, extent - 1, out=i)
    elif mode == "circular":
        i %= max(extent, 1)
    elif mode == "symmetric":  # b a | a b | b a: period 2n
        i %= max(2 * extent, 1)
        np.minimum(i, 2 * extent - 1 - i, out=i)
    else:  # reflect, c b | a b c | b a: period 2n - 2, and a lone element repeats
        period = max(2 * extent - 2, 1)
        i %= period
        np.minimum(i, period - i, out=i)
    return i
