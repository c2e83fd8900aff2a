"""``scipy.signal``'s convolutions under their names, signatures and results, over gpuconv's core.

``convolve*`` flip the second input, ``correlate*`` conjugate it, as SciPy does. They take arrays of
any library (and lists, as NumPy's), with any number of axes, on the CPU or the GPU. Beyond SciPy,
keyword-only: `stride`, which computes only every so many outputs, and `axes` for batches.
"""

from __future__ import annotations

import math
import operator
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.calls import Call, Calls, plain, signature
from gpuconv.dtypes import DType
from gpuconv.execute import Operands
from gpuconv.problem import PaddingMode, freeze
from gpuconv.spatial import Windows, array_like

MODES = ("full", "same", "valid")
METHODS = ("auto", "direct", "fft")
Shape = tuple[int, ...]
_calls = Calls(1024)
# SciPy's names of what lies beyond the edge in convolve2d, with the aliases that it takes.
_BOUNDARIES: dict[str, PaddingMode] = {
    "fill": "zeros", "pad": "zeros", "wrap": "circular", "circular": "circular",
    "symm": "symmetric", "symmetric": "symmetric",
}  # fmt: skip


def convolve(
    in1: Any,
    in2: Any,
    mode: str = "full",
    method: str = "auto",
    *,
    stride: int | Sequence[int] = 1,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The N-D convolution ``(f*g)(c) = sum_a f(a) g(c-a)`` of two arrays: `in2` is flipped.

    Parameters
    ----------
    in1, in2 : array_like, of equally many axes
    mode : "full", "same" or "valid"
        Every place where they touch; as large as `in1`, centred in the full result; or only the
        places where one covers the other.
    method : "auto", "direct" or "fft"
        "auto" is the faster one that keeps NaN and Inf to their windows. An FFT's error is relative
        to the largest values, not to each window's.
    stride : int or one per convolved axis
        Only every so many outputs are computed. SciPy has none.
    axes : int or sequence of int, optional
        The axes to convolve along, all by default; the others are batches and broadcast, as in
        `fftconvolve`.

    Returns
    -------
    array, of the inputs' library and promoted dtype (integers wrap as SciPy's do)

    Raises
    ------
    ValueError
        Different numbers of axes, a mode or method that does not exist, or for "valid" inputs of
        which neither covers the other.

    Notes
    -----
    Follows ``scipy.signal.convolve``.

    Examples
    --------
    How far does a ball get that is dropped twice?

    >>> from gpuconv import signal
    >>> signal.convolve([0.2, 0.5, 0.3], [0.2, 0.5, 0.3]).round(2)
    array([0.04, 0.2 , 0.37, 0.3 , 0.09])
    """
    return _run(_CONVOLVE, in1, in2, mode, method, stride, axes)


def correlate(
    in1: Any,
    in2: Any,
    mode: str = "full",
    method: str = "auto",
    *,
    stride: int | Sequence[int] = 1,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The N-D cross-correlation ``z(k) = sum_l f(l) conj(g(l-k))``; parameters as in `convolve`.

    Follows ``scipy.signal.correlate``.

    Examples
    --------
    >>> from gpuconv import signal
    >>> signal.correlate([1, 2, 3], [0, 1, 2], mode="same")
    array([5, 8, 3])
    """
    return _run(_CORRELATE, in1, in2, mode, method, stride, axes)


def convolve2d(
    in1: Any,
    in2: Any,
    mode: str = "full",
    boundary: str = "fill",
    fillvalue: Any = 0,
    *,
    stride: int | Sequence[int] = 1,
) -> Any:
    """The convolution of two 2-D arrays, with a choice of what lies beyond the edge of `in1`.

    Parameters
    ----------
    in1, in2 : array_like, 2-D
    mode, stride
        As in `convolve`.
    boundary : "fill", "wrap" or "symm"
        `fillvalue`; the array over again; ``b a | a b``.
    fillvalue : number

    Notes
    -----
    Follows ``scipy.signal.convolve2d``. It never computes by FFT.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import signal
    >>> signal.convolve2d(np.eye(3), np.ones((2, 2)), mode="same", boundary="symm")
    array([[4., 2., 0.],
           [2., 2., 1.],
           [0., 1., 2.]])
    """
    return _run(_CONVOLVE2D, in1, in2, mode, "direct", stride, None, boundary, fillvalue)


