"""``scipy.ndimage``'s linear filters: its names, signatures and results, over gpuconv's core.

``convolve*`` flip the weights, ``correlate*`` conjugate them; both keep the input's shape. Beyond
the edge `mode` reads: "reflect" (d c b a | a b c d | d c b a, SciPy's name for what NumPy calls
symmetric), "mirror" (d c b | a b c d | c b a), "nearest", "wrap", or "constant" (`cval`).

Sums run in the input's own type for floating inputs (float32 for 16-bit ones) and in float64 for
integers, which are then truncated to the output's type, as SciPy's are. All functions follow those
of ``scipy.ndimage`` of the same names.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.execute import NOT_GIVEN, Operands
from gpuconv.problem import PaddingMode
from gpuconv.spatial import Windows

Modes = str | Sequence[str]

_MODES: dict[str, PaddingMode] = {
    "reflect": "symmetric", "grid-mirror": "symmetric", "mirror": "reflect",
    "nearest": "replicate", "wrap": "circular", "grid-wrap": "circular",
    "constant": "zeros", "grid-constant": "zeros",
}  # fmt: skip


def correlate(
    input: Any,
    weights: Any,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int | Sequence[int] = 0,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The N-D correlation of `input` with `weights`, of the same shape as `input`.

    Parameters
    ----------
    input : array_like
    weights : array_like, with an axis for each of `axes`
    output : array or dtype, optional
        Where to write the result, or its type; the input's by default.
    mode : str
        What lies beyond the edge: see the module.
    cval : number
        For ``mode="constant"``.
    origin : int or one per axis
        Shifts the filter: 0 is centred on the pixel, positive values lie to its left.
    axes : int or sequence of int, optional
        The axes to filter; all by default.

    Returns
    -------
    array, of the input's library

    Raises
    ------
    RuntimeError
        Weights, modes or an output that do not fit (SciPy's choice of error).
    ValueError
        An origin outside of the filter, or axes that do not exist.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.correlate(np.arange(5), [1, 2, 3])
    array([ 3,  8, 14, 20, 23])
    """
    return _filter("correlate", input, weights, output, mode, cval, origin, axes, flip=False)


