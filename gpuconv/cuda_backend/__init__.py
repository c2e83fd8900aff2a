"""The CUDA backend: hand-written kernels (kernels_cuda/*.cu) launched through CuPy.

``algorithms()`` is its registry; the rest is how arrays enter and leave it. Only here is cupy
imported, and only once an array or ``use_backend`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from gpuconv import plan
from gpuconv.arrays import Library
from gpuconv.cuda_backend.device import device
from gpuconv.dtypes import DType

__all__ = [
    "algorithms", "device", "empty", "give", "give_out", "overlaps", "take", "take_out",
]  # fmt: skip

_NAMES = ("direct",)


class Algorithm(plan.Algorithm, Protocol):
    """An algorithm of this backend: it also lists the kernels that it may ask for."""

    def variants(self) -> Iterable[tuple[str, dict[str, str | int]]]:
        """(stem of the .cu, macros) of every kernel that ``run`` can load."""


@lru_cache(maxsize=1)
def algorithms() -> tuple[Algorithm, ...]:
    """Every algorithm of this backend; a new one is a module here and a name in the list."""
    return tuple(cast(Algorithm, import_module(f"{__name__}.{name}")) for name in _NAMES)


def take(array: Any, library: Library, device: Any) -> Any:
    """The caller's array as the device's: its own memory where it lies there, else a copy."""
    if device.xp is np:  # the emulator's memory is the host's
        taken = library.to_host(array)
        taken = taken if taken.dtype.isnative else taken.astype(taken.dtype.newbyteorder("="))
    elif library.device(array) == "cpu":
        with _current(device):
            taken = device.xp.asarray(library.to_host(array))
    else:
        taken = library.to_cuda(array, device.xp)
    return taken if _addressable(taken) else device.xp.array(taken, order="C", copy=True)


def take_out(out: Any, library: Library, device: Any) -> Any:
    """The caller's `out` as the device's; for a host array under ``use_backend`` a stand-in."""
    if out is None:
        return None
    if device.xp is np:
        taken = library.to_host(out)
    elif library.device(out) == "cpu":
        host = library.to_host(out)
        return device.empty(host.shape, host.dtype)
    else:
        taken = library.to_cuda(out, device.xp)
    if not _addressable(taken):
        raise ValueError(
            "out's elements do not lie at multiples of their size, which no kernel can write"
        )
    return taken


def give(result: Any, library: Library, like: Any) -> Any:
    """The result as an array of the caller's library, where `like` lies."""
    if isinstance(result, np.ndarray):
        return library.from_host(result, like)
    if library.device(like) == "cpu":
        return library.from_host(result.get(), like)
    return library.from_cuda(result, like)


def give_out(result: Any, library: Library, out: Any) -> None:
    """Bring the result to the caller's `out` where that does not share its memory."""
    if isinstance(result, np.ndarray):
        if library.device(out) != "cpu":
            out[...] = library.from_host(result, out)
    elif library.device(out) == "cpu":
        library.to_host(out)[...] = result.get()
    else:
        # The memory is the caller's already; its library's stream has still to wait for ours,
        # which it does when it takes an array in.
        library.from_cuda(result, out)


def overlaps(out: Any, operands: tuple[Any, ...]) -> bool:
    """Whether `out` may share memory with an operand."""
    if isinstance(out, np.ndarray):
        return any(a is not None and np.may_share_memory(out, a) for a in operands)
    share = import_module("cupy").may_share_memory
    return any(a is not None and share(out, a) for a in operands)


def empty(shape: tuple[int, ...], dtype: DType, device: Any) -> Any:
    """An uninitialised C-contiguous array."""
    return device.empty(shape, dtype.numpy)


def _current(device: Any) -> Any:
    return device.xp.cuda.Device(device.ordinal)


def _addressable(array: Any) -> bool:
    """Whether every element lies at a multiple of its size: what a GPU's loads require.

    Fields of packed structs and views of bytes may not; CUDA has no unaligned access.
    """
    from gpuconv.cuda_backend.launch import address

    size = array.itemsize
    return address(array) % size == 0 and not any(s % size for s in array.strides)