def correlate2d(
    in1: Any,
    in2: Any,
    mode: str = "full",
    boundary: str = "fill",
    fillvalue: Any = 0,
    *,
    stride: int | Sequence[int] = 1,
) -> Any:
    """The cross-correlation of two 2-D arrays; parameters as in `convolve2d`.

    Follows ``scipy.signal.correlate2d``: `in2` is conjugated, not flipped. For "valid" with the
    larger array second, SciPy conjugates the first; here it is `in2` then too, as in `correlate`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import signal
    >>> signal.correlate2d(np.eye(3), [[1, 2], [3, 4]], mode="valid")
    array([[5., 3.],
           [2., 5.]])
    """
    return _run(_CORRELATE2D, in1, in2, mode, "direct", stride, None, boundary, fillvalue)


def fftconvolve(
    in1: Any, in2: Any, mode: str = "full", axes: int | Sequence[int] | None = None
) -> Any:
    """`convolve` by the FFT, in floating point whatever the inputs' types.

    Along the axes not in `axes` the inputs broadcast. On a GPU a NaN spreads over its whole tile;
    `convolve` keeps it where it belongs. Follows ``scipy.signal.fftconvolve``.

    Examples
    --------
    >>> from gpuconv import signal
    >>> signal.fftconvolve([1, 2, 3], [0, 1, 0.5]).round(12)
    array([0. , 1. , 2.5, 4. , 1.5])
    """
    return _run(_FFTCONVOLVE, in1, in2, mode, "fft", 1, axes)


def oaconvolve(
    in1: Any, in2: Any, mode: str = "full", axes: int | Sequence[int] | None = None
) -> Any:
    """`fftconvolve` in tiles as large as the smaller input asks for: for a long and a short input.

    gpuconv's FFT is always tiled, so this is `fftconvolve` under the name that says so. Follows
    ``scipy.signal.oaconvolve``.

    Examples
    --------
    >>> from gpuconv import signal
    >>> signal.oaconvolve([1, 2, 3], [0, 1, 0.5]).round(12)
    array([0. , 1. , 2.5, 4. , 1.5])
    """
    return _run(_OACONVOLVE, in1, in2, mode, "fft", 1, axes)


def choose_conv_method(in1: Any, in2: Any, mode: str = "full", measure: bool = False) -> Any:
    """ "fft" or "direct": which of the two `convolve` would find faster.

    With `measure` both are run and timed, and the result is the pair of the name and a dict of both
    times in seconds. Follows ``scipy.signal.choose_conv_method``, with gpuconv's own cost model:
    integers whose sums a float64 could not hold, and bool, are always "direct".

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import signal
    >>> signal.choose_conv_method(np.ones(10), np.ones(3))
    'direct'
    """
    if measure:
        times = {
            name: _best_time(lambda name=name: convolve(in1, in2, mode, name))  # type: ignore[misc]
            for name in ("fft", "direct")
        }
        return min(times, key=lambda name: times[name]), times
    operands = _operands(_CHOOSE, in1, in2)
    a, b = operands.x, operands.w
    types = dtypes.of(a.dtype), dtypes.of(b.dtype)
    way = _way(_CHOOSE, a.shape, b.shape, *types, mode, "auto", 1, None, "fill", False)
    return _faster(operands, way)


def _best_time(run: Callable[[], Any]) -> float:
    """Seconds of one call: the best of three rounds of at least 5 ms, or of the one that is longer.

    The first call, which plans, does not count.
    """
    run()
    timer, number = timeit.Timer(run), 1
    while (seconds := timer.timeit(number)) < 5e-3:
        number *= 4
    return min([seconds, *timer.repeat(2, number)] if seconds < 1 else [seconds]) / number


@dataclass(frozen=True, eq=False)
class _Function:
    """What tells the functions of this module apart."""

    name: str
    correlate: bool = False
    floating: bool = False  # results are floating whatever the inputs are
    two_d: bool = False


