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
from gpuconv.plan import Plan, choose
from gpuconv.problem import LAYOUTS, ConvProblem, PaddingMode, freeze

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
    array([[2., 2., 1.],
           [2., 2., 2.],
           [1., 2., 2.]])
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
    array([[5., 2.],
           [3., 5.]])
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
        self.operands = Operands(function, x=in1, w=in2, names=("in1", "in2"))
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
        y = self._windows(a, b, axes, flip, method)
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

    def _windows(self, a: Any, b: Any, axes: tuple[int, ...], flip: bool, method: str) -> Any:
        """a convolved (or, without `flip`, correlated) by b along `axes`; the others broadcast."""
        if not axes:
            return (a * b).astype(self.dtype.numpy)
        if len(axes) > 3:
            return self._tap_by_tap(a, b, axes, flip, method)
        if self.fill:
            a = self._filled(a, b, axes)
        rest = [i for i in range(a.ndim) if i not in axes]
        batch = np.broadcast_shapes(*(tuple(s.shape[i] for i in rest) for s in (a, b)))
        count = math.prod(batch)
        x, w = (s.transpose(*rest, *axes) for s in (a, b))
        if all(b.shape[i] == 1 for i in rest):
            x, w = (
                x.reshape(count, 1, *x.shape[len(rest) :]),
                w.reshape(1, 1, *w.shape[len(rest) :]),
            )
        else:
            x, w = (self._each(s, batch) for s in (x, w))
            x, w = x[None], w[:, None]
        problem = self._problem(x, w, axes, flip)
        y = self.operands.compute(self._plan(problem, method), x, w)
        y = y.reshape(*batch, *problem.output)
        return y.transpose(np.argsort([*rest, *axes]).tolist())

    def _each(self, array: Any, batch: tuple[int, ...]) -> Any:
        """The array once for every element of the batch, in one leading axis."""
        spatial = array.shape[len(batch) :]
        shape = (*batch, *spatial)
        if array.shape != shape:
            full = self.operands.empty(shape, dtypes.of(array.dtype))
            full[...] = array
            array = full
        return array.reshape(math.prod(batch), *spatial)

    def _problem(self, x: Any, w: Any, axes: tuple[int, ...], flip: bool) -> ConvProblem:
        padded = bool(self.fill)
        pads = [(0, 0) if padded else self._pads(f) for f in w.shape[2:]]
        x_dtype, w_dtype = dtypes.of(x.dtype), dtypes.of(w.dtype)
        return ConvProblem(
            input=x.shape[2:],
            filter=w.shape[2:],
            batch=x.shape[0],
            in_channels=x.shape[1],
            out_channels=w.shape[0],
            groups=x.shape[1],
            stride=tuple(self.stride[axis] for axis in axes),
            pad_lo=tuple(lo for lo, _ in pads),
            pad_hi=tuple(hi for _, hi in pads),
            padding_mode=self.padding_mode,
            flip=flip,
            x_dtype=x_dtype,
            w_dtype=w_dtype,
            y_dtype=self.dtype,
            accumulator=dtypes.sum_type(x_dtype, w_dtype, self.dtype),
            layout=LAYOUTS[len(axes)][0],
        )

    def _plan(self, problem: ConvProblem, method: str) -> Plan:
        """The cheapest algorithm, the FFT where it is asked for and serves, never where refused."""
        operands = self.operands
        plan = choose(self.function, problem, operands.backend, operands.device)
        allowed = [c.algorithm for c in plan.candidates if c.rejected is None]
        served = [c.algorithm for c in plan.candidates if c.cost is not None]
        name = plan.algorithm
        if method == "fft" and "fft" in served:
            name = "fft"
        elif method == "direct":
            name = next(n for n in allowed if n != "fft")
        return choose(self.function, problem, operands.backend, operands.device, name)

    def _filled(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """a between pads of the fill value, which no boundary mode of the core reads."""
        fill = np.asarray(self.fill)
        if fill.dtype.kind == "c" and not self.dtype.is_complex:
            raise ValueError(
                f"{self.function}: could not cast `fillvalue` {self.fill!r} to the output type "
                f"{self.dtype}"
            )
        pads = [self._pads(n) if i in axes else (0, 0) for i, n in enumerate(b.shape)]
        shape = tuple(n + lo + hi for n, (lo, hi) in zip(a.shape, pads, strict=True))
        # In the result's type: a uint8 image may lie in a float's surroundings.
        padded = self.operands.empty(shape, self.dtype)
        padded[...] = fill.astype(self.dtype.numpy)
        padded[tuple(slice(lo, lo + n) for n, (lo, _) in zip(a.shape, pads, strict=True))] = a
        return padded

    def _tap_by_tap(self, a: Any, b: Any, axes: tuple[int, ...], flip: bool, method: str) -> Any:
        """More than three axes: the first is a sum of convolutions along the others."""
        axis, rest = axes[0], axes[1:]
        lo, hi = self._pads(b.shape[axis])
        step, extent, taps = self.stride[axis], a.shape[axis], b.shape[axis]
        outputs = (extent + lo + hi - taps) // step + 1
        total: Any = None
        for tap in range(taps):
            # Outputs p whose element p*step + tap - lo of a exists; the others add a zero.
            first = max(-((tap - lo) // step), 0)
            last = min((extent - 1 - tap + lo) // step, outputs - 1)
            if first > last:
                continue
            rows = _along(axis, slice(first * step + tap - lo, last * step + tap - lo + 1, step))
            weight = taps - 1 - tap if flip else tap
            part = self._windows(
                a[rows], b[_along(axis, slice(weight, weight + 1))], rest, flip, method
            )
            if total is None:
                shape = (*part.shape[:axis], outputs, *part.shape[axis + 1 :])
                total = self.operands.empty(shape, self.dtype)
                total[...] = 0
            total[_along(axis, slice(first, last + 1))] += part
        return total

    def faster(self) -> str:
        """ "fft" or "direct", by the cost model."""
        if self.dtype.is_exact or not 0 < len(self.axes) <= 3 or 0 in (self.a.size, self.b.size):
            return "direct"
        axes, swap = self._valid_axes()
        a, b = (self.b, self.a) if swap else (self.a, self.b)
        problem = self._problem(a[None, None], b[None, None], axes, True)
        plan = choose(self.function, problem, self.operands.backend, self.operands.device)
        costs = {c.algorithm: c.cost for c in plan.candidates if c.cost is not None}
        fft = costs.pop("fft", math.inf)
        allowed = [c.cost for c in plan.candidates if c.rejected is None and c.algorithm in costs]
        return "fft" if fft < min(cost for cost in allowed if cost is not None) else "direct"


def _along(axis: int, index: slice) -> tuple[Any, ...]:
    return (slice(None),) * axis + (index,)


def _reversed(axes: tuple[int, ...], ndim: int) -> tuple[slice, ...]:
    return tuple(slice(None, None, -1 if i in axes else 1) for i in range(ndim))


def _centred(extent: int, wanted: int) -> slice:
    start = max(extent - wanted, 0) // 2
    return slice(start, start + wanted) if extent > wanted else slice(None)
