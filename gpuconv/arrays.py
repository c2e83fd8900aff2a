"""Which library an array is of, and the way from it to a backend's own arrays and back.

A library is touched only when one of its arrays comes in: nothing here imports torch, jax or cupy.
On the host the way in is zero-copy (the backend's view shares the caller's memory), and so is the
way out, but for JAX, whose arrays must be aligned to 64 bytes to be adopted without a copy.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes

HostArray = np.ndarray[tuple[Any, ...], np.dtype[Any]]


class Library:
    """NumPy, and the base of the others: any library that speaks DLPack."""

    name = "numpy"

    def device(self, x: Any) -> str:
        """Where x lies: "cpu", or "cuda:0" and so on."""
        return "cpu"

    def dtype(self, x: Any) -> Any:
        """What ``dtypes.of`` understands."""
        return x.dtype

    def shape(self, x: Any) -> tuple[int, ...]:
        return tuple(x.shape)

    def strides(self, x: Any) -> tuple[int, ...]:
        """How far apart neighbours lie along each axis; row-major where the library hides it."""
        return tuple(x.strides)

    def to_host(self, x: Any) -> HostArray:
        """A NumPy array of x's memory."""
        return np.asarray(x)

    def from_host(self, y: HostArray, like: Any) -> Any:
        """An array of this library, of y's memory where the library can."""
        return y

    def to_cuda(self, x: Any, cupy: Any) -> Any:
        """A CuPy array of x's memory on a CUDA device; CuPy's stream waits for x's."""
        return cupy.from_dlpack(x)

    def from_cuda(self, y: Any, like: Any) -> Any:
        """An array of this library, of the CuPy array y's memory; its stream waits for CuPy's."""
        return like.__array_namespace__().from_dlpack(y)

    def check_result(self, dtype: dtypes.DType) -> None:
        """TypeError where an array of this library cannot hold `dtype`."""

    def writable(self, out: Any) -> bool:
        """Whether `out` can be written in place."""
        return bool(out.flags.writeable)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of C-contiguous memory."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))