_CONVOLVE = _Function("convolve")
_CORRELATE = _Function("correlate", correlate=True)
_CONVOLVE2D = _Function("convolve2d", two_d=True)
_CORRELATE2D = _Function("correlate2d", correlate=True, two_d=True)
_FFTCONVOLVE = _Function("fftconvolve", floating=True)
_OACONVOLVE = _Function("oaconvolve", floating=True)
_CHOOSE = _Function("choose_conv_method")


def _run(
    function: _Function,
    in1: Any,
    in2: Any,
    mode: str,
    method: str,
    stride: Any,
    axes: Any,
    boundary: str = "fill",
    fillvalue: Any = 0,
) -> Any:
    """One call, from the caller's two arrays to theirs: the common path of all functions here."""
    key = None
    given = signature(in1, in2, None, None)
    if given is not None:
        options = plain(mode, method, stride, axes, boundary, fillvalue)
        key = None if options is None else (function, options, given)
        call = _calls.get(key)
        if call is not None:
            return call(in1, in2, None, None)
    operands = _operands(function, in1, in2)
    a, b = operands.x, operands.w
    if type(stride) is not int:
        stride = freeze(function.name, "stride", stride)
    if axes is not None:
        axes = _axes(function.name, axes, a.ndim)
    fill = fillvalue if type(fillvalue) is int else _scalar(function.name, fillvalue)
    way = _way(
        function, a.shape, b.shape, dtypes.of(a.dtype), dtypes.of(b.dtype),
        mode, method, stride, axes, boundary, bool(fill),
    )  # fmt: skip
    if isinstance(fill, complex) and not way.windows.dtype.is_complex:
        raise ValueError(
            f"{function.name}: could not cast `fillvalue` directly to the output type "
            f"{way.windows.dtype}: {fill!r} is complex"
        )
    operands.check_result(way.windows.dtype)
    with operands.active():
        result = operands.give(way.run(operands, a, b, fill))
    if key is not None and operands.backend == "numpy" and (a is in1 and b is in2):
        again = way.again(operands, a, b, fill)
        if again is not None:
            _calls.remember(key, again)
    return result


def _operands(function: _Function, in1: Any, in2: Any) -> Operands:
    names = "in1", "in2", "out"
    return Operands(function.name, x=array_like(in1), w=array_like(in2), names=names)


def _scalar(function: str, fillvalue: Any) -> Any:
    """The number itself, of an array that holds one."""
    if np.size(fillvalue) != 1:
        raise ValueError(
            f"{function}: `fillvalue` must be scalar or an array with one element; "
            f"got {fillvalue!r}"
        )
    return np.asarray(fillvalue).item()


def _axes(function: str, axes: Any, ndim: int) -> Shape:
    """The axes to convolve along, in order; each once."""
    try:
        given = [operator.index(axes)]
    except TypeError:
        try:
            given = [operator.index(axis) for axis in axes]
        except TypeError:
            raise ValueError(
                f"{function}: axes must be a scalar or iterable of integers; got {axes!r}"
            ) from None
    if not given:
        raise ValueError(f"{function}: when provided, axes cannot be empty")
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(
            f"{function}: axes exceeds dimensionality of input; got {axes!r} for {ndim}-D"
        )
    unique = sorted({axis % ndim for axis in given})
    if len(unique) != len(given):
        raise ValueError(f"{function}: all axes must be unique; got {axes!r}")
    return tuple(unique)


