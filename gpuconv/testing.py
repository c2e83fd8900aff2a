"""Random problems and the error bound: what tests and benchmarks share.

The bound is the standard one of floating-point summation (Higham, "Accuracy and Stability of
Numerical Algorithms", section 4.2): with u the accumulator's unit roundoff and n products,

    |y - y_ref| <= c * u * f(n) * sum |x||w|  +  u_result * |y_ref|

where f(n) is sqrt(n) for the sums of random data that blocked algorithms make, and n in the worst
case; c belongs to the algorithm (1 for sums as they are written; Winograd and FFT state their own).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.arrays import HostArray
from gpuconv.dtypes import DType
from gpuconv.numpy_backend import reference
from gpuconv.problem import LAYOUTS, PADDING_MODES, ConvProblem, describe, output_extent

FLOATING = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
EXACT = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TF32_EPS = 2.0**-10
MEMORY_ORDERS = ("contiguous", "channels_last", "reversed", "strided", "offset")


@dataclass(frozen=True)
class Case:
    """A random problem as a caller would write it: shapes, dtypes, options, and memory."""

    ndim: int
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    x_dtype: str
    w_dtype: str
    options: tuple[tuple[str, Any], ...]
    bias: bool
    memory: str
    seed: int
    integers: bool  # integer-valued data, whose sums are exact in every dtype

    @property
    def function(self) -> str:
        return f"conv{self.ndim}d"

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.options)

    def problem(self) -> ConvProblem:
        """The problem that the call describes."""
        x_dtype, w_dtype = dtypes.of(self.x_dtype), dtypes.of(self.w_dtype)
        bias = dtypes.natural_result(x_dtype, w_dtype) if self.bias else None
        options = {k: v for k, v in self.options if k != "algorithm"}
        return describe(
            self.function, self.ndim, self.x_shape, self.w_shape, x_dtype, w_dtype,
            bias=bias, **options,
        )  # fmt: skip

    def arrays(self) -> tuple[HostArray, HostArray, HostArray | None]:
        """x, w and bias: random data of the case's dtypes, in the case's memory order."""
        rng = np.random.default_rng(self.seed)
        x = in_memory_order(
            random_array(rng, self.x_shape, self.x_dtype, self.integers),
            self.memory,
            channel_axis=-1 if self.kwargs.get("layout", "").endswith("C") else -self.ndim - 1,
        )
        w_memory = self.memory if self.memory in ("reversed", "strided") else "contiguous"
        w = random_array(rng, self.w_shape, self.w_dtype, self.integers)
        w = in_memory_order(w, w_memory, channel_axis=1)
        bias = None
        if self.bias:
            dtype = dtypes.natural_result(dtypes.of(self.x_dtype), dtypes.of(self.w_dtype)).name
            bias = random_array(rng, self.w_shape[:1], dtype, self.integers)
        return x, w, bias


def random_case(
    seed: int,
    *,
    ndims: tuple[int, ...] = (1, 2, 3),
    dtypes: tuple[str, ...] = (*FLOATING, *EXACT),
    largest: int = 12,
    channels: int = 6,
    mixed_dtypes: bool = True,
) -> Case:
    """The random case of `seed`: every option of the contract, odd and even, small and lopsided.

    Sizes stay small (extents to `largest`), so that thousands of cases take seconds.
    """
    rnd = random.Random(seed)
    ndim = rnd.choice(ndims)
    biggest = {1: 4 * largest, 2: largest, 3: max(largest // 2, 3)}[ndim]
    shape_kind = rnd.choice(("dense", "dense", "grouped", "depthwise", "single"))
    groups, c_per_group, k_per_group = {
        "dense": (1, rnd.randint(1, channels), rnd.randint(1, channels)),
        "grouped": (rnd.randint(2, 3), rnd.randint(1, 3), rnd.randint(1, 3)),
        "depthwise": (rnd.randint(2, channels + 2), 1, rnd.choice((1, 1, 2))),
        "single": (1, 1, 1),
    }[shape_kind]
    filters = tuple(rnd.choice((1, 1, 2, 3, 3, 3, 4, 5, 7)) for _ in range(ndim))
    stride = tuple(rnd.choice((1, 1, 1, 2, 3)) for _ in range(ndim))
    dilation = tuple(rnd.choice((1, 1, 1, 2, 3)) for _ in range(ndim))
    extents = tuple(rnd.randint(1, biggest) for _ in range(ndim))
    padding: Any = rnd.choice(
        ("int", "axes", "pairs", "pairs", "valid", "full", "same", "same_lower")
    )
    if padding == "int":
        padding = rnd.randint(0, 3)
    elif padding == "axes":
        padding = tuple(rnd.randint(0, 4) for _ in range(ndim))
    elif padding == "pairs":
        padding = tuple((rnd.randint(0, 5), rnd.randint(0, 5)) for _ in range(ndim))
    extents = _large_enough(extents, filters, stride, dilation, padding)
    layout = LAYOUTS[ndim][rnd.random() < 0.35]
    batch = rnd.choice((1, 1, 2, 3))
    c, k = groups * c_per_group, groups * k_per_group
    x_shape = (batch, *extents, c) if layout.endswith("C") else (batch, c, *extents)
    if rnd.random() < 0.1:
        x_shape = x_shape[1:]
    x_dtype = w_dtype = rnd.choice(dtypes)
    if mixed_dtypes and rnd.random() < 0.15:
        w_dtype = rnd.choice(dtypes)
        if {x_dtype, w_dtype} & {"uint64"}:
            w_dtype = x_dtype
    options: dict[str, Any] = {
        "stride": stride if rnd.random() < 0.7 else stride[0],
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": rnd.choice(PADDING_MODES),
        "layout": layout,
    }
    if not isinstance(options["stride"], tuple):
        options["stride"] = 1
    exact = x_dtype in EXACT and w_dtype in EXACT
    if exact and rnd.random() < 0.2:
        options["dtype"] = rnd.choice(("float32", "float64", "int32", "uint8"))
    elif not exact and rnd.random() < 0.1:
        options["dtype"] = rnd.choice(("complex128", "complex64"))
    return Case(
        ndim=ndim,
        x_shape=x_shape,
        w_shape=(k, c_per_group, *filters),
        x_dtype=x_dtype,
        w_dtype=w_dtype,
        options=tuple(options.items()),
        bias=rnd.random() < 0.4,
        memory=rnd.choice(MEMORY_ORDERS),
        seed=seed,
        integers=rnd.random() < 0.3,
    )


def _large_enough(
    extents: tuple[int, ...],
    filters: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: Any,
) -> tuple[int, ...]:
    """`extents`, each raised until its output has an element."""
    result = []
    for axis, (n, f, s, d) in enumerate(zip(extents, filters, stride, dilation, strict=True)):
        if padding in ("full", "same", "same_lower"):
            result.append(n)
            continue
        pad = 0 if padding == "valid" else padding if isinstance(padding, int) else padding[axis]
        lo, hi = pad if isinstance(pad, tuple) else (pad, pad)
        while output_extent(n, f, s, lo, hi, d) < 1:
            n += 1
        result.append(n)
    return tuple(result)


def random_array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str | DType, integers: bool = False
) -> HostArray:
    """Random data: normal floats, or small integers where sums must be exact; full-range ints."""
    kind = dtypes.of(dtype)
    if kind.kind == "b":
        return rng.random(shape) < 0.5
    if kind.is_exact:
        info = np.iinfo(kind.name)
        low, high = (max(info.min, -4), min(info.max, 4)) if integers else (info.min, info.max)
        return rng.integers(low, high, shape, kind.numpy, endpoint=True)
    values: HostArray
    if integers:  # few bits: the longest sums of the tests fit even bfloat16's eight
        values = rng.integers(-1, 1, shape, endpoint=True).astype(np.float64)
    else:
        values = rng.standard_normal(shape)
    if kind.is_complex:
        other = rng.standard_normal(shape)
        values = values + 1j * (np.round(other) if integers else other)
    return values.astype(kind.numpy)


def in_memory_order(array: HostArray, memory: str, channel_axis: int) -> HostArray:
    """The same values in another memory: what views, slices and other libraries hand over."""
    if memory == "channels_last":
        last = np.ascontiguousarray(np.moveaxis(array, channel_axis, -1))
        return np.moveaxis(last, -1, channel_axis)
    if memory == "reversed":  # negative strides
        return np.flip(np.ascontiguousarray(np.flip(array)))
    if memory == "strided":  # every second element of a larger array
        big = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        big[..., ::2] = array
        return big[..., ::2]
    if memory == "offset":  # not aligned to any vector
        flat = np.zeros(array.size + 1, array.dtype)
        flat[1:] = array.ravel()
        return flat[1:].reshape(array.shape)
    return np.ascontiguousarray(array)


def expected(
    problem: ConvProblem, x: HostArray, w: HostArray, bias: HostArray | None = None
) -> tuple[HostArray, HostArray]:
    """The wide reference result and the sum of magnitudes, channels first with a batch.

    `x` and `w` are the operation's first and second array (dy and w of dgrad, x and dy of wgrad).
    """
    x, w = (_first(problem, role, a) for role, a in zip(problem.roles, (x, w), strict=False))
    y = reference.compute(problem, x, w, bias)
    if problem.accumulator.is_exact:
        return y, np.zeros_like(y)
    wide = dtypes.COMPLEX128 if problem.accumulator.is_complex else dtypes.FLOAT64
    magnitudes = reference.compute(
        replace(problem, x_dtype=wide, w_dtype=wide, y_dtype=wide, accumulator=wide),
        np.abs(x.astype(wide.numpy)),
        np.abs(w.astype(wide.numpy)),
        None if bias is None else np.abs(bias.astype(wide.numpy)),
    )
    return y, magnitudes.real


def _first(problem: ConvProblem, role: str, array: HostArray) -> HostArray:
    """x, w or y as written by the caller, channels first."""
    from gpuconv.execute import channels_first

    if role == "w":
        return array
    return channels_first(array, problem.layout.endswith("C"), problem.batched)  # type: ignore[no-any-return]


def error_bound(
    problem: ConvProblem, y_ref: HostArray, magnitudes: HostArray, *, c: float = 1.0
) -> HostArray:
    """The largest |y - y_ref| that rounding explains, element by element."""
    # The constant: a product and a sum each round, complex products four times; sums of a few
    # terms do not yet behave like their average, hence the floor of 4.
    per_term = 4.0 if problem.accumulator.is_complex else 2.0
    growth = max(np.sqrt(problem.reduction + 1), 4.0)
    bound = c * per_term * problem.accumulator.eps * growth * magnitudes
    if problem.precision == "tf32" and problem.accumulator is dtypes.FLOAT32:
        bound = bound + TF32_EPS * magnitudes  # both factors are rounded to 11 bits
    return np.asarray(bound + problem.result_dtype.eps * np.abs(y_ref) + _smallest(problem))


def _smallest(problem: ConvProblem) -> float:
    """Half the gap between the result type's subnormals."""
    return {2: 2.0**-24, 4: 2.0**-148, 8: 2.0**-148, 16: 0.0}[problem.result_dtype.itemsize]


