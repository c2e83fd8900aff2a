"""Whether a CUDA device works here, and what the rest of the backend may ask of it.

A device counts when it answers *and* a trivial kernel compiles, loads and runs on it. That is
tried once per process, at the first call that needs to know; importing this costs nothing.

``Device`` is the seam: everything beyond it talks to a device through these few attributes and
methods. ``CudaDevice`` is a real one, through CuPy. ``override`` puts another in its place.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from gpuconv.arrays import Library
from gpuconv.errors import BackendError


class Device(Protocol):
    """What kernels run on, as planning and launching see it."""

    name: str
    xp: ModuleType  # the namespace of its arrays: cupy
    arch: str  # what kernels are compiled for: "sm_90a"
    sm_count: int
    max_shared_bytes: int  # of one block, opted in
    l2_bytes: int
    bandwidth: float  # of its memory, bytes per second
    clock_hz: float

    def load(self, source: str, macros: Mapping[str, str | int], kernel: str | None = None) -> Any:
        """The kernel `kernel` (named as its file where left out) of kernels_cuda/`source`.cu."""

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Start `kernel` on the current stream; nothing waits for it.

        An array is passed as the pointer to its first element, None as a null pointer, a typed
        NumPy scalar and a 0-d NumPy array of a structured dtype by value.
        """

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised C-contiguous array."""

    def synchronize(self) -> None:
        """Wait for everything that was started."""


def capability(device: Device) -> int:
    """Ten times the compute capability that kernels are compiled for: 90 for "sm_90a"."""
    return int("".join(c for c in device.arch if c.isdigit()))


# ---- a real device ---------------------------------------------------------------------------

# cudaDeviceAttr: unlike the properties struct, the same numbers in every CUDA.
_CLOCK_KHZ, _SM_COUNT, _MEMORY_KHZ, _BUS_BITS, _L2_BYTES = 13, 16, 36, 37, 38
_MAJOR, _MINOR, _SHARED_BYTES = 75, 76, 97

_NULL = np.uint64(0)  # CuPy 13 passes None as no argument at all, not as a null pointer


class _Kernel:
    """A loaded kernel, and how much dynamic shared memory it may use so far.

    That is asked for however little it is: the 48 KiB that a block gets without asking are for what
    the kernel declares as well.
    """

    __slots__ = ("function", "shared_limit")

    def __init__(self, function: Any) -> None:
        self.function = function
        self.shared_limit = 0


class _Arguments:
    """What the driver is given of one launch: where each argument lies. It copies them at once."""

    __slots__ = ("_fixed", "_table", "address", "pointers")

    def __init__(self, count: int, fixed: list[np.ndarray[Any, Any]]) -> None:
        self._fixed = fixed  # keeps their memory
        self.pointers = (ctypes.c_uint64 * count)()  # the arrays', for the caller to fill in
        first = ctypes.addressof(self.pointers)
        places = [first + 8 * i for i in range(count)] + [value.ctypes.data for value in fixed]
        self._table = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._table)


class CudaDevice:
    """One CUDA device, through CuPy: its current stream, its memory pool."""

    def __init__(self, ordinal: int) -> None:
        from gpuconv.cuda_backend import compiler

        self.ordinal = ordinal
        self.xp = self._cupy = import_module("cupy")
        runtime = self._runtime = self._cupy.cuda.runtime
        self._driver: Any = import_module("cupy_backends.cuda.api.driver")
        name = runtime.getDeviceProperties(ordinal)["name"]
        self.name = f"cuda:{ordinal}, {name.decode() if isinstance(name, bytes) else name}"

        def attribute(number: int) -> int:
            return int(runtime.deviceGetAttribute(number, ordinal))

        major, minor = self.compute_capability = attribute(_MAJOR), attribute(_MINOR)
        if (major, minor) < (7, 5):  # where the tables of rates and limits begin
            raise BackendError(
                f"gpuconv needs compute capability 7.5 or more; {self.name} has {major}.{minor}"
            )
        self.arch = compiler.architecture(self.compute_capability)
        self.sm_count = attribute(_SM_COUNT)
        self.max_shared_bytes = attribute(_SHARED_BYTES)
        self.l2_bytes = attribute(_L2_BYTES)

        def shown(number: int) -> int:
            with suppress(Exception):
                return attribute(number)
            return 0

        # Two transfers per clock. Virtual GPUs hide their clocks, and a driver may refuse to tell
        # them: then the numbers of a mid-size device stand in, since only ratios decide between
        # algorithms.
        memory = 2e3 * shown(_MEMORY_KHZ) * shown(_BUS_BITS) / 8
        self.bandwidth = memory or 1e12
        self.clock_hz = 1e3 * shown(_CLOCK_KHZ) or 1.5e9
        self._kernels: dict[Any, _Kernel] = {}
        self._threads = threading.local()
        self._limits = threading.Lock()

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<CudaDevice {self.name}>"

    def identity(self) -> str:
        """Device, driver and compiler: which of several alike does not matter."""
        from gpuconv.cuda_backend import compiler

        model = self.name.partition(", ")[2]
        driver = self._runtime.driverGetVersion()
        return f"{model}, {self.arch}, driver {driver}, NVRTC {compiler.nvrtc_version()}"

    def load(
        self, source: str, macros: Mapping[str, str | int], kernel: str | None = None
    ) -> _Kernel:
        from gpuconv.cuda_backend import compiler

        key = (source, kernel, frozenset(macros.items()))
        found = self._kernels.get(key)
        if found is None:
            compiled = compiler.compile_kernel(source, macros, self.arch)
            with self._cupy.cuda.Device(self.ordinal):
                module = self._cupy.cuda.function.Module()
                module.load(compiled.cubin)
                found = _Kernel(module.get_function(kernel or source))
            self._kernels[key] = found
        return found

    def launch(
        self,
        kernel: _Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        if self._runtime.getDevice() != self.ordinal:
            with self._cupy.cuda.Device(self.ordinal):
                return self.launch(kernel, grid, block, args, shared_bytes)
        if shared_bytes > kernel.shared_limit:
            self._allow_shared(kernel, shared_bytes)
        values = [_NULL if a is None else a for a in args]
        kernel.function(grid, block, values, shared_bytes)

    def starter(
        self,
        kernel: _Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        constants: tuple[Any, ...],
        shared_bytes: int,
        count: int,
    ) -> Callable[[tuple[Any, ...]], None]:
        """``launch`` of `count` arrays and `constants` with these packed once, for many calls.

        This device is the current one when the function is called.
        """
        launch_kernel = self._driver.launchKernel
        current_stream = self._cupy.cuda.get_current_stream
        function, ordinal, threads = kernel.function.ptr, self.ordinal, self._threads
        fixed = [np.asarray(value) for value in constants]
        fill = struct.Struct(f"{count}Q").pack_into
        unused: list[_Arguments] = []  # as many as there were calls at one time

        def start(arrays: tuple[Any, ...]) -> None:
            if not hasattr(threads, "launched"):  # CuPy's own launch makes a thread its context
                self.launch(kernel, grid, block, (*arrays, *constants), shared_bytes)
                threads.launched = True
                return
            try:
                arguments = unused.pop()
            except IndexError:
                arguments = _Arguments(count, fixed)
            fill(arguments.pointers, 0, *[0 if a is None else a.data.ptr for a in arrays])
            stream = current_stream(ordinal).ptr
            launch_kernel(function, *grid, *block, shared_bytes, stream, arguments.address, 0)
            unused.append(arguments)

        if shared_bytes > kernel.shared_limit:
            self._allow_shared(kernel, shared_bytes)
        return start

    def _allow_shared(self, kernel: _Kernel, shared_bytes: int) -> None:
        if not hasattr(self._threads, "launched"):
            self._runtime.memGetInfo()  # as CuPy makes a thread its context: the driver needs one
        with self._limits:
            if shared_bytes <= kernel.shared_limit:  # another thread was faster
                return
            self._driver.funcSetAttribute(
                kernel.function.ptr,
                self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes,
            )
            kernel.shared_limit = shared_bytes

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if self._runtime.getDevice() != self.ordinal:
            with self._cupy.cuda.Device(self.ordinal):
                return self._cupy.empty(shape, dtype)
        return self._cupy.empty(shape, dtype)

    def synchronize(self) -> None:
        with self._cupy.cuda.Device(self.ordinal):
            self._runtime.deviceSynchronize()


# ---- which device ----------------------------------------------------------------------------

_overrides: list[Any] = []


@contextmanager
def override(device: Any) -> Iterator[Any]:
    """`device` is the CUDA device of every place inside the block: the emulator's way in."""
    _overrides.append(device)
    try:
        yield device
    finally:
        _overrides.remove(device)


