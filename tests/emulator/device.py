"""EmulatedDevice: the seam of gpuconv/cuda_backend/device.py, over NumPy arrays and g++."""

from __future__ import annotations

import ctypes
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .build import MODES, EmulatorError, Mode, compile_kernel, default_cache
from .launch import (
    Entry,
    Extent,
    LaunchStruct,
    LocalLibrary,
    RaceStruct,
    Relocation,
    RemoteLibrary,
    source_line,
)
from .report import Report

ThreadOrder = Literal["ascending", "descending", "random", "interleaved"]
THREAD_ORDERS: tuple[ThreadOrder, ...] = ("ascending", "descending", "random", "interleaved")
BlockOrder = Literal["ascending", "shuffled"]
BLOCK_ORDERS: tuple[BlockOrder, ...] = ("ascending", "shuffled")

_KERNELS = Path(__file__).resolve().parents[2] / "kernels_cuda"
_KINDS = ("a pointer", "an integer", "a float", "a struct", "a bool")
_POINTER, _INTEGER, _FLOAT, _OBJECT, _BOOL = range(5)
# Bytes of shared memory of a block: what it may have without asking, and asked for, by architecture
# (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_UNASKED_SHARED = 48 << 10
_MOST_SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 120: 99 << 10}
_SANITIZED_LIMIT = 1 << 30  # bytes that a sanitized launch may copy to its process and back


@functools.cache
def _library(path: Path, mode: Mode, cache: Path) -> LocalLibrary | RemoteLibrary:
    return RemoteLibrary(path, cache) if mode == "sanitize" else LocalLibrary(path)


@dataclass(frozen=True)
class EmulatedKernel:
    """A compiled entry point, ready for EmulatedDevice.launch."""

    name: str
    entry: Entry
    mode: Mode
    folder: str
    library: LocalLibrary | RemoteLibrary


