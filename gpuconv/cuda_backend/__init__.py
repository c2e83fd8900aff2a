"""The CUDA backend: hand-written kernels (kernels_cuda/*.cu) launched through CuPy.

``algorithms()`` is its registry; the rest is how arrays enter and leave it. Only here is cupy
imported, and only once an array or ``use_backend`` asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from gpuconv import plan
from gpuconv.arrays import HostArray, Library
from gpuconv.calls import Call, Signature
from gpuconv.cuda_backend.device import device, overriding
from gpuconv.cuda_backend.launch import address, contiguous
from gpuconv.dtypes import DType

__all__ = [
    "active", "algorithms", "bind", "device", "empty", "give", "give_out", "identity", "overlaps",
    "prepared", "signature", "take", "take_out", "warmup",
]  # fmt: skip

_NAMES = (
    "direct", "implicit_gemm", "implicit_gemm_mma", "depthwise", "dgrad_depthwise",
    "wgrad_depthwise", "filter2d", "filter2d_mma", "separable", "fft", "winograd",
)  # fmt: skip


_ALIGNED = 16  # bytes: no kernel asks for more, and every allocation begins at a multiple


class Algorithm(plan.Algorithm, Protocol):
    """An algorithm of this backend: it also lists the kernels that it may ask for.

    It may have ``bind(plan, x, w, bias, out)``: what ``run`` would do with arrays that differ from
    these in their addresses alone, as a function of such arrays. Only addresses are read there, so
    their axes may be in any order. None where that is not all that a run depends on.
    """

    def variants(self) -> Iterable[tuple[str, dict[str, str | int]]]:
        """(stem of the .cu, macros) of every kernel that ``run`` can load."""


@lru_cache(maxsize=1)
def algorithms() -> tuple[Algorithm, ...]:
    """Every algorithm of this backend; a new one is a module here and a name in the list."""
    return tuple(cast(Algorithm, import_module(f"{__name__}.{name}")) for name in _NAMES)


def identity(device: Any) -> str:
    """What measured times are true for, besides this package's code and kernels."""
    own = getattr(device, "identity", None)
    return f"{device.name}, {device.arch}" if own is None else str(own())


def active(device: Any) -> AbstractContextManager[Any]:
    """What a call on `device` runs inside of: CuPy's own operations go to the current device."""
    if device.xp is np or device.xp.cuda.runtime.getDevice() == device.ordinal:
        return nullcontext()
    return cast(AbstractContextManager[Any], device.xp.cuda.Device(device.ordinal))


def signature(x: Any, w: Any, bias: Any, out: Any) -> Signature | None:
    """The signature of a call's arrays; None where they do not all lie on one device."""
    kind = type(x)
    if kind is np.ndarray:
        return _emulated_signature(x, w, bias, out)
    if type(w) is not kind:
        return None
    x_data, w_data = x.data, w.data
    place = x_data.device_id
    if w_data.device_id != place:
        return None
    key: Signature = (
        overriding(), place,
        x_data.ptr % _ALIGNED, x.shape, x.strides, x.dtype,
        w_data.ptr % _ALIGNED, w.shape, w.strides, w.dtype,
    )  # fmt: skip
    for name, array in ("bias", bias), ("out", out):
        if array is not None:
            if type(array) is not kind or array.data.device_id != place:
                return None
            key += (name, array.data.ptr % _ALIGNED, array.shape, array.strides, array.dtype)
    return key


def _emulated_signature(*given: Any) -> Signature | None:
    """The same for the arrays of a device whose memory is the host's."""
    device = overriding()
    if device is None or device.xp is not np:
        return None
    key: Signature = (device,)
    for array in given:
        if array is not None and type(array) is not np.ndarray:
            return None
        key += (None,) if array is None else (
            address(array) % _ALIGNED, array.shape, array.strides, array.dtype,
            array.flags.writeable,
        )  # fmt: skip
    return key


def bind(plan: plan.Plan, x: Any, w: Any, bias: Any, y: Any) -> Callable[..., None] | None:
    """The algorithm's own ``bind``, where it has one."""
    own = getattr(plan.implementation, "bind", None)
    return None if own is None else cast("Callable[..., None] | None", own(plan, x, w, bias, y))


def prepared(
    bound: Callable[..., None],
    device: Any,
    memory: tuple[int, ...],
    order: tuple[int, ...] | None,
    dtype: DType,
    again: Call,
) -> Call:
    """`bound`, with a result of its own where there is no `out`.

    `again` is what does the same for any arrays.
    """
    element = dtype.numpy
    if device.xp is np:
        empty, here = device.empty, None
    else:
        empty, here = device.xp.empty, device.xp.cuda.runtime.getDevice

    def call(x: Any, w: Any, bias: Any, out: Any) -> Any:
        if here is not None and here() != device.ordinal:
            with active(device):
                return call(x, w, bias, out)
        if out is None:
            out = empty(memory, element)
            result = out if order is None else out.transpose(order)
            if address(out) % _ALIGNED:  # by an allocator of the user's own
                return again(x, w, bias, result)
            bound(x, w, bias, out)
            return result
        if overlaps(out, (x, w, bias)):
            return again(x, w, bias, out)
        bound(x, w, bias, out)
        return out

    return call


