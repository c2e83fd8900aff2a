"""The second launch of sums that were split among blocks: kernels_cuda/split_sum.cu adds the parts.

No algorithm of its own: the last step of several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gpuconv.cuda_backend import launch
from gpuconv.cuda_backend.launch import Launch, Macros
from gpuconv.dtypes import DType

_BLOCK = 256  # threads


def prepare(device: Any, dtype: DType, p: Any, items: int, parts: int) -> Launch:
    """Adds up `parts` arrays of `items` sums each, in order, and the bias; y is `p`'s.

    Its arrays are the parts, the bias or None, and y.
    """
    return Launch(
        kernel=device.load("split_sum", _macros(dtype)),
        grid=launch.strided_grid(device, items, _BLOCK),
        block=(_BLOCK, 1, 1),
        constants=(p, np.int32(items), np.int32(parts)),
    )


def _macros(dtype: DType) -> Macros:
    types = launch.uniform_macros(dtype)
    return {name: types[name] for name in ("Y_T", "B_T", "ACC_T")} | {"BLOCK": _BLOCK}


def variants(dtypes: Iterable[DType]) -> Iterator[tuple[str, Macros]]:
    for dtype in dtypes:
        yield "split_sum", _macros(dtype)
