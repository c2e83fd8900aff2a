"""The NumPy backend: convolution on the CPU with nothing but NumPy.

``algorithms()`` is its registry; the rest is how arrays enter and leave it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import numpy as np

from gpuconv.arrays import HostArray, Library
from gpuconv.calls import Signature
from gpuconv.dtypes import DType
from gpuconv.numpy_backend.device import Cpu, cpu, processor
from gpuconv.plan import Algorithm, Plan

_NAMES = (
    "pointwise", "winograd", "im2col", "row_gemm", "tap_gemm", "direct", "depthwise",
    "depthwise_last", "column_sums", "filter2d", "separable", "fft", "dgrad_gemm", "wgrad_gemm",
    "wgrad_row_gemm", "wgrad_depthwise", "dgrad_depthwise", "toeplitz", "small_plane",
)  # fmt: skip


@lru_cache(maxsize=1)
def algorithms() -> tuple[Algorithm, ...]:
    """Every algorithm of this backend; a new one is a module here and a name in the list."""
    return tuple(cast(Algorithm, import_module(f"{__name__}.{name}")) for name in _NAMES)


def device(place: str = "cpu") -> Cpu:
    """The CPU; arrays of another device (`place`) are brought to it."""
    return cpu()


def identity(device: Cpu) -> str:
    """What measured times are true for, besides this package's code."""
    return f"{processor()}, {device}, NumPy {np.__version__}"


def active(device: Cpu) -> AbstractContextManager[None]:
    """What a call on `device` runs inside of."""
    return nullcontext()


def signature(x: Any, w: Any, bias: Any, out: Any) -> Signature | None:
    """The signature of a call's arrays; None where one of them is no ndarray."""
    if type(x) is not np.ndarray or type(w) is not np.ndarray:
        return None
    key: Signature = (x.shape, x.strides, x.dtype, w.shape, w.dtype)
    if bias is not None:
        if type(bias) is not np.ndarray:
            return None
        key += (bias.shape, bias.dtype)
    if out is not None:
        if type(out) is not np.ndarray:
            return None
        key += (out.shape, out.strides, out.dtype, out.flags.writeable)
    return key


def bind(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, y: HostArray) -> None:
    """Nothing is prepared beyond the plan: algorithms take the arrays as they come."""


def take(array: Any, library: Library, device: Cpu) -> HostArray:
    """The caller's array as NumPy's, sharing its memory where that is host memory."""
    host = library.to_host(array)
    return host if host.dtype.isnative else host.astype(host.dtype.newbyteorder("="))


def take_out(out: Any, library: Library, device: Cpu) -> HostArray | None:
    """The caller's `out` as NumPy's."""
    return None if out is None else library.to_host(out)


def give(result: HostArray, library: Library, like: Any) -> Any:
    """The result as an array of the caller's library, on the device of `like`."""
    return library.from_host(result, like)


def give_out(result: HostArray, library: Library, out: Any) -> None:
    """Bring the result to the caller's `out` where that does not share its memory."""
    if library.device(out) != "cpu":
        out[...] = library.from_host(result, out)


def overlaps(out: HostArray, operands: tuple[HostArray | None, ...]) -> bool:
    """Whether `out` may share memory with an operand."""
    return any(a is not None and np.may_share_memory(out, a) for a in operands)


def empty(shape: tuple[int, ...], dtype: DType, device: Cpu) -> HostArray:
    """An uninitialised C-contiguous array."""
    return np.empty(shape, dtype.numpy)