def assert_close(
    problem: ConvProblem, y: Any, x: HostArray, w: HostArray, bias: HostArray | None = None, *,
    c: float = 1.0, exact: bool = False,
) -> None:  # fmt: skip
    """Assert that y (as the caller gets it, a NumPy array) is `problem`'s result within the bound.

    Integers and bool, and every dtype where `exact` says that no sum rounds, compare exactly.
    """
    y_ref, magnitudes = expected(problem, x, w, bias)
    y = _first(problem, problem.roles[2], np.asarray(y))
    assert y.shape == y_ref.shape, f"{problem}: shape {y.shape}, not {y_ref.shape}"
    assert dtypes.of(y.dtype) is problem.result_dtype, f"{problem}: dtype {y.dtype}"
    if exact or problem.result_dtype.is_exact:
        np.testing.assert_array_equal(y, y_ref.astype(y.dtype), err_msg=str(problem))
        return
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = y_ref.astype(y.dtype).astype(y_ref.dtype)
        got = y.astype(y_ref.dtype)
        bound = error_bound(problem, y_ref, magnitudes, c=c)
        wrong = ~(np.abs(got - y_ref) <= bound)
        # What is infinite or NaN, or overflows the result's type, must be so in both.
        special = ~np.isfinite(rounded)
        both_nan = np.isnan(got) & np.isnan(rounded)
        wrong[special] = ~((got == rounded) | both_nan)[special]
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(wrong, np.abs(got - y_ref), 0)), y.shape)
        raise AssertionError(
            f"{problem}: {wrong.sum()} of {wrong.size} elements are off; "
            f"at {tuple(map(int, worst))} got {got[worst]}, expected {y_ref[worst]}, "
            f"bound {bound[worst]:.3g}"
        )
