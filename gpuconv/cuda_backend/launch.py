"""What kernels are launched with: the problem as a struct, and the macros of types and indices.

``PROBLEM`` mirrors ``struct Problem`` of kernels_cuda/problem.cuh. An algorithm packs it once per
set of strides (its ``prepare`` is cached), so that a repeated call does little but launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.dtypes import DType
from gpuconv.problem import PADDING_MODES, ConvProblem

Strides = tuple[int, ...]
Macros = dict[str, "str | int"]

DIVISOR = np.dtype([("value", np.int64), ("magic", np.uint32), ("shift", np.int32)], align=True)
PROBLEM = np.dtype(
    [
        ("x_strides", np.int64, 5),
        ("w_strides", np.int64, 5),
        ("y_strides", np.int64, 5),
        ("bias_stride", np.int64),
        ("w_offset", np.int64),
        ("batch", np.int64),
        ("in_channels", np.int64),
        ("out_channels", np.int64),
        ("groups", np.int64),
        ("group_in", np.int64),
        ("group_out", np.int64),
        ("input", np.int64, 3),
        ("filter", np.int64, 3),
        ("output", np.int64, 3),
        ("stride", np.int64, 3),
        ("dilation", np.int64, 3),
        ("pad_lo", np.int64, 3),
        ("output_divisor", DIVISOR, 3),
        ("filter_divisor", DIVISOR, 3),
        ("out_channels_divisor", DIVISOR),
        ("group_in_divisor", DIVISOR),
        ("group_out_divisor", DIVISOR),
        ("boundary", np.int32),
        ("x_dtype", np.int32),
        ("w_dtype", np.int32),
        ("bias_dtype", np.int32),
        ("y_dtype", np.int32),
        ("channels_last", np.int32),
    ],
    align=True,
)
BOUNDARY = {mode: code for code, mode in enumerate(PADDING_MODES)}
DTYPE = {dtype: code for code, dtype in enumerate(dtypes.ALL)}

# Linear indices run past the end by at most one step of a grid-stride loop.
_INDEX_LIMIT = 2**31 - 2**26


class Layout:
    """Shapes and strides of the arrays of one call: what a kernel must know of them.

    It is hashable and holds no array: the key of an algorithm's prepared launches, made at every
    call. `alignment` is the largest power of two, up to 16, that divides the addresses of x, w and
    y in bytes.
    """

    __slots__ = ("_bytes", "_hash", "_sizes", "alignment", "batch")

    def __init__(self, x: Any, w: Any, bias: Any, y: Any) -> None:
        self.batch: int = x.shape[0]
        low = address(x) | address(w) | address(y) | 16
        self.alignment = low & -low
        bias_strides = () if bias is None else bias.strides
        self._bytes = (
            self.batch, self.alignment, x.strides, w.strides, y.strides, bias_strides
        )  # fmt: skip
        # They follow from the problem's dtypes, which a prepared launch's key holds too.
        self._sizes = (x.itemsize, w.itemsize, y.itemsize, 1 if bias is None else bias.itemsize)
        self._hash = hash(self._bytes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._bytes == other._bytes

    @property
    def x(self) -> Strides:
        """Strides in elements: n, c, spatial..."""
        return self._in_elements(0)

    @property
    def w(self) -> Strides:
        """Strides in elements: k, c, spatial..."""
        return self._in_elements(1)

    @property
    def y(self) -> Strides:
        """Strides in elements: n, k, spatial..."""
        return self._in_elements(2)

    @property
    def bias_stride(self) -> int:
        """In elements; 0 where there is no bias."""
        return sum(self._in_elements(3))

    def _in_elements(self, which: int) -> Strides:
        size = self._sizes[which]
        strides: Strides = self._bytes[2 + which]  # type: ignore[assignment]
        return tuple(stride // size for stride in strides)


class _StandIn:
    """An array that is not there: C-contiguous, its axes from 1 on in another order in memory."""

    def __init__(self, shape: tuple[int, ...], dtype: DType, channels_last: bool = False) -> None:
        self.shape, self.itemsize, self.data = shape, dtype.itemsize, SimpleNamespace(ptr=0)
        order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
        strides, step = [0] * len(shape), dtype.itemsize
        for axis in reversed(order):
            strides[axis], step = step, step * shape[axis]
        self.strides = tuple(strides)


def contiguous(problem: ConvProblem) -> Layout:
    """The layout of the arrays that a plan expects: contiguous, and allocated as CuPy does."""
    last = problem.channels_last
    bias = _StandIn((problem.bias_channels,), problem.bias) if problem.bias else None
    return Layout(
        _StandIn(problem.x_shape, problem.x_dtype, last),
        _StandIn(problem.w_shape, problem.w_dtype),
        bias,
        _StandIn(problem.y_shape, problem.y_dtype, last),
    )


def address(array: Any) -> int:
    """Where the first element lies."""
    if type(array) is np.ndarray:
        return int(array.__array_interface__["data"][0])
    return array.data.ptr  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with everything but the arrays. It is called where its device is the current one."""

    kernel: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    constants: tuple[Any, ...]  # the arguments after the arrays
    shared_bytes: int = 0
    _start: Callable[..., None] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, device: Any, *arrays: Any) -> None:
        (self._start or self._starter(device, len(arrays)))(arrays)

    def _starter(self, device: Any, count: int) -> Callable[..., None]:
        """What launches it with `count` arrays; a device may pack the other arguments once."""
        own = getattr(device, "starter", None)
        if own is not None:
            start = own(
                self.kernel, self.grid, self.block, self.constants, self.shared_bytes, count
            )
        else:

            def start(arrays: tuple[Any, ...]) -> None:
                device.launch(
                    self.kernel, self.grid, self.block, (*arrays, *self.constants),
                    self.shared_bytes,
                )  # fmt: skip

        object.__setattr__(self, "_start", start)
        return start  # type: ignore[no-any-return]