class EmulatedDevice:
    """A device whose memory is NumPy's and whose kernels are compiled by g++.

    mode: "plain" (fast), "sanitize" (AddressSanitizer and UBSan) or "watch" (races, bank
    conflicts, sectors). order and block_order: how threads and blocks take turns; `seed` drives
    the random ones. folder: where the .cu files are. time_limit: seconds of processor time that
    a launch may take. opt_in: whether a launch asks for the dynamic shared memory that it uses, as
    CudaDevice's do; else it is refused above 48 KiB until `allow_shared` was called.
    """

    name = "emulator"
    xp: types.ModuleType = np
    # An H200's, so that plans come out as on the real thing.
    sm_count = 132
    l2_bytes = 50 << 20
    bandwidth = 4.8e12
    clock_hz = 1.785e9

    def __init__(
        self,
        mode: Mode = "plain",
        *,
        folder: str | Path | None = None,
        arch: str = "sm_90a",
        order: ThreadOrder = "ascending",
        block_order: BlockOrder = "ascending",
        seed: int = 0,
        time_limit: float = 120.0,
        opt_in: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        for name, value, legal in (
            ("mode", mode, MODES),
            ("order", order, THREAD_ORDERS),
            ("block_order", block_order, BLOCK_ORDERS),
        ):
            if value not in legal:
                raise ValueError(f"{name}={value!r}: one of {', '.join(legal)}")
        self.mode = mode
        self.arch = arch
        self.order = order
        self.block_order = block_order
        self.seed = seed
        self.time_limit = time_limit
        self.opt_in = opt_in
        number = int("".join(c for c in arch if c.isdigit()))
        self.max_shared_bytes = _MOST_SHARED.get(number, 227 << 10)
        self.report = Report()
        self.launches = 0
        self._allowed: dict[EmulatedKernel, int] = {}
        self._folder = Path(folder).resolve() if folder else _KERNELS
        self._cache = Path(cache).resolve() if cache else default_cache()
        self._cache.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return f"{self.name} ({self.mode}, {self.arch})"

    # ---- memory

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array that shows what nobody wrote: NaN, and for integers 0xA5 in every byte.

        It begins at a multiple of 256 bytes, as on a real device.
        """
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # No NumPy array: what lies around the result is not its user's to reach.
        memory = (ctypes.c_ubyte * (count + 256))()
        ctypes.memset(memory, 0xA5 if dtype.kind in "iub" else 0xFF, count + 256)
        return np.ndarray(shape, dtype, memory, -ctypes.addressof(memory) % 256)

    def synchronize(self) -> None:
        """Every launch has already ended when it returns."""

    # ---- kernels

    def load(
        self, source: str, macros: Mapping[str, str | int], kernel: str | None = None
    ) -> EmulatedKernel:
        """Compiles `source`.cu, or takes it from the cache; `kernel` is the entry point."""
        name = kernel or source
        path = compile_kernel(self._folder, source, macros, self.arch, self.mode, self._cache)
        library = _library(path, self.mode, self._cache)
        if name not in library.entries:
            there = ", ".join(library.entries) or "none"
            raise EmulatorError(f"no kernel {name} in {source}.cu (there is: {there})")
        return EmulatedKernel(name, library.entries[name], self.mode, self._folder.name, library)

    def allow_shared(self, kernel: EmulatedKernel, shared_bytes: int) -> None:
        """cuFuncSetAttribute of MAX_DYNAMIC_SHARED_SIZE_BYTES: EmulatorError beyond the limit."""
        static = kernel.entry.static_shared
        if static + shared_bytes > self.max_shared_bytes:
            raise EmulatorError(
                f"kernel {kernel.name}: {static} bytes of static and {shared_bytes} of dynamic "
                f"shared memory; a block has at most {self.max_shared_bytes}"
            )
        self._allowed[kernel] = shared_bytes

    def launch(
        self,
        kernel: EmulatedKernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Runs every block to its end; EmulatorError says what went wrong, where, and who did."""
        if kernel.mode != self.mode:
            raise EmulatorError(
                f"kernel {kernel.name} was loaded in mode {kernel.mode}, "
                f"this device's is {self.mode}"
            )
        grid, block = _three(grid), _three(block)
        if self.opt_in and shared_bytes > self._allowed.get(kernel, 0):
            self.allow_shared(kernel, shared_bytes)
        self._check_limits(kernel, grid, block, shared_bytes)
        arguments, extents, relocations = _marshal(kernel, args)
        if self.mode == "sanitize":
            total = sum(e.end - e.begin for e in extents)
            if total > _SANITIZED_LIMIT:
                raise EmulatorError(
                    f"kernel {kernel.name}: arguments span {total} bytes; sanitize mode copies "
                    f"them and stops at {_SANITIZED_LIMIT}: use another mode"
                )
        launch = LaunchStruct(
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            max_shared_bytes=self.max_shared_bytes,
            seed=self.seed + self.launches,
            thread_order=THREAD_ORDERS.index(self.order),
            block_order=BLOCK_ORDERS.index(self.block_order),
            entry=kernel.entry.index,
            time_limit=self.time_limit,
            argument_bytes=len(arguments),
            extent_count=len(extents),
        )
        self.launches += 1
        result, sites, races, uncounted = kernel.library.launch(
            launch, arguments, extents, relocations
        )

        def line(pc: int) -> str:
            return source_line(kernel.library.path, pc, kernel.folder)

        if result.message:
            message = result.message.decode(errors="replace")
            head, _, pc = message.partition("@pc=")
            raise EmulatorError(f"{head}at {line(int(pc, 16))}" if pc else message)
        if races:
            texts = [_describe_race(race, block, grid, line) for race in races]
            raise EmulatorError(f"kernel {kernel.name}: " + "\n".join(texts))
        blocks, threads = _volume(grid), _volume(grid) * _volume(block)
        if (result.blocks_run, result.threads_run) != (blocks, threads):
            raise EmulatorError(
                f"kernel {kernel.name}: {result.blocks_run} of {blocks} blocks and "
                f"{result.threads_run} of {threads} threads ran to their end"
            )
        self.report.add(kernel.name, sites, uncounted, line)

    def _check_limits(
        self,
        kernel: EmulatedKernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
    ) -> None:
        problem = None
        bound, static = kernel.entry.launch_bound, kernel.entry.static_shared
        if min(grid) < 1 or min(block) < 1:
            problem = "every extent of grid and block is at least 1"
        elif _volume(block) > 1024 or block[2] > 64:
            problem = "a block has at most 1024 threads, and 64 in z"
        elif grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            problem = "a grid has at most 2^31 - 1 blocks in x, and 65535 in y and z"
        elif bound and _volume(block) > bound:
            problem = f"the kernel's __launch_bounds__ allow {bound} threads in a block"
        elif shared_bytes < 0:
            problem = "a size is not negative"
        elif static > _UNASKED_SHARED:
            problem = f"{static} bytes are static, which may be 48 KiB"
        elif shared_bytes > max(self._allowed.get(kernel, 0), _UNASKED_SHARED - static):
            problem = f"with {static} static bytes they are more than 48 KiB, and were not allowed"
        if problem:
            raise EmulatorError(
                f"kernel {kernel.name}: cannot launch grid {grid}, block {block}, "
                f"{shared_bytes} bytes of dynamic shared memory: {problem}"
            )


def _three(extents: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (int(extent) for extent in extents)
    return x, y, z


def _volume(extents: tuple[int, int, int]) -> int:
    return extents[0] * extents[1] * extents[2]


# ---- arguments


def _span(array: np.ndarray) -> tuple[int, int]:
    """First byte and end of the memory that the elements of an array occupy."""
    first = last = array.ctypes.data
    for extent, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            first += (extent - 1) * stride
        else:
            last += (extent - 1) * stride
    return first, last + array.itemsize


def _origin(array: np.ndarray) -> int:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.ctypes.data


def _is_value(argument: Any) -> bool:
    if isinstance(argument, np.ndarray):
        return argument.ndim == 0 and argument.dtype.names is not None
    # NumPy's scalars, and those of types that others add to it (bfloat16).
    return isinstance(argument, np.generic) or (
        type(argument).__module__ != "builtins" and hasattr(argument, "dtype")
    )


def _fits(dtype: np.dtype, size: int, kind: int) -> bool:
    if dtype.itemsize != size:
        return False
    if dtype.names is not None or dtype.kind in "cV":
        return kind == _OBJECT
    if dtype.kind == "b":
        return kind == _BOOL
    if dtype.kind in "iu":
        return kind == _INTEGER
    return kind == (_OBJECT if size == 2 else _FLOAT)


def _marshal(
    kernel: EmulatedKernel, args: tuple[Any, ...]
) -> tuple[bytearray, list[Extent], list[Relocation]]:
    parameters = kernel.entry.parameters
    if len(args) != len(parameters):
        raise EmulatorError(
            f"kernel {kernel.name} takes {len(parameters)} arguments, {len(args)} were given"
        )
    arguments = bytearray()
    spans: list[Extent] = []
    pointers: list[tuple[int, int]] = []
    for index, (argument, (size, kind)) in enumerate(zip(args, parameters, strict=True)):
        at = len(arguments)
        data: bytes
        if _is_value(argument):
            value = np.asarray(argument)
            if not _fits(value.dtype, size, kind):
                raise _mismatch(kernel, index, f"{value.dtype} of {value.nbytes} bytes", size, kind)
            data = value.tobytes()
        elif argument is None or isinstance(argument, np.ndarray):
            if kind != _POINTER:
                what = "None" if argument is None else f"an array of {argument.dtype}"
                raise _mismatch(kernel, index, what, size, kind)
            data = bytes(8)
            if argument is not None and argument.size:
                begin, end = _span(argument)
                spans.append(
                    Extent(
                        begin=begin,
                        end=end,
                        origin=_origin(argument),
                        granule=min(4, argument.dtype.alignment),
                        writable=argument.flags.writeable,
                        argument=index,
                    )
                )
                pointers.append((at, argument.ctypes.data))
            elif argument is not None:
                data = argument.ctypes.data.to_bytes(8, "little")
        else:
            raise _mismatch(
                kernel, index, f"the {type(argument).__name__} {argument!r}", size, kind
            )
        arguments += data.ljust((size + 15) // 16 * 16, b"\0")
    extents = _merge(spans)
    relocations = []
    for at, pointer in pointers:
        place = next(i for i, e in enumerate(extents) if e.begin <= pointer < e.end)
        relocations.append(Relocation(at, place, pointer - extents[place].begin))
    return arguments, extents, relocations


def _mismatch(
    kernel: EmulatedKernel, index: int, given: str, size: int, kind: int
) -> EmulatorError:
    return EmulatorError(
        f"kernel {kernel.name}: argument {index} is {given}, the kernel takes {_KINDS[kind]} of "
        f"{size} bytes (arrays, None, typed NumPy scalars and structs can be passed)"
    )


def _merge(spans: list[Extent]) -> list[Extent]:
    """Sorted and disjoint: arrays that share bytes are one extent, neighbours stay apart."""
    merged: list[Extent] = []
    for span in sorted(spans, key=lambda s: (s.begin, s.argument)):
        if merged and span.begin < merged[-1].end:
            last = merged[-1]
            last.end = max(last.end, span.end)
            last.granule = min(last.granule, span.granule)
            last.writable = last.writable or span.writable
        else:
            merged.append(span)
    return merged


# ---- races


def _position(linear: int, extents: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, _ = extents
    return linear % x, linear // x % y, linear // (x * y)


def _describe_race(
    race: RaceStruct, block: tuple[int, int, int], grid: tuple[int, int, int], line: Any
) -> str:
    def who(thread: int, number: int, write: int, pc: int) -> str:
        verb = "writes" if write else "reads"
        text = f"thread {_position(thread, block)}"
        if race.first_block != race.second_block:
            text += f" of block {_position(number, grid)}"
        return f"{text} {verb} it at {line(pc)}"

    place = f"shared `{race.variable.decode()}`" if race.shared else f"argument {race.argument}"
    first = who(race.first_thread, race.first_block, race.first_write, race.first_pc)
    second = who(race.second_thread, race.second_block, race.second_write, race.second_pc)
    if race.first_block == race.second_block:
        where, why = f"block {_position(race.first_block, grid)}, ", "no barrier between"
    else:
        where, why = "", "blocks have no order"
    times = f" ({race.count} times)" if race.count > 1 else ""
    return f"race: {where}{place} byte {race.offset}: {first}, {second}; {why}{times}"