def take(array: Any, library: Library, device: Any) -> Any:
    """The caller's array as the device's: its own memory where it lies there, else a copy."""
    if device.xp is np:  # the emulator's memory is the host's
        taken = _native(library.to_host(array))
    elif library.device(array) == "cpu":
        host = _native(library.to_host(array))
        order, back = _memory_order(host)
        with active(device):
            taken = device.xp.asarray(np.ascontiguousarray(host.transpose(order))).transpose(back)
    else:
        taken = library.to_cuda(array, device.xp)
    return taken if _addressable(taken) else _realigned(taken, device)


def _realigned(array: Any, device: Any) -> Any:
    """A copy at addresses that kernels can read."""
    xp = device.xp
    if xp is np:
        return np.array(array, order="C", copy=True)
    with active(device):  # byte by byte: CuPy's own kernels need aligned elements, too
        shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
        raw = xp.ndarray(shape, np.uint8, array.data, strides=strides)
        return xp.array(raw, order="C", copy=True).view(array.dtype)[..., 0]


def take_out(out: Any, library: Library, device: Any) -> Any:
    """The caller's `out` as the device's; a stand-in for one that no kernel can write."""
    if out is None:
        return None
    if library.device(out) != "cpu" and device.xp is not np:
        taken = library.to_cuda(out, device.xp)
        if not _addressable(taken):
            raise ValueError(
                "its elements do not lie at multiples of their size, which no kernel can write"
            )
        return taken
    host = library.to_host(out)
    if device.xp is np and host.dtype.isnative and _addressable(host):
        return host
    return device.empty(host.shape, host.dtype.newbyteorder("="))


def give(result: Any, library: Library, like: Any) -> Any:
    """The result as an array of the caller's library, where `like` lies."""
    if isinstance(result, np.ndarray):
        return library.from_host(result, like)
    if library.device(like) == "cpu":
        order, back = _memory_order(result)
        return library.from_host(result.transpose(order).get().transpose(back), like)
    return library.from_cuda(result, like)


def give_out(result: Any, library: Library, out: Any) -> None:
    """Bring the result to the caller's `out` where that does not share its memory."""
    if library.device(out) == "cpu":
        host = library.to_host(out)
        if not isinstance(result, np.ndarray):
            host[...] = result.get()
        elif not np.may_share_memory(host, result):
            host[...] = result
    elif isinstance(result, np.ndarray):
        out[...] = library.from_host(result, out)
    else:
        # The memory is the caller's already; its library's stream has still to wait for ours,
        # which it does when it takes an array in.
        library.from_cuda(result, out)


def overlaps(out: Any, operands: tuple[Any, ...]) -> bool:
    """Whether `out` may share memory with an operand."""
    if isinstance(out, np.ndarray):
        return any(a is not None and np.may_share_memory(out, a) for a in operands)
    share = sys.modules["cupy"].may_share_memory
    return any(a is not None and share(out, a) for a in operands)


def empty(shape: tuple[int, ...], dtype: DType, device: Any) -> Any:
    """An uninitialised C-contiguous array."""
    return device.empty(shape, dtype.numpy)


def _native(host: HostArray) -> HostArray:
    """In this machine's byte order."""
    return host if host.dtype.isnative else host.astype(host.dtype.newbyteorder("="))


def _memory_order(array: Any) -> tuple[list[int], list[int]]:
    """The axes from the widest stride to the narrowest, and the way back.

    Between host and device only contiguous memory travels; channels-last stays channels-last.
    """
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return order, sorted(range(array.ndim), key=order.__getitem__)


def _addressable(array: Any) -> bool:
    """Whether every element lies at a multiple of its size: what a GPU's loads require.

    Fields of packed structs and views of bytes may not; CUDA has no unaligned access.
    """
    bits = address(array)
    for stride in array.strides:
        bits |= stride
    return bool(bits & (array.itemsize - 1) == 0)  # sizes are powers of two


def warmup(plan: plan.Plan) -> None:
    """Compile and load the kernels of a plan, for arrays in the memory order that it expects."""
    prepare = getattr(plan.implementation, "prepare", None)
    if prepare is not None and 0 not in plan.problem.y_shape:
        with active(plan.device):
            prepare(plan.problem, plan.device, contiguous(plan.problem))