def strided_grid(device: Any, items: int, block: int) -> tuple[int, int, int]:
    """The grid of a kernel whose threads take an item each, and again after all of them.

    No more blocks than keep the device busy.
    """
    return (min(-(-items // block), 16 * device.sm_count), 1, 1)


def pack(problem: ConvProblem, layout: Layout) -> Any:
    """The ``Problem`` of a call: a NumPy struct, to be passed by value."""
    p = np.zeros((), PROBLEM)
    w_strides, w_offset = list(_five(layout.w)), 0
    if problem.flip:
        for axis in range(2, 5):
            extent = _three(problem.filter, 1)[axis - 2]
            w_offset += (extent - 1) * w_strides[axis]
            w_strides[axis] = -w_strides[axis]
    p["x_strides"], p["w_strides"], p["y_strides"] = _five(layout.x), w_strides, _five(layout.y)
    p["bias_stride"], p["w_offset"], p["batch"] = layout.bias_stride, w_offset, layout.batch
    p["in_channels"], p["out_channels"] = problem.in_channels, problem.out_channels
    p["groups"] = problem.groups
    p["group_in"], p["group_out"] = problem.group_in_channels, problem.group_out_channels
    for name, fill in (("input", 1), ("filter", 1), ("output", 1), ("stride", 1), ("dilation", 1)):
        p[name] = _three(getattr(problem, name), fill)
    p["pad_lo"] = _three(problem.pad_lo, 0)
    for axis in range(3):
        p["output_divisor"][axis] = divisor(int(p["output"][axis]))
        p["filter_divisor"][axis] = divisor(int(p["filter"][axis]))
    p["out_channels_divisor"] = divisor(problem.out_channels)
    p["group_in_divisor"] = divisor(problem.group_in_channels)
    p["group_out_divisor"] = divisor(problem.group_out_channels)
    p["boundary"] = BOUNDARY[problem.padding_mode]
    p["x_dtype"], p["w_dtype"] = DTYPE[problem.x_dtype], DTYPE[problem.w_dtype]
    p["y_dtype"], p["bias_dtype"] = DTYPE[problem.y_dtype], DTYPE[problem.bias or problem.y_dtype]
    p["channels_last"] = channels_last(layout.y)
    p.flags.writeable = False  # it is shared by all calls with the same strides
    return p


def channels_last(y_strides: Strides) -> bool:
    """Whether neighbours in memory are neighbouring channels."""
    inner = min((abs(s) for s in y_strides[2:] if s), default=0)
    return 0 < abs(y_strides[1]) < inner


def _five(strides: Strides) -> Strides:
    """(n, c, d, h, w) strides; an axis that is not there has stride 0."""
    return (*strides[:2], *(0,) * (5 - len(strides)), *strides[2:])


def _three(extents: tuple[int, ...], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(extents)), *extents)


def divisor(value: int) -> Any:
    """``struct Divisor``: n // value is (mulhi(n, magic) + n) >> shift for 0 <= n < 2^31."""
    d = np.zeros((), DIVISOR)
    value = max(value, 1)  # of an empty problem, which is never launched
    d["value"] = value
    if value < 2**31:
        shift = (value - 1).bit_length()
        d["shift"] = shift
        d["magic"] = (2**32 * (2**shift - value)) // value + 1
    return d


def index_type(problem: ConvProblem, layout: Layout, items: int = 0) -> str:
    """ "int32" where every offset, position and count of a launch fits; else "int64".

    `items`: how many work items the kernel numbers with an index, where it does.
    """
    y_shape = (layout.batch, *problem.y_shape[1:])
    x_shape = (layout.batch, *problem.x_shape[1:])
    reach = max(
        _span(x_shape, layout.x),
        _span(problem.w_shape, layout.w),
        _span(y_shape, layout.y),
        abs(layout.bias_stride) * problem.bias_channels,
        items,
    )
    for extent, filter, stride, dilation, lo, hi in zip(
        problem.input, problem.filter, problem.stride, problem.dilation,
        problem.pad_lo, problem.pad_hi, strict=True,
    ):  # fmt: skip
        # Positions along an axis; the boundary modes compute up to twice the extent.
        reach = max(reach, 2 * extent + lo + hi + dilation * filter + stride)
    return "int32" if reach < _INDEX_LIMIT else "int64"


def _span(shape: tuple[int, ...], strides: Strides) -> int:
    return sum(max(n - 1, 0) * abs(s) for n, s in zip(shape, strides, strict=True)) + 1


def type_macros(problem: ConvProblem) -> Macros:
    """X_T, W_T, B_T, Y_T and ACC_T of types.cuh, each array's type by its name."""
    return {
        "X_T": problem.x_dtype.name,
        "W_T": problem.w_dtype.name,
        "B_T": (problem.bias or problem.y_dtype).name,
        "Y_T": problem.y_dtype.name,
        "ACC_T": problem.accumulator.name,
    }


def any_macros(accumulator: DType) -> Macros:
    """The same with every array's type told at run time: one kernel for every rare pair."""
    return {**dict.fromkeys(("X_T", "W_T", "B_T", "Y_T"), "any_dtype"), "ACC_T": accumulator.name}


def uniform_macros(dtype: DType) -> Macros:
    """The same for x and w of `dtype`, and a result and bias of the type that follows from it."""
    natural = dtypes.natural_result(dtype, dtype)
    return {
        "X_T": dtype.name,
        "W_T": dtype.name,
        "B_T": natural.name,
        "Y_T": natural.name,
        "ACC_T": dtypes.accumulator(natural).name,
    }


def freeze(macros: Mapping[str, str | int]) -> tuple[tuple[str, str | int], ...]:
    """Macros as a key of a dictionary."""
    return tuple(sorted(macros.items()))