@dataclass(frozen=True)
class _Way:
    """How a call is computed, known from shapes, types and options alone."""

    windows: Windows
    axes: Shape  # that are convolved
    cast: np.dtype[Any] | None  # the inputs are brought to it first
    conjugate: bool  # in2
    swap: bool  # in2 is under the filter in1
    reverse: tuple[slice, ...] | None  # in2, then
    centre: tuple[slice, ...] | None  # of the result that is wanted
    trivial: bool  # a product of scalars, or a sum over nothing

    def run(self, operands: Operands, a: Any, b: Any, fill: Any) -> Any:
        """The result, as the backend's array."""
        if self.trivial:
            return self._trivial(operands, a, b)
        if self.cast is not None:
            a, b = a.astype(self.cast), b.astype(self.cast)
        if self.conjugate:
            b = b.conj()
        if self.swap:
            a, b = b if self.reverse is None else b[self.reverse], a
        y = self.windows.run(operands, a, b, self.axes, fill)
        return y if self.centre is None else y[self.centre]

    def again(self, operands: Operands, a: Any, b: Any, fill: Any) -> Call | None:
        """What is left of a call of NumPy arrays as these; None where they want a closer look."""
        if self.trivial or self.cast is not None or self.conjugate or self.centre is not None:
            return None
        swap, reverse = self.swap, self.reverse
        first, second = (b if reverse is None else b[reverse], a) if swap else (a, b)
        step = self.windows.step(operands, first, second, self.axes, fill)
        if step is None or 0 in step.y_shape:
            return None

        def call(in1: Any, in2: Any, _bias: None, _out: None) -> Any:
            if swap:
                in1, in2 = in2 if reverse is None else in2[reverse], in1
            with np.errstate(all="ignore"):
                return step.again(in1, in2)

        return call

    def _trivial(self, operands: Operands, a: Any, b: Any) -> Any:
        """Of scalars: a scalar of NumPy's, an array without axes of any other library."""
        if a.ndim:
            return operands.empty((0,), self.windows.dtype)
        product = a * (b.conj() if self.conjugate else b)
        numpys = operands.library is arrays.NUMPY
        return product if numpys else operands.adopt(np.asarray(product))


@lru_cache(maxsize=4096)
def _way(
    function: _Function,
    s1: Shape,
    s2: Shape,
    t1: DType,
    t2: DType,
    mode: str,
    method: str,
    stride: Any,
    axes: Shape | None,
    boundary: str,
    filled: bool,
) -> _Way:
    """Validate, and decide; `stride` is frozen, `axes` are checked."""
    name, ndim = function.name, len(s1)
    if mode not in MODES:
        raise ValueError(
            f"{name}: acceptable mode flags are 'valid', 'same', or 'full'; got {mode!r}"
        )
    if method not in METHODS:
        raise ValueError(
            f"{name}: acceptable method flags are 'auto', 'direct', or 'fft'; got {method!r}"
        )
    if boundary not in _BOUNDARIES:
        raise ValueError(
            f"{name}: acceptable boundary flags are 'fill', 'circular' (or 'wrap'), and "
            f"'symmetric' (or 'symm'); got {boundary!r}"
        )
    if function.two_d and not ndim == len(s2) == 2:
        raise ValueError(f"{name}: inputs must both be 2-D arrays; got {ndim}-D and {len(s2)}-D")
    if ndim != len(s2):
        raise ValueError(
            f"{name}: in1 and in2 should have the same dimensionality; got {ndim}-D and {len(s2)}-D"
        )
    dtype, cast = _result_dtype(function, t1, t2)
    axes = tuple(range(ndim)) if axes is None else axes
    steps = _stride(name, stride, axes, ndim)
    padding_mode = _BOUNDARIES[boundary]
    trivial = ndim == 0 or 0 in s1 or 0 in s2
    axes, swap = _valid_axes(function, mode, s1, s2, axes)
    rest = [i for i in range(ndim) if i not in axes]
    if not trivial and any(s1[i] != s2[i] and 1 not in (s1[i], s2[i]) for i in rest):
        raise ValueError(f"{name}: incompatible shapes for in1 and in2: {s1} and {s2}")
    flip, reverse = not function.correlate, None
    # The smaller array is the cheaper filter.
    commutes = mode == "full" and padding_mode == "zeros" and not filled
    if swap or (commutes and math.prod(s2) > math.prod(s1)):
        swap = True
        if not flip:  # a correlation is the convolution with the reversed filter: that commutes
            reverse, flip = (
                tuple(slice(None, None, -1 if i in axes else 1) for i in range(ndim)),
                True,
            )
    # SciPy centres an even filter of correlate2d one element later than that of correlate.
    centre_late = function is _CORRELATE2D
    windows = Windows(
        name,
        dtype,
        pads=tuple(_pads(mode, extent, centre_late) for extent in (s1 if swap else s2)),
        stride=steps,
        flip=flip,
        padding_mode=padding_mode,
        method=method,
    )
    centre = None
    if mode == "same" and any(s2[i] > s1[i] for i in rest):  # SciPy centres along batches too
        centre = tuple(_centred(s2[i], s1[i]) if i in rest else slice(None) for i in range(ndim))
    conjugate = function.correlate and t2.is_complex
    return _Way(windows, axes, cast, conjugate, swap, reverse, centre, trivial)


