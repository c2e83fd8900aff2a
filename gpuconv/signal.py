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
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.execute import Operands
from gpuconv.problem import PaddingMode, freeze
from gpuconv.spatial import Windows

MODES = ("full", "same", "valid")
METHODS = ("auto", "direct", "fft")
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
        "auto" is the faster one that keeps NaN and Inf to their windows.
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
    return _Call("convolve", in1, in2, mode, stride, axes).run(_method("convolve", method))


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
    call = _Call("correlate", in1, in2, mode, stride, axes, correlate=True)
    return call.run(_method("correlate", method))


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
    return _two_d("convolve2d", in1, in2, mode, boundary, fillvalue, stride)


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

    Follows ``scipy.signal.correlate2d``: `in2` is conjugated, not flipped.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import signal
    >>> signal.correlate2d(np.eye(3), [[1, 2], [3, 4]], mode="valid")
    array([[5., 3.],
           [2., 5.]])
    """
    return _two_d("correlate2d", in1, in2, mode, boundary, fillvalue, stride, correlate=True)


def fftconvolve(
    in1: Any, in2: Any, mode: str = "full", axes: int | Sequence[int] | None = None
) -> Any:
    """`convolve` by the FFT, in floating point whatever the inputs' types.

    Along the axes not in `axes` the inputs broadcast. A NaN spreads over its whole tile; `convolve`
    keeps it where it belongs. Follows ``scipy.signal.fftconvolve``.

    Examples
    --------
    >>> from gpuconv import signal
    >>> signal.fftconvolve([1, 2, 3], [0, 1, 0.5]).round(12)
    array([0. , 1. , 2.5, 4. , 1.5])
    """
    return _Call("fftconvolve", in1, in2, mode, 1, axes, floating=True).run("fft")


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
    return _Call("oaconvolve", in1, in2, mode, 1, axes, floating=True).run("fft")


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
    return _Call("choose_conv_method", in1, in2, mode, 1, None).faster()


def _best_time(run: Callable[[], Any]) -> float:
    timer = timeit.Timer(run)
    repeat, seconds = timer.autorange(lambda *_: None)
    return (
        min(timer.repeat(3, repeat), default=seconds) / repeat if seconds < 1 else seconds / repeat
    )


def _method(function: str, method: str) -> str:
    if method not in METHODS:
        raise ValueError(
            f"{function}: acceptable method flags are 'auto', 'direct', or 'fft'; got {method!r}"
        )
    return method


def _two_d(
    function: str,
    in1: Any,
    in2: Any,
    mode: str,
    boundary: str,
    fillvalue: Any,
    stride: Any,
    correlate: bool = False,
) -> Any:
    if np.size(fillvalue) != 1:
        raise ValueError(
            f"{function}: fillvalue must be scalar or an array with one element; got {fillvalue!r}"
        )
    if boundary not in _BOUNDARIES:
        raise ValueError(
            f"{function}: acceptable boundary flags are 'fill', 'circular' (or 'wrap'), and "
            f"'symmetric' (or 'symm'); got {boundary!r}"
        )
    call = _Call(function, in1, in2, mode, stride, None, correlate=correlate)
    if not call.a.ndim == call.b.ndim == 2:
        raise ValueError(
            f"{function}: inputs must both be 2-D arrays; got {call.a.ndim}-D and {call.b.ndim}-D"
        )
    call.beyond(_BOUNDARIES[boundary], np.asarray(fillvalue).reshape(())[()])
    # SciPy centres an even filter of correlate2d one element later than that of correlate.
    call.centre_late = correlate
    return call.run("direct")


class _Call:
    """One call, from the caller's two arrays to theirs: the common path of all functions here."""

    def __init__(
        self,
        function: str,
        in1: Any,
        in2: Any,
        mode: str,
        stride: Any,
        axes: Any,
        *,
        correlate: bool = False,
        floating: bool = False,
    ) -> None:
        self.function = function
        if mode not in MODES:
            raise ValueError(
                f"{function}: acceptable mode flags are 'valid', 'same', or 'full'; got {mode!r}"
            )
        self.mode, self.correlate, self.floating = mode, correlate, floating
        in1, in2 = (a if arrays.maybe_library(a) else np.asarray(a) for a in (in1, in2))
        self.operands = Operands(function, x=in1, w=in2, names=("in1", "in2", "out"))
        self.a, self.b = self.operands.x, self.operands.w
        if self.a.ndim != self.b.ndim:
            raise ValueError(
                f"{function}: in1 and in2 should have the same dimensionality; "
                f"got {self.a.ndim}-D and {self.b.ndim}-D"
            )
        self.dtype = self._result_dtype(floating)
        self.axes = self._axes(axes)
        self.stride = self._stride(stride)
        self.padding_mode: PaddingMode = "zeros"
        self.fill: Any = 0
        self.centre_late = False

    def _result_dtype(self, floating: bool) -> dtypes.DType:
        """SciPy's: NumPy's promotion; for the FFT functions at least float32."""
        types = [dtypes.of(a.dtype) for a in (self.a, self.b)]
        if dtypes.BFLOAT16 in types:  # NumPy does not promote it with its own types
            return dtypes.promote(*types)
        inputs = [self.a.dtype, self.b.dtype]
        if floating:  # what an FFT makes of each
            wide = {"b": np.float64, "i": np.float64, "u": np.float64}
            inputs = [np.result_type(wide.get(t.kind, np.float32), t) for t in inputs]
        both = np.result_type(*inputs)
        result = dtypes.of(both)
        if not result.is_exact and all(t.is_exact for t in types):
            # uint64 with a signed type: float64 by NumPy's rule, of floating-point sums.
            self.a, self.b = (a.astype(both) for a in (self.a, self.b))
        return result

    def _axes(self, axes: Any) -> tuple[int, ...]:
        """The axes to convolve along, in order; each once."""
        ndim = self.a.ndim
        if axes is None:
            return tuple(range(ndim))
        try:
            given = [operator.index(axes)]
        except TypeError:
            try:
                given = [operator.index(axis) for axis in axes]
            except TypeError:
                raise ValueError(
                    f"{self.function}: axes must be a scalar or iterable of integers; got {axes!r}"
                ) from None
        if not given:
            raise ValueError(f"{self.function}: when provided, axes cannot be empty")
        if any(not -ndim <= axis < ndim for axis in given):
            raise ValueError(
                f"{self.function}: axes exceeds dimensionality of input; got {axes!r} for {ndim}-D"
            )
        unique = sorted({axis % ndim for axis in given})
        if len(unique) != len(given):
            raise ValueError(f"{self.function}: all axes must be unique; got {axes!r}")
        return tuple(unique)

    def _stride(self, stride: Any) -> tuple[int, ...]:
        """One step per axis of the arrays, 1 along batches."""
        frozen = freeze(self.function, "stride", stride)
        steps = frozen if isinstance(frozen, tuple) else (frozen,) * len(self.axes)
        if len(steps) != len(self.axes) or any(step < 1 for step in steps):
            raise ValueError(
                f"{self.function}: stride takes one integer or {len(self.axes)}, each at least 1; "
                f"got {stride!r}"
            )
        by_axis = dict(zip(self.axes, steps, strict=True))
        return tuple(by_axis.get(axis, 1) for axis in range(self.a.ndim))

    def beyond(self, padding_mode: PaddingMode, fill: Any) -> None:
        """What lies beyond the edge of in1."""
        self.padding_mode, self.fill = padding_mode, fill if padding_mode == "zeros" else 0

    def run(self, method: str) -> Any:
        """The result, as an array of the caller's library."""
        a, b = self.a, self.b
        if a.ndim == 0:
            product = a * (b.conj() if self.correlate else b)
            return self.operands.give(np.asarray(product).astype(self.dtype.numpy))
        axes, swap = self._valid_axes()
        if 0 in a.shape or 0 in b.shape:
            return self.operands.give(np.asarray([], self.dtype.numpy))
        self._check_batches(axes)
        if self.correlate and dtypes.of(b.dtype).is_complex:
            b = b.conj()
        flip = not self.correlate
        # The smaller array is the cheaper filter.
        commutes = self.padding_mode == "zeros" and not self.fill and self.mode == "full"
        if swap or (commutes and b.size > a.size):
            # A correlation is the convolution with the reversed filter, and that commutes.
            a, b, flip = (b, a, True) if flip else (b[_reversed(axes, b.ndim)], a, True)
        y = self._windows(b, flip, method).run(a, b, axes)
        if self.mode == "same":  # SciPy centres along batches too
            y = y[tuple(map(_centred, y.shape, self.a.shape))]
        return self.operands.give(y)

    def _valid_axes(self) -> tuple[tuple[int, ...], bool]:
        """The axes that are convolved, and for "valid" whether in2 is the larger along them.

        For "valid", fftconvolve lets axes of extent 1 broadcast; the other functions refuse.
        """
        s1, s2, axes = self.a.shape, self.b.shape, self.axes
        if self.mode != "valid":
            return axes, False
        if self.floating:
            axes = tuple(i for i in axes if s1[i] != 1 and s2[i] != 1)
        if all(s1[i] >= s2[i] for i in axes):
            return axes, False
        if not all(s2[i] >= s1[i] for i in axes):
            raise ValueError(
                f"{self.function}: for 'valid' mode, one must be at least as large as the other in "
                f"every dimension; got {s1} and {s2}"
            )
        return axes, True

    def _check_batches(self, axes: tuple[int, ...]) -> None:
        s1, s2 = self.a.shape, self.b.shape
        rest = [i for i in range(self.a.ndim) if i not in axes]
        if any(s1[i] != s2[i] and 1 not in (s1[i], s2[i]) for i in rest):
            raise ValueError(f"{self.function}: incompatible shapes for in1 and in2: {s1} and {s2}")

    def _pads(self, filter: int) -> tuple[int, int]:
        """Of one axis; "same" is centred in "full"."""
        if self.mode == "full":
            return filter - 1, filter - 1
        if self.mode == "same":
            before, after = filter // 2, (filter - 1) // 2
            return (after, before) if self.centre_late else (before, after)
        return 0, 0

    def _windows(self, b: Any, flip: bool, method: str) -> Windows:
        return Windows(
            self.function,
            self.operands,
            self.dtype,
            pads=tuple(map(self._pads, b.shape)),
            stride=self.stride,
            flip=flip,
            padding_mode=self.padding_mode,
            fill=self.fill,
            method=method,
        )

    def faster(self) -> str:
        """ "fft" or "direct", by the cost model."""
        if self.dtype.is_exact or not 0 < len(self.axes) <= 3 or 0 in (self.a.size, self.b.size):
            return "direct"
        axes, swap = self._valid_axes()
        a, b = (self.b, self.a) if swap else (self.a, self.b)
        windows = self._windows(b, True, "auto")
        plan = windows.plan(windows.problem(a[None, None], b[None, None], axes))
        costs = {c.algorithm: c.cost for c in plan.candidates if c.cost is not None}
        fft = costs.pop("fft", math.inf)
        allowed = [c.cost for c in plan.candidates if c.rejected is None and c.algorithm in costs]
        return "fft" if fft < min(cost for cost in allowed if cost is not None) else "direct"


def _reversed(axes: tuple[int, ...], ndim: int) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if i in axes else 1) for i in range(ndim))


def _centred(extent: int, wanted: int) -> slice:
    start = max(extent - wanted, 0) // 2
    return slice(start, start + wanted) if extent > wanted else slice(None)