def convolve(
    input: Any,
    weights: Any,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int | Sequence[int] = 0,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The N-D convolution of `input` with `weights`; parameters as in `correlate`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.convolve(np.arange(5), [1, 0, -1], mode="nearest")
    array([1, 2, 2, 2, 1])
    """
    return _filter("convolve", input, weights, output, mode, cval, origin, axes, flip=True)


def correlate1d(
    input: Any,
    weights: Any,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Any:
    """The correlation with 1-D weights along one axis; parameters as in `correlate`.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> ndimage.correlate1d([2, 8, 0, 4, 1, 9, 9, 0], weights=[1, 3])
    array([ 8, 26,  8, 12,  7, 28, 36,  9])
    """
    return _one_axis("correlate1d", input, weights, axis, output, mode, cval, origin, flip=False)


def convolve1d(
    input: Any,
    weights: Any,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Any:
    """The convolution with 1-D weights along one axis; parameters as in `correlate`.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> ndimage.convolve1d([2, 8, 0, 4, 1, 9, 9, 0], weights=[1, 3])
    array([14, 24,  4, 13, 12, 36, 27,  0])
    """
    return _one_axis("convolve1d", input, weights, axis, output, mode, cval, origin, flip=True)


def gaussian_filter1d(
    input: Any,
    sigma: float,
    axis: int = -1,
    order: int = 0,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    truncate: float = 4.0,
    *,
    radius: int | None = None,
) -> Any:
    """A Gaussian of standard deviation `sigma`, in pixels, along one axis, or a derivative of it.

    The filter reaches `truncate` standard deviations to either side, or `radius` pixels; `order` is
    that of the derivative.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> ndimage.gaussian_filter1d([1.0, 2.0, 3.0, 4.0, 5.0], 1).round(3)
    array([1.427, 2.068, 3.   , 3.932, 4.573])
    """
    reach = int(truncate * float(sigma) + 0.5) if radius is None else radius
    if not isinstance(reach, (int, np.integer)) or reach < 0:
        raise ValueError(f"gaussian_filter1d: Radius must be a nonnegative integer; got {reach!r}")
    weights = _gaussian(float(sigma), order, int(reach))[::-1]
    return correlate1d(input, weights, axis, output, mode, cval)


def gaussian_filter(
    input: Any,
    sigma: float | Sequence[float],
    order: int | Sequence[int] = 0,
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    truncate: float = 4.0,
    *,
    radius: int | Sequence[int] | None = None,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """`gaussian_filter1d` along every axis; `sigma`, `order`, `mode` and `radius` may be one each.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.gaussian_filter(np.eye(3), 1).round(2)
    array([[0.5 , 0.33, 0.17],
           [0.33, 0.34, 0.33],
           [0.17, 0.33, 0.5 ]])
    """
    per_axis = _PerAxis("gaussian_filter", input, axes)
    steps = [
        lambda x, out, axis=axis, s=s, o=o, m=m, r=r: gaussian_filter1d(
            x, s, axis, o, out, m, cval, truncate, radius=r
        )
        for axis, s, o, m, r in per_axis.each(sigma, order, mode, radius)
        if s > 1e-15
    ]
    return per_axis.in_turn(steps, output)


def uniform_filter1d(
    input: Any,
    size: int,
    axis: int = -1,
    output: Any = None,
    mode: str = "reflect",
    cval: Any = 0.0,
    origin: int = 0,
) -> Any:
    """The mean of `size` neighbours along one axis.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> ndimage.uniform_filter1d([2, 8, 0, 4, 1, 9, 9, 0], size=3)
    array([4, 3, 4, 1, 4, 6, 6, 3])
    """
    if size < 1:
        raise RuntimeError(f"uniform_filter1d: incorrect filter size; got {size}")
    if not 0 <= size // 2 + origin < size:
        raise ValueError(f"uniform_filter1d: invalid origin; got {origin} for size {size}")
    weights = np.full(size, 1.0)
    return _one_axis(
        "uniform_filter1d", input, weights, axis, output, mode, cval, origin, flip=False, mean=True
    )


def uniform_filter(
    input: Any,
    size: int | Sequence[int] = 3,
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    origin: int | Sequence[int] = 0,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """`uniform_filter1d` along every axis; `size`, `mode` and `origin` may differ by axis.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.uniform_filter(9 * np.eye(3, dtype=int), 3)
    array([[5, 3, 1],
           [3, 3, 3],
           [1, 3, 5]])
    """
    per_axis = _PerAxis("uniform_filter", input, axes)
    steps = [
        lambda x, out, axis=axis, n=n, o=o, m=m: uniform_filter1d(x, int(n), axis, out, m, cval, o)
        for axis, n, o, m in per_axis.each(size, origin, mode)
        if n > 1
    ]
    return per_axis.in_turn(steps, output)


def sobel(
    input: Any, axis: int = -1, output: Any = None, mode: Modes = "reflect", cval: Any = 0.0
) -> Any:
    """The slope along `axis`, smoothed by 1 2 1 along the others.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.sobel(np.arange(9).reshape(3, 3))
    array([[4, 8, 4],
           [4, 8, 4],
           [4, 8, 4]])
    """
    return _slope("sobel", input, axis, output, mode, cval, [1, 2, 1])


def prewitt(
    input: Any, axis: int = -1, output: Any = None, mode: Modes = "reflect", cval: Any = 0.0
) -> Any:
    """The slope along `axis`, summed over 3 pixels along the others.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.prewitt(np.arange(9).reshape(3, 3))
    array([[3, 6, 3],
           [3, 6, 3],
           [3, 6, 3]])
    """
    return _slope("prewitt", input, axis, output, mode, cval, [1, 1, 1])


def laplace(
    input: Any,
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The sum of second differences, 1 -2 1, along all axes.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> ndimage.laplace([0, 0, 1, 0, 0])
    array([ 0,  1, -2,  1,  0])
    """

    def second(x: Any, axis: int, out: Any, mode: str, cval: Any) -> Any:
        return correlate1d(x, [1, -2, 1], axis, out, mode, cval)

    return generic_laplace(input, second, output, mode, cval, axes=axes)


def gaussian_laplace(
    input: Any,
    sigma: float | Sequence[float],
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    *,
    axes: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """The sum of second derivatives of a Gaussian; `kwargs` go to `gaussian_filter`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.gaussian_laplace(np.eye(5)[2], 1).round(2)
    array([ 0.2,  0. , -0.4,  0. ,  0.2])
    """
    return _of_gaussians(
        "gaussian_laplace", generic_laplace, 2, input, sigma, output, mode, cval, axes, kwargs
    )


def gaussian_gradient_magnitude(
    input: Any,
    sigma: float | Sequence[float],
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    *,
    axes: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """The length of the gradient by derivatives of a Gaussian; `kwargs` go to `gaussian_filter`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.gaussian_gradient_magnitude(np.eye(5)[2], 1).round(2)
    array([0.09, 0.24, 0.  , 0.24, 0.09])
    """
    return _of_gaussians(
        "gaussian_gradient_magnitude",
        generic_gradient_magnitude,
        1,
        input,
        sigma,
        output,
        mode,
        cval,
        axes,
        kwargs,
    )


def generic_laplace(
    input: Any,
    derivative2: Callable[..., Any],
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    extra_arguments: Sequence[Any] = (),
    extra_keywords: dict[str, Any] | None = None,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The sum over all axes of ``derivative2(input, axis, output, mode, cval, ...)``.

    Examples
    --------
    >>> from gpuconv import ndimage
    >>> def second(x, axis, output, mode, cval):
    ...     return ndimage.correlate1d(x, [1, -2, 1], axis, output, mode, cval)
    >>> ndimage.generic_laplace([0, 0, 1, 0, 0], second)
    array([ 0,  1, -2,  1,  0])
    """
    return _sum_over_axes(
        "generic_laplace", input, derivative2, output, mode, cval, extra_arguments,
        extra_keywords, axes, length=False,
    )  # fmt: skip


def generic_gradient_magnitude(
    input: Any,
    derivative: Callable[..., Any],
    output: Any = None,
    mode: Modes = "reflect",
    cval: Any = 0.0,
    extra_arguments: Sequence[Any] = (),
    extra_keywords: dict[str, Any] | None = None,
    *,
    axes: int | Sequence[int] | None = None,
) -> Any:
    """The root of the sum over all axes of ``derivative(input, axis, output, mode, cval, ...)**2``.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.generic_gradient_magnitude(np.arange(4.0), ndimage.sobel, mode="nearest")
    array([1., 2., 2., 1.])
    """
    return _sum_over_axes(
        "generic_gradient_magnitude", input, derivative, output, mode, cval, extra_arguments,
        extra_keywords, axes, length=True,
    )  # fmt: skip


# ---- what they share --------------------------------------------------------------------------


def _filter(
    function: str,
    input: Any,
    weights: Any,
    output: Any,
    mode: Any,
    cval: Any,
    origin: Any,
    axes: Any,
    *,
    flip: bool,
) -> Any:
    """`correlate` and `convolve`: one filter over `axes`."""
    call = _Call(function, input, weights, output)
    filtered = _axes(function, axes, call.x.ndim)
    if call.w.ndim != len(filtered) or 0 in call.w.shape:
        raise RuntimeError(
            f"{function}: weights.ndim ({call.w.ndim}) must match len(axes) ({len(filtered)}), "
            f"with no empty axis; got weights of shape {tuple(call.w.shape)}"
        )
    origins = _one_each(function, origin, len(filtered))
    return call.run(filtered, origins, mode, cval, flip)


def _one_axis(
    function: str,
    input: Any,
    weights: Any,
    axis: int,
    output: Any,
    mode: Any,
    cval: Any,
    origin: int,
    *,
    flip: bool,
    mean: bool = False,
) -> Any:
    """One filter along one axis; with `mean` its sum is divided by its length."""
    call = _Call(function, input, weights.tolist() if mean else weights, output)
    if call.w.ndim != 1 or call.w.shape[0] < 1:
        raise RuntimeError(f"{function}: no filter weights given; got shape {tuple(call.w.shape)}")
    ndim = call.x.ndim
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    return call.run((axis % ndim,), [origin], mode, cval, flip, divisor=len(weights) if mean else 1)


class _Call:
    """One filter over one array, from the caller's arrays to theirs."""

    def __init__(self, function: str, input: Any, weights: Any, output: Any) -> None:
        self.function = function
        input = _array(input)
        own_weights = arrays.maybe_library(weights) is None
        is_array = output is not None and arrays.maybe_library(output) is not None
        operands = self.operands = Operands(
            function,
            x=input,
            w=NOT_GIVEN if own_weights else weights,
            out=output if is_array else None,
            names=("input", "weights", "output"),
        )
        self.x = operands.x
        self.w = operands.adopt(np.asarray(weights)) if own_weights else operands.w
        complex_ = any(dtypes.of(a.dtype).is_complex for a in (self.x, self.w))
        self.dtype = self._output_dtype(output, is_array, complex_)
        if is_array and tuple(output.shape) != tuple(self.x.shape):
            raise RuntimeError(
                f"{function}: output shape not correct; got {tuple(output.shape)} for an input of "
                f"shape {tuple(self.x.shape)}"
            )
        # Floating inputs are summed in their own type, integers in float64.
        x_type = dtypes.of(self.x.dtype)
        work = dtypes.FLOAT64 if x_type.is_exact else x_type
        if not self.dtype.is_exact:
            work = dtypes.promote(work, self.dtype)
        work = dtypes.accumulator(work)
        w_type = dtypes.of(self.w.dtype)
        self.weights_type = work if w_type.is_complex else _real(work)
        self.work = work
        self.flip_conjugates = w_type.is_complex

    def _output_dtype(self, output: Any, is_array: bool, complex_: bool) -> dtypes.DType:
        x_type = dtypes.of(self.x.dtype)
        wide = dtypes.promote(
            dtypes.FLOAT64 if x_type.is_exact and x_type.itemsize > 2 else x_type, dtypes.COMPLEX64
        )
        if output is None:
            return wide if complex_ else x_type
        given = dtypes.of(self.operands.library.dtype(output) if is_array else output)
        if complex_ and not given.is_complex:
            if is_array or isinstance(output, str):
                raise RuntimeError(f"{self.function}: output must have complex dtype; got {given}")
            warnings.warn("promoting specified output dtype to complex", stacklevel=5)
            return dtypes.promote(given, dtypes.COMPLEX64)
        return given

    def run(
        self,
        axes: tuple[int, ...],
        origins: Sequence[int],
        mode: Any,
        cval: Any,
        flip: bool,
        divisor: int = 1,
    ) -> Any:
        """The result, in `output` where that was given."""
        x, ndim = self.x, self.x.ndim
        w = self.w.astype(self.weights_type.numpy)
        if self.flip_conjugates and not flip:  # a correlation conjugates
            w = w.conj()
        pads = [(0, 0)] * ndim
        for axis, origin, taps in zip(axes, origins, w.shape, strict=True):
            before = taps // 2 + self._shift(origin, taps, flip)
            pads[axis] = (before, taps - 1 - before)
        exact = self.dtype.is_exact
        if divisor != 1 and not exact:
            w, divisor = w / self.weights_type.numpy.type(divisor), 1
        windows = Windows(
            self.function,
            self.operands,
            self.work if exact else self.dtype,
            pads=tuple(pads),
            stride=(1,) * ndim,
            flip=flip,
            padding_mode=_mode(self.function, mode),
            fill=cval,
            method="direct",
        )
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        shape = [1] * ndim
        for axis, taps in zip(axes, w.shape, strict=True):
            shape[axis] = taps
        w = w.transpose(order).reshape(shape)
        y = x if 0 in x.shape else windows.run(x, w, tuple(sorted(axes)))
        if divisor != 1:
            y = y / divisor
        return self.operands.deliver(_truncated(y, self.dtype))

    def _shift(self, origin: Any, taps: int, flip: bool) -> int:
        shift = operator.index(origin)
        if flip:
            shift = -shift - (1 - taps % 2)
        if not -(taps // 2) <= shift <= (taps - 1) // 2:
            raise ValueError(
                f"{self.function}: Invalid origin; origin must satisfy -(weights.shape[k] // 2) <= "
                f"origin[k] <= (weights.shape[k]-1) // 2; got {origin} for {taps} weights"
            )
        return shift


def _truncated(y: Any, dtype: dtypes.DType) -> Any:
    """Sums as integers: cut off towards zero, and modulo 2^n where they do not fit, as SciPy's."""
    if dtype.is_exact and dtypes.of(y.dtype).kind in "fc":
        with np.errstate(invalid="ignore"):
            y = y.astype(np.uint64 if dtype is dtypes.UINT64 else np.int64)
    return y.astype(dtype.numpy, copy=False)


def _array(x: Any) -> Any:
    return x if arrays.maybe_library(x) else np.asarray(x)


def _real(dtype: dtypes.DType) -> dtypes.DType:
    return {dtypes.COMPLEX64: dtypes.FLOAT32, dtypes.COMPLEX128: dtypes.FLOAT64}.get(dtype, dtype)


def _mode(function: str, mode: Any) -> PaddingMode:
    if not isinstance(mode, str) and isinstance(mode, Iterable):
        raise RuntimeError(f"{function}: A sequence of modes is not supported; got {mode!r}")
    if mode not in _MODES:
        raise RuntimeError(
            f"{function}: boundary mode not supported: {mode!r}; it is one of {', '.join(_MODES)}"
        )
    return _MODES[mode]


def _axes(function: str, axes: Any, ndim: int) -> tuple[int, ...]:
    if axes is None:
        return tuple(range(ndim))
    if np.isscalar(axes):
        axes = (axes,)
    if not isinstance(axes, Iterable):
        raise ValueError(
            f"{function}: axes must be an integer, iterable of integers, or None; got {axes!r}"
        )
    given = tuple(operator.index(axis) for axis in axes)
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(f"{function}: specified axis: {axis} is out of range")
    unique = tuple(axis % ndim for axis in given)
    if len(set(unique)) != len(unique):
        raise ValueError(f"{function}: axes must be unique; got {axes!r}")
    return unique


def _one_each(function: str, value: Any, count: int) -> list[Any]:
    """One per axis: of a sequence of `count`, or a value for all."""
    if isinstance(value, str) or not np.iterable(value):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise RuntimeError(
            f"{function}: sequence argument must have length equal to input rank ({count}); "
            f"got {value!r}"
        )
    return values


class _PerAxis:
    """A filter that is one pass along each of its axes."""

    def __init__(self, function: str, input: Any, axes: Any) -> None:
        self.function, self.input = function, _array(input)
        self.axes = _axes(function, axes, len(self.input.shape))

    def each(self, *options: Any) -> Iterable[tuple[Any, ...]]:
        """(axis, its value of each option)."""
        values = [_one_each(self.function, option, len(self.axes)) for option in options]
        return zip(self.axes, *values, strict=True)

    def in_turn(self, steps: Sequence[Callable[[Any, Any], Any]], output: Any) -> Any:
        """Pass after pass, each into the output's type, as SciPy's: integers round at every one."""
        if not steps:  # a copy, in the output's type
            return correlate(self.input, np.ones((1,) * len(self.input.shape)).tolist(), output)
        result = steps[0](self.input, output)
        is_array = output is not None and arrays.maybe_library(output) is not None
        for step in steps[1:]:
            result = step(result, output if is_array else None)
        return result


def _gaussian(sigma: float, order: int, radius: int) -> Any:
    """The Gaussian at -radius … radius, normalised to sum 1, or its derivative of `order`.

    A derivative is a polynomial times the Gaussian: q' = dq/dx - x q / sigma^2, `order` times.
    """
    if order < 0:
        raise ValueError(f"gaussian_filter1d: order must be non-negative; got {order}")
    x = np.arange(-radius, radius + 1)
    bell = np.exp(-0.5 / sigma**2 * x**2)
    bell /= bell.sum()
    q = np.polynomial.Polynomial([1.0])
    for _ in range(order):
        q = q.deriv() + q * np.polynomial.Polynomial([0.0, -1.0 / sigma**2])
    return q(x) * bell


def _slope(
    function: str, input: Any, axis: int, output: Any, mode: Modes, cval: Any, across: list[int]
) -> Any:
    per_axis = _PerAxis(function, input, None)
    ndim = len(per_axis.input.shape)
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    modes = _one_each(function, mode, ndim)
    axis %= ndim
    others = [i for i in range(ndim) if i != axis]
    steps = [
        lambda x, out, i=i, weights=weights: correlate1d(x, weights, i, out, modes[i], cval)
        for i, weights in [(axis, [-1, 0, 1]), *((i, across) for i in others)]
    ]
    return per_axis.in_turn(steps, output)


def _of_gaussians(
    function: str,
    combine: Callable[..., Any],
    order: int,
    input: Any,
    sigma: Any,
    output: Any,
    mode: Modes,
    cval: Any,
    axes: Any,
    kwargs: dict[str, Any],
) -> Any:
    """`combine` over derivatives of Gaussians of `order` along one axis at a time."""
    input = _array(input)
    ndim = len(input.shape)
    filtered = _axes(function, axes, ndim)
    sigmas: list[Any] = [0] * ndim  # 0: an axis that is not filtered
    for axis, s in zip(filtered, _one_each(function, sigma, len(filtered)), strict=True):
        sigmas[axis] = s

    def derivative(x: Any, axis: int, out: Any, mode: str, cval: Any, **kwargs: Any) -> Any:
        orders = [order if i == axis else 0 for i in range(ndim)]
        return gaussian_filter(x, sigmas, orders, out, mode, cval, **kwargs)

    return combine(input, derivative, output, mode, cval, (), kwargs, axes=axes)


def _sum_over_axes(
    function: str,
    input: Any,
    derivative: Callable[..., Any],
    output: Any,
    mode: Modes,
    cval: Any,
    extra_arguments: Sequence[Any],
    extra_keywords: dict[str, Any] | None,
    axes: Any,
    *,
    length: bool,
) -> Any:
    """The sum of derivatives along all axes; with `length` the root of the sum of their squares."""
    per_axis = _PerAxis(function, input, axes)
    if not per_axis.axes:
        return per_axis.in_turn([], output)
    is_array = output is not None and arrays.maybe_library(output) is not None
    operands = Operands(
        function, x=per_axis.input, out=output if is_array else None, names=("input", "w", "output")
    )
    into = operands.library.dtype(output) if is_array else output
    total: Any = None
    for axis, axis_mode in per_axis.each(mode):
        part = derivative(
            per_axis.input, axis, into, axis_mode, cval, *extra_arguments, **(extra_keywords or {})
        )
        part = Operands(function, x=part).x
        if length:
            part = part * part
        total = part if total is None else total + part
    if length:
        total = (total**0.5).astype(total.dtype)
    return operands.deliver(total)