def _result_dtype(function: _Function, t1: DType, t2: DType) -> tuple[DType, Any]:
    """SciPy's (NumPy's promotion; for the FFT functions at least float32), and what to cast to."""
    if dtypes.BFLOAT16 in (t1, t2):  # NumPy does not promote it with its own types
        return dtypes.promote(t1, t2), None
    inputs = [t1.numpy, t2.numpy]
    natural = np.result_type(*inputs)
    if function.floating:  # what an FFT makes of each
        least = {"b": np.float64, "i": np.float64, "u": np.float64}
        inputs = [np.result_type(least.get(t.kind, np.float32), t) for t in inputs]
    # uint64 with a signed type: float64 by NumPy's rule, of floating-point sums.
    cast = natural if natural.kind == "f" and t1.is_exact and t2.is_exact else None
    return dtypes.of(np.result_type(*inputs)), cast


def _stride(function: str, stride: Any, axes: Shape, ndim: int) -> Shape:
    """One step per axis of the arrays, 1 along batches."""
    steps = stride if isinstance(stride, tuple) else (stride,) * len(axes)
    if len(steps) != len(axes) or any(not isinstance(s, int) or s < 1 for s in steps):
        raise ValueError(
            f"{function}: stride takes one integer or {len(axes)}, each at least 1; got {stride!r}"
        )
    by_axis = dict(zip(axes, steps, strict=True))
    return tuple(by_axis.get(axis, 1) for axis in range(ndim))


def _valid_axes(
    function: _Function, mode: str, s1: Shape, s2: Shape, axes: Shape
) -> tuple[Shape, bool]:
    """The axes that are convolved, and for "valid" whether in2 is the larger along them.

    For "valid", fftconvolve lets axes of extent 1 broadcast; the other functions refuse.
    """
    if mode != "valid":
        return axes, False
    if function.floating:
        axes = tuple(i for i in axes if s1[i] != 1 and s2[i] != 1)
    if all(s1[i] >= s2[i] for i in axes):
        return axes, False
    if not all(s2[i] >= s1[i] for i in axes):
        raise ValueError(
            f"{function.name}: For 'valid' mode, one must be at least as large as the other in "
            f"every dimension; got {s1} and {s2}"
        )
    return axes, True


def _pads(mode: str, taps: int, centre_late: bool) -> tuple[int, int]:
    """Of one axis; "same" is centred in "full"."""
    if mode == "full":
        return taps - 1, taps - 1
    if mode == "same":
        before, after = taps // 2, (taps - 1) // 2
        return (after, before) if centre_late else (before, after)
    return 0, 0


def _centred(extent: int, wanted: int) -> slice:
    start = max(extent - wanted, 0) // 2
    return slice(start, start + wanted) if extent > wanted else slice(None)


def _faster(operands: Operands, way: _Way) -> str:
    """ "fft" or "direct", by the cost model."""
    if way.trivial or way.windows.dtype.is_exact or not 0 < len(way.axes) <= 3:
        return "direct"
    a, b = (operands.w, operands.x) if way.swap else (operands.x, operands.w)
    plan = way.windows.plan(operands, a, b, way.axes)
    costs = {c.algorithm: c.cost for c in plan.candidates if c.cost is not None}
    fft = costs.pop("fft", math.inf)
    allowed = [c.cost for c in plan.candidates if c.rejected is None and c.algorithm in costs]
    return "fft" if fft < min(cost for cost in allowed if cost is not None) else "direct"