def overriding() -> Any:
    """The device that is the CUDA device of every place, where ``override`` says so."""
    return _overrides[-1] if _overrides else None


def device(place: str = "cpu") -> Any:
    """The device of arrays that lie at `place` ("cuda:1"); CuPy's current one for host arrays."""
    if _overrides:
        return _overrides[-1]
    if reason := why_not():
        raise BackendError(f"the CUDA backend cannot run here: {reason}") from reason
    if place.startswith("cuda:"):
        return _cuda_device(int(place.rpartition(":")[2]))
    return _cuda_device(import_module("cupy").cuda.runtime.getDevice())


@cache
def _cuda_device(ordinal: int) -> CudaDevice:
    return CudaDevice(ordinal)


def why_not() -> BackendError | None:
    """Why CUDA cannot run here (one line, its cause chained), or None where it can."""
    if _overrides:
        return None
    with _probing:
        return _probe()


_probing = threading.Lock()  # the first two callers of a threaded program share one probe


@lru_cache(maxsize=1)
def _probe() -> BackendError | None:
    """Try every step that a call would take. CuPy's exceptions differ by version and by state."""
    from gpuconv.cuda_backend import compiler

    try:
        import_module("cupy")
    except ImportError as error:
        if getattr(error, "name", None) == "cupy":
            return _because(
                "CuPy is not installed: pip install 'gpuconv[cuda12]' or 'gpuconv[cuda13]'", error
            )
        return _because(f"CuPy cannot be imported: {_first_line(_root(error))}", error)
    except Exception as error:
        return _because(f"CuPy cannot be imported: {_first_line(_root(error))}", error)
    try:
        runtime = import_module("cupy").cuda.runtime
        if getattr(runtime, "is_hip", False):
            return BackendError("this CuPy is for AMD's ROCm; gpuconv's kernels are for CUDA")
        count = runtime.getDeviceCount()
    except Exception as error:
        return _because(_driver_reason(error), error)
    if count == 0:
        return BackendError(_no_device())
    try:
        version = ".".join(map(str, compiler.nvrtc_version()))
    except Exception as error:
        return _because(
            f"CuPy finds no NVRTC, CUDA's run-time compiler: pip install "
            f"'{_cupy_package()}[ctk]' ({_first_line(error)})",
            error,
        )
    try:
        found = _cuda_device(runtime.getDevice())
    except Exception as error:
        return _because(f"the CUDA device cannot be used: {_first_line(error)}", error)
    try:
        compiler.compile_kernel("probe", {}, found.arch)
    except Exception as error:
        if not compiler.include_folders():
            return _because(
                f"CUDA's headers (cuda_fp16.h) are not found: pip install "
                f"'{_cupy_package()}[ctk]', or set CUDA_PATH",
                error,
            )
        return _because(
            f"NVRTC {version} does not compile a kernel for {found.arch}: {_first_line(error)}",
            error,
        )
    try:
        _run_probe(found)
    except Exception as error:
        return _because(
            f"{found.name} does not run a kernel that NVRTC {version} compiled for {found.arch} "
            f"(is the driver too old for it?): {_first_line(error)}",
            error,
        )
    return None