class _Torch(Library):
    name = "torch"

    def device(self, x: Any) -> str:
        return str(x.device)

    def dtype(self, x: Any) -> str:
        return str(x.dtype).removeprefix("torch.")

    def strides(self, x: Any) -> tuple[int, ...]:
        dense = x.layout is sys.modules["torch"].strided
        return tuple(x.stride()) if dense else _row_major(tuple(x.shape))

    def _plain(self, x: Any) -> Any:
        """x without autograd, and without the bits that say "conjugate me when you read me"."""
        if x.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise TypeError(
                "a torch tensor that requires grad came in, and gpuconv would lose its gradient: "
                "pass tensor.detach(), or call inside torch.no_grad()"
            )
        return x.detach().resolve_conj().resolve_neg()

    def to_host(self, x: Any) -> HostArray:
        torch = sys.modules["torch"]
        x = self._plain(x).cpu()
        if x.dtype is torch.bfloat16:  # torch refuses to hand NumPy a type that is not NumPy's
            return x.view(torch.int16).numpy().view(dtypes.BFLOAT16.numpy)  # type: ignore[no-any-return]
        return x.numpy()  # type: ignore[no-any-return]

    def from_host(self, y: HostArray, like: Any) -> Any:
        torch = sys.modules["torch"]
        if y.dtype.name == "bfloat16":
            return torch.from_numpy(y.view(np.int16)).view(torch.bfloat16).to(like.device)
        return torch.from_numpy(y).to(like.device)

    def to_cuda(self, x: Any, cupy: Any) -> Any:
        torch = sys.modules["torch"]
        x = self._plain(x)
        if x.dtype is torch.bfloat16:  # as int16: CuPy's DLPack learnt bfloat16 late
            return cupy.from_dlpack(x.view(torch.int16)).view(dtypes.BFLOAT16.numpy)
        return cupy.from_dlpack(x)

    def from_cuda(self, y: Any, like: Any) -> Any:
        torch = sys.modules["torch"]
        if y.dtype.name == "bfloat16":
            return torch.from_dlpack(y.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(y)

    def writable(self, out: Any) -> bool:
        return not (out.is_conj() or out.is_neg())  # what is written there would be read otherwise


class _Jax(Library):
    name = "jax"

    def strides(self, x: Any) -> tuple[int, ...]:
        return _row_major(tuple(x.shape))

    def device(self, x: Any) -> str:
        if isinstance(x, sys.modules["jax"].core.Tracer):
            raise TypeError(
                "a JAX tracer, which has no values: under jax.jit, jax.grad or jax.vmap call "
                "gpuconv.jax's functions"
            )
        platforms = {d.platform for d in x.devices()}
        if platforms == {"cpu"}:
            return "cpu"
        return ", ".join(
            sorted(f"{'cuda' if d.platform == 'gpu' else d.platform}:{d.id}" for d in x.devices())
        )

    def to_host(self, x: Any) -> HostArray:
        return np.asarray(x)

    def from_host(self, y: HostArray, like: Any) -> Any:
        return sys.modules["jax"].numpy.asarray(y)

    def to_cuda(self, x: Any, cupy: Any) -> Any:
        if len(x.devices()) > 1:
            raise TypeError(f"a JAX array spread over {self.device(x)}; gather it on one device")
        return cupy.from_dlpack(x)

    def from_cuda(self, y: Any, like: Any) -> Any:
        cupy = sys.modules["cupy"]
        y = cupy.ascontiguousarray(y)  # JAX adopts row-major memory alone
        # JAX gives the memory of an array that is dropped to the next, whether or not CuPy's stream
        # has read it.
        cupy.cuda.get_current_stream().synchronize()
        return sys.modules["jax"].numpy.from_dlpack(y)

    def check_result(self, dtype: dtypes.DType) -> None:
        wide = dtype.itemsize == (16 if dtype.is_complex else 8)
        if wide and not sys.modules["jax"].config.jax_enable_x64:
            raise TypeError(
                f"the result is {dtype}, which JAX holds only with jax_enable_x64: enable it, "
                f"or ask for a 32-bit result with dtype="
            )

    def writable(self, out: Any) -> bool:
        return False


def _lies_on_host(x: Any) -> bool:
    """Whether NumPy can look at what a DLPack library holds."""
    return bool(x.__dlpack_device__()[0] == 1)


class _DLPack(Library):
    """Any other library whose arrays have ``__array_namespace__`` and DLPack."""

    def __init__(self, name: str) -> None:
        self.name = name

    def dtype(self, x: Any) -> str:
        return str(x.dtype)

    def device(self, x: Any) -> str:
        kind, index = x.__dlpack_device__()
        return "cpu" if kind == 1 else f"cuda:{index}" if kind == 2 else f"DLPack {kind}:{index}"

    def strides(self, x: Any) -> tuple[int, ...]:
        return np.from_dlpack(x).strides if _lies_on_host(x) else _row_major(tuple(x.shape))

    def to_host(self, x: Any) -> HostArray:
        return np.from_dlpack(x)

    def from_host(self, y: HostArray, like: Any) -> Any:
        return like.__array_namespace__().from_dlpack(y)

    def writable(self, out: Any) -> bool:
        return not _lies_on_host(out) or bool(np.from_dlpack(out).flags.writeable)


class _Exporter(_DLPack):
    """Objects with DLPack and nothing else: what comes back is of NumPy, or of CuPy on a GPU."""

    def dtype(self, x: Any) -> Any:
        return np.from_dlpack(x).dtype

    def shape(self, x: Any) -> tuple[int, ...]:
        return np.from_dlpack(x).shape

    def from_host(self, y: HostArray, like: Any) -> Any:
        return y

    def from_cuda(self, y: Any, like: Any) -> Any:
        return y

    def writable(self, out: Any) -> bool:
        return out.__dlpack_device__()[0] == 1 and super().writable(out)


class _Cupy(Library):
    name = "cupy"

    def device(self, x: Any) -> str:
        return f"cuda:{x.device.id}"

    def to_host(self, x: Any) -> HostArray:
        return x.get()  # type: ignore[no-any-return]

    def from_host(self, y: HostArray, like: Any) -> Any:
        with like.device:
            return sys.modules["cupy"].asarray(y)

    def to_cuda(self, x: Any, cupy: Any) -> Any:
        return x

    def from_cuda(self, y: Any, like: Any) -> Any:
        return y

    def writable(self, out: Any) -> bool:
        return True


NUMPY = Library()
_KNOWN = {"torch": _Torch(), "jax": _Jax(), "jaxlib": _Jax(), "cupy": _Cupy()}
_KNOWN["jaxlib"] = _KNOWN["jax"]


@lru_cache(maxsize=256)
def _library_of_type(cls: Any) -> Library | None:
    if cls is np.ndarray:
        return NUMPY
    if issubclass(cls, np.ma.MaskedArray):
        return None
    if issubclass(cls, np.ndarray):
        return NUMPY
    for base in cls.__mro__:
        known = _KNOWN.get(base.__module__.partition(".")[0])
        if known is not None and hasattr(cls, "shape"):  # else a dtype or a device of it
            return known
    if not hasattr(cls, "__dlpack__"):
        return None
    library = _DLPack if hasattr(cls, "__array_namespace__") else _Exporter
    return library(cls.__module__.partition(".")[0])


@lru_cache(maxsize=256)
def home(cls: Any) -> str | None:
    """The backend whose own arrays are of this very class."""
    if cls is np.ndarray:
        return "numpy"
    return "cuda" if (cls.__module__, cls.__name__) == ("cupy", "ndarray") else None


def maybe_library(x: Any) -> Library | None:
    """The library whose array `x` is; None for what is no array."""
    cls: Any = type(x)
    return _library_of_type(cls)


def library_of(function: str, name: str, x: Any) -> Library:
    """The library whose array `x` is; TypeError for what is no array, naming the argument."""
    library = maybe_library(x)
    if library is None:
        what = (
            "a masked array, whose mask a convolution cannot honour: fill it first"
            if isinstance(x, np.ma.MaskedArray)
            else f"a {type(x).__module__}.{type(x).__name__}; it takes an array "
            f"(NumPy, CuPy, torch, JAX, or any with DLPack)"
        ).replace("a builtins.", "a ")
        raise TypeError(f"{function}: {name} is {what}")
    return library


def same_library(function: str, arrays: dict[str, Any]) -> tuple[Library, str]:
    """The one library and device of all of `arrays`; TypeError names two that differ."""
    first: tuple[str, Library, str] | None = None
    for name, array in arrays.items():
        library = library_of(function, name, array)
        try:
            device = library.device(array)
        except TypeError as error:
            raise TypeError(f"{function}: {name} is {error}") from None
        if first is None:
            first = (name, library, device)
        elif first[1] is not library or first[2] != device:
            raise TypeError(
                f"{function}: {first[0]} is of {first[1].name} on {first[2]} but {name} is of "
                f"{library.name} on {device}; bring them to one library and device"
            )
    assert first is not None
    return first[1], first[2]