def _run_probe(device: Any) -> None:
    out = device.empty((1,), np.dtype(np.int32))
    device.launch(device.load("probe", {}), (1, 1, 1), (1, 1, 1), (out, np.int32(1234567)))
    if int(out[0]) != 1234567:
        raise RuntimeError(f"a kernel that writes 1234567 left {int(out[0])}")


def _because(reason: str, cause: BaseException) -> BackendError:
    error = BackendError(reason)
    error.__cause__ = cause
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if any(c.isalnum() for c in line)), type(error).__name__)
    return text if len(text) <= 200 else text[:197] + "..."


def _root(error: BaseException) -> BaseException:
    """What it all began with: CuPy wraps an ImportError in a page of advice."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def _cupy_package() -> str:
    from importlib import metadata

    for package in ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return package
    return "cupy-cuda12x"


def _has_driver() -> bool:
    """Whether the driver's library can be loaded."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _no_device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return f"the CUDA driver sees no device{hint}"


def _driver_reason(error: Exception) -> str:
    """CUDA says "insufficient driver" of a driver that is too old, and of none at all."""
    text = str(error).lower()
    if "nodevice" in text or "no cuda-capable device" in text:
        return _no_device()
    if not _has_driver():
        return "no NVIDIA driver is installed (libcuda is not found)"
    if "insufficient" in text:
        return f"the NVIDIA driver is too old for this CuPy: {_first_line(error)}"
    return f"the CUDA driver does not answer: {_first_line(error)}"


def describe() -> list[str]:
    """Lines for show_config: the devices, and where compiled kernels are kept."""
    from gpuconv.cuda_backend import compiler

    if _overrides:
        found = _overrides[-1]
        return [f"cuda backend: {found.name}, {found.arch}"]
    runtime = import_module("cupy").cuda.runtime
    lines = []
    for ordinal in range(runtime.getDeviceCount()):
        try:
            found = _cuda_device(ordinal)
        except BackendError as error:  # another device than the one that the probe found working
            lines.append(f"cuda backend: {error}")
            continue
        lines.append(
            f"cuda backend: {found.name}, {found.arch}, {found.sm_count} multiprocessors, "
            f"{found.bandwidth / 1e9:.0f} GB/s"
        )
    driver, cuda = (_version(v) for v in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    nvrtc = ".".join(map(str, compiler.nvrtc_version()))
    lines.append(f"  driver for CUDA {driver}, CuPy's CUDA {cuda}, NVRTC {nvrtc}")
    lines.append(f"  compiled kernels: {compiler.cache_folder()}")
    return lines


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# ---- arrays of anyone, as the device's -------------------------------------------------------


def asarray(obj: Any, library: Library | None) -> Any:
    """`obj`, an array of `library` or what NumPy understands, as an array of the device."""
    from gpuconv.cuda_backend import take

    if library is None:
        obj, library = np.asarray(obj), Library()
    return take(obj, library, device(library.device(obj)))
