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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.arrays import HostArray
from gpuconv.calls import Calls, plain, signature
from gpuconv.dtypes import DType
from gpuconv.execute import NOT_GIVEN, Operands
from gpuconv.problem import PaddingMode
from gpuconv.spatial import Step, Windows, array_like

Modes = str | Sequence[str]
Shape = tuple[int, ...]

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
    return _in_turn(
        "gaussian_filter1d", input, output, cval, _one_gaussian,
        sigma, axis, order, mode, truncate, radius,
    )  # fmt: skip


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
    return _in_turn(
        "gaussian_filter", input, output, cval, _gaussians,
        sigma, order, mode, truncate, radius, axes,
    )  # fmt: skip


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
    return _in_turn("uniform_filter1d", input, output, cval, _one_mean, size, axis, mode, origin)


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
    return _in_turn("uniform_filter", input, output, cval, _means, size, mode, origin, axes)


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
    return _in_turn("sobel", input, output, cval, _slope, axis, mode, "hat")


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
    return _in_turn("prewitt", input, output, cval, _slope, axis, mode, "box")


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

    def chains(call: _Call) -> list[list[_Pass]]:
        passes = [
            _Pass(_SECOND, (axis,), _mode(call.function, m))
            for axis, m in call.per_axis(axes, mode)
        ]
        return [[p] for p in call.crossed(passes, cval)]

    return _summed("laplace", input, output, cval, chains, (mode, axes))


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
    return _summed(
        "gaussian_laplace", input, output, cval,
        lambda call: _derivatives(call, 2, sigma, mode, axes, kwargs),
        (sigma, mode, axes, *kwargs, *kwargs.values()),
    )  # fmt: skip


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

    Only `axes` are filtered, as in `gaussian_laplace`. (SciPy smooths along the others too.)

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import ndimage
    >>> ndimage.gaussian_gradient_magnitude(np.eye(5)[2], 1).round(2)
    array([0.09, 0.24, 0.  , 0.24, 0.09])
    """
    return _summed(
        "gaussian_gradient_magnitude", input, output, cval,
        lambda call: _derivatives(call, 1, sigma, mode, axes, kwargs),
        (sigma, mode, axes, *kwargs, *kwargs.values()), length=True,
    )  # fmt: skip


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

_SLOPE, _SECOND = np.array([-1.0, 0.0, 1.0]), np.array([1.0, -2.0, 1.0])
_MOST_FUSED_TAPS = 25
_EXACT = 2**23  # whole numbers below it are exact in float32, and so is the cut of their quotients
_BLOCK = 1 << 15  # elements
_ACROSS = {"hat": np.array([1.0, 2.0, 1.0]), "box": np.array([1.0, 1.0, 1.0])}
_KEPT = 1 << 16  # bytes of weights that a remembered call may hold
_calls = Calls(1024)


def _key(function: str, input: Any, weights: Any, output: Any, values: tuple[Any, ...]) -> Any:
    """All that decides how a call goes; None where that shows only at a closer look.

    Without `weights`: a function with its own, which follow from `values`.
    """
    out = None
    if output is not None and type(output) not in (str, type):
        out = output
    given = signature(input, input if weights is None else weights, None, out)
    options = None if given is None else plain(output if out is None else None, *values)
    if options is None:
        return None
    # How integers are summed follows from the weights' values.
    if weights is not None and input.dtype.kind in "biu":
        return (function, options, given, weights.tobytes()) if weights.nbytes <= _KEPT else None
    return function, options, given


def _in_turn(
    function: str,
    input: Any,
    output: Any,
    cval: Any,
    passes: Callable[..., list[_Pass]],
    *values: Any,
) -> Any:
    """The `passes` of a function whose weights follow from `values`, one after another."""
    key = _key(function, input, None, output, (cval, *values))
    known = _calls.get(key)
    if known is not None:
        return known(input, None, None, output)
    call = _Call(function, input, output)
    return call.finish(call.in_turn(passes(call, *values), cval), key)


def _summed(
    function: str,
    input: Any,
    output: Any,
    cval: Any,
    chains: Callable[[_Call], Iterable[list[_Pass]]],
    values: tuple[Any, ...],
    *,
    length: bool = False,
) -> Any:
    """The sum of `chains` of passes, which follow from `values`, or the root of that of squares."""
    key = _key(function, input, None, output, (cval, *values))
    known = _calls.get(key)
    if known is not None:
        return known(input, None, None, output)
    call = _Call(function, input, output)
    return call.finish(call.summed(chains(call), cval, length=length), key)


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
    key = _key(function, input, weights, output, (mode, cval, origin, axes))
    known = _calls.get(key)
    if known is not None:
        return known(input, weights, None, output)
    call = _Call(function, input, output, weights, cval)
    filtered, shape = _axes(function, axes, call.ndim), tuple(call.w.shape)
    if len(shape) != len(filtered) or 0 in shape:
        raise RuntimeError(
            f"{function}: weights.ndim ({len(shape)}) must match len(axes) ({len(filtered)}), "
            f"with no empty axis; got weights of shape {shape}"
        )
    origins = _one_each(function, origin, len(filtered))
    if len(filtered) < call.ndim:  # SciPy's order: origins go with `axes`, weights do not
        origins = [origin for _, origin in sorted(zip(filtered, origins, strict=True))]
    padding_mode = _mode(function, mode)
    if not filtered:
        return call.finish(call.in_turn([], cval))
    filtered = tuple(sorted(filtered))
    return call.finish(
        call.filter(call.x, call.w, filtered, origins, padding_mode, cval, flip=flip), key
    )


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
) -> Any:
    """`correlate1d` and `convolve1d`: one filter along one axis."""
    key = _key(function, input, weights, output, (axis, mode, cval, origin))
    known = _calls.get(key)
    if known is not None:
        return known(input, weights, None, output)
    call = _Call(function, input, output, weights, cval)
    if call.w.ndim != 1 or call.w.shape[0] < 1:
        raise RuntimeError(f"{function}: no filter weights given; got shape {tuple(call.w.shape)}")
    axes = (call.axis(axis),)
    return call.finish(
        call.filter(call.x, call.w, axes, [origin], _mode(function, mode), cval, flip=flip), key
    )


@dataclass(frozen=True, eq=False)
class _Pass:
    """One filter of this module's own; its sum is divided by `divisor`."""

    weights: HostArray  # with an axis for each of `axes`
    axes: Shape
    mode: PaddingMode
    origins: Shape = (0,)
    divisor: int = 1
    separable: bool = False  # of two axes, and an outer product


@dataclass(frozen=True, eq=False)
class _Stage:
    """What a repeated call does of one `filter`."""

    step: Step
    weights: HostArray | None  # as they are summed with; None: the caller's,
    shape: Shape  # in this shape
    dtype: np.dtype[Any]  # and type

    def run(self, x: HostArray, w: HostArray | None, out: HostArray | None = None) -> HostArray:
        weights = self.weights
        if weights is None:
            assert w is not None
            weights = w.astype(self.dtype, copy=False).reshape(self.shape)
        return self.step.again(x, weights, out)

    def writes(self, out: HostArray, x: HostArray, w: HostArray | None) -> bool:
        """Whether the result may be written to `out` as it is computed."""
        return (
            self.step.back is None
            and out.flags.c_contiguous
            and not np.may_share_memory(out, x)
            and (w is None or not np.may_share_memory(out, w))
        )


@dataclass(frozen=True, eq=False)
class _Repeat:
    """A call of NumPy arrays without its questions: chains of stages, whose results are added."""

    chains: list[list[_Stage]]
    length: bool

    def __call__(self, x: Any, w: Any, bias: None, out: Any) -> Any:
        # As in every call: a sum that overflows is infinite, without a warning.
        with np.errstate(all="ignore"):
            if type(out) is not np.ndarray:
                return self._compute(x, w)
            (first, *more), *others = self.chains
            if not (more or others or self.length) and first.writes(out, x, w):
                first.run(x, w, out)
            else:
                out[...] = self._compute(x, w)
            return out

    def _compute(self, x: HostArray, w: HostArray | None) -> HostArray:
        if len(self.chains) == 1 and not self.length:
            return _chained(self.chains[0], x, w)
        total: HostArray = _total((_chained(c, x, w) for c in self.chains), self.length, own=True)
        return total


def _chained(chain: list[_Stage], x: HostArray, w: HostArray | None) -> HostArray:
    for stage in chain:
        x = stage.run(x, w)
    return x


class _Call:
    """One call: the arrays taken in, filters over them, and the result handed out.

    Between the passes of a call everything stays with the backend, in the output's type.
    """

    def __init__(
        self, function: str, input: Any, output: Any, weights: Any = NOT_GIVEN, cval: Any = 0.0
    ) -> None:
        self.function = function
        input = array_like(input)
        own_weights = arrays.maybe_library(weights) is None  # a list, or this module's own
        is_array = output is not None and arrays.maybe_library(output) is not None
        self._given = input, weights
        self._chains: list[list[_Stage]] = []
        self._length = False
        self._repeats = True
        operands = self.operands = Operands(
            function,
            x=input,
            w=NOT_GIVEN if own_weights else weights,
            out=output if is_array else None,
            names=("input", "weights", "output"),
        )
        self.x = operands.x
        self.ndim = len(self.x.shape)
        self.w: Any = operands.w
        if own_weights and weights is not NOT_GIVEN:
            self.w = np.asarray(weights)
        x_type = dtypes.of(self.x.dtype)
        complex_weights = self.w is not None and dtypes.of(self.w.dtype).is_complex
        self.dtype = self._output_dtype(x_type, output, is_array, complex_weights)
        operands.check_result(self.dtype)
        if is_array and tuple(output.shape) != tuple(self.x.shape):
            raise RuntimeError(
                f"{function}: output shape not correct; got {tuple(output.shape)} for an input of "
                f"shape {tuple(self.x.shape)}"
            )
        if np.iscomplexobj(cval) and not x_type.is_complex:
            raise ValueError(
                f"{function}: Cannot provide a complex-valued cval when the input is real; "
                f"got {cval!r}"
            )

    def _output_dtype(
        self, x_type: DType, output: Any, is_array: bool, complex_weights: bool
    ) -> DType:
        complex_ = x_type.is_complex or complex_weights
        if output is None:
            if not complex_:
                return x_type
            wide = dtypes.FLOAT64 if x_type.is_exact and x_type.itemsize > 2 else x_type
            return dtypes.promote(wide, dtypes.COMPLEX64)
        if is_array:
            output = self.operands.library.dtype(output)
        known = isinstance(output, (str, type, np.dtype))  # else another library's dtype
        given = dtypes.of(output if known else str(output))
        if complex_ and not given.is_complex:
            if is_array or isinstance(output, str):
                raise RuntimeError(f"{self.function}: output must have complex dtype; got {given}")
            warnings.warn("promoting specified output dtype to complex", stacklevel=5)
            return dtypes.promote(given, dtypes.COMPLEX64)
        return given

    def axis(self, axis: int) -> int:
        """`axis`, counted from the front."""
        if not -self.ndim <= axis < self.ndim:
            raise np.exceptions.AxisError(axis, self.ndim)
        return axis % self.ndim

    def per_axis(self, axes: Any, *options: Any) -> Iterator[tuple[Any, ...]]:
        """(axis, its value of each option)."""
        filtered = _axes(self.function, axes, self.ndim)
        values = [_one_each(self.function, option, len(filtered)) for option in options]
        return zip(filtered, *values, strict=True)

    def filter(
        self,
        x: Any,
        w: Any,
        axes: Shape,
        origins: Sequence[Any],
        mode: PaddingMode,
        cval: Any,
        *,
        flip: bool = False,
        divisor: int = 1,
        separable: bool = False,
    ) -> Any:
        """x under the weights w, which have an axis for each of `axes`, in the output's type."""
        own = w is not self.w
        single = _exact_in_float32(x, w, self.dtype, cval)
        if divisor != 1 and self.dtype.is_exact and _means_hold(x, divisor, mode, cval):
            single = x.dtype.itemsize == 1 and x.dtype.kind == "u"
            w, divisor = w * ((1 + (2**-15 if single else 2**-30)) / divisor), 1
        # The NumPy backend cuts sums off to integers as it goes.
        cuts = divisor == 1 and self.operands.backend == "numpy" and len(axes) <= 3
        slide = _slide(
            self.function, dtypes.of(x.dtype), dtypes.of(w.dtype), self.dtype, self.ndim, w.shape,
            axes, tuple(map(operator.index, origins)), mode, flip, single, cuts, separable,
        )  # fmt: skip
        w = w.astype(slide.weights_type.numpy).reshape(slide.weights_shape)
        if slide.conjugate:
            w = w.conj()
        if divisor != 1 and not self.dtype.is_exact:
            w, divisor = w / slide.weights_type.numpy.type(divisor), 1
        if 0 in x.shape:
            return x.astype(self.dtype.numpy)
        with self.operands.active():
            if isinstance(w, np.ndarray):  # a host's weights
                w = self.operands.adopt(w)
            y = slide.windows.run(self.operands, x, w, axes, cval)
            self._note(x, w, own, slide, axes, cval, divisor)
            return _truncated(y, self.dtype, divisor)

    def _note(
        self, x: Any, w: Any, own: bool, slide: _Slide, axes: Shape, cval: Any, divisor: int
    ) -> None:
        """Keep what a repeated call does here, where that is one step of the NumPy backend."""
        if self.operands.backend != "numpy":
            self._repeats = False
        if not self._repeats:
            return
        step = slide.windows.step(self.operands, x, w, axes, cval)
        plain = divisor == 1 and slide.windows.dtype is self.dtype
        if step is None or not plain or x.dtype.kind == "c" or w.dtype.kind == "c":
            self._repeats = False
            return
        if x is self.x:
            self._chains.append([])
        weights = w if own else None
        self._chains[-1].append(_Stage(step, weights, slide.weights_shape, w.dtype))

    def in_turn(self, passes: Iterable[_Pass], cval: Any) -> Any:
        """Pass after pass, each into the output's type, as SciPy's: integers round at every one."""
        y = self.x
        for p in self._fused(list(passes), cval):
            y = self.filter(
                y, p.weights, p.axes, p.origins, p.mode, cval,
                divisor=p.divisor, separable=p.separable,
            )  # fmt: skip
        if y is self.x:  # no pass at all
            self._repeats = False
            with self.operands.active():
                y = _truncated(y.copy(), self.dtype)
        return y

    def _fused(self, passes: list[_Pass], cval: Any) -> list[_Pass]:
        """Two passes as one 2-D filter: the image is read and written once, not twice.

        The NumPy backend's algorithms see that such a filter has rank 1 and still do the work of
        two passes; on a GPU small filters alone are worth it. Integers round between passes, so
        only whole weights will do, whose sums do not.
        """
        if len(passes) < 2 or self.dtype.is_complex or dtypes.of(self.x.dtype).is_complex:
            return passes
        *before, first, second = passes
        both = first.weights.size * second.weights.size
        if (
            first.mode != second.mode
            or (first.mode == "zeros" and cval)
            or min(first.weights.size, second.weights.size) < 2
            or (self.operands.backend != "numpy" and both > _MOST_FUSED_TAPS)
            or (self.dtype.is_exact and not self._sums_are_whole(first, second))
        ):
            return passes
        if first.axes > second.axes:
            first, second = second, first
        fused = _Pass(
            np.multiply.outer(first.weights, second.weights),
            first.axes + second.axes,
            first.mode,
            first.origins + second.origins,
            first.divisor * second.divisor,
            separable=True,
        )
        return [*before, fused]

    def crossed(self, passes: list[_Pass], cval: Any) -> list[_Pass]:
        """Passes of 3 taps that are to be summed, as one filter where that is the same."""
        n = len(passes)
        if (
            not 2 <= n <= 3
            or len({p.mode for p in passes}) > 1
            or (self.dtype.is_exact and (cval % 1 or not self._sums_are_whole(*passes)))
        ):
            return passes
        passes = sorted(passes, key=lambda p: p.axes)
        weights = np.zeros((3,) * n)
        for i, p in enumerate(passes):
            weights[(1,) * i + (slice(None),) + (1,) * (n - 1 - i)] += p.weights
        return [_Pass(weights, tuple(p.axes[0] for p in passes), passes[0].mode, (0,) * n)]

    def _sums_are_whole(self, *passes: _Pass) -> bool:
        x_type = dtypes.of(self.x.dtype)
        return (
            x_type.is_exact
            and max(x_type.itemsize, self.dtype.itemsize) <= 4
            and all(p.divisor == 1 and not np.any(p.weights % 1) for p in passes)
        )

    def summed(self, chains: Iterable[Iterable[_Pass]], cval: Any, *, length: bool = False) -> Any:
        """The sum of the results of `chains`; with `length` the root of the sum of squares."""
        self._length = length
        parts = (self.in_turn(chain, cval) for chain in chains)
        with self.operands.active():
            total = _total(parts, length, own=True)
        return self.in_turn([], cval) if total is None else total

    def finish(self, y: Any, key: Any = None) -> Any:
        """The result as the caller's, in `output` where that was given.

        Where there is a `key`, the call is kept under it for others like it.
        """
        with self.operands.active():
            result = self.operands.deliver(y)
        if key is not None and self._chains and self._repeats and self._taken():
            _calls.remember(key, _Repeat(self._chains, self._length))
        return result

    def _taken(self) -> bool:
        """Whether the backend took the caller's own arrays, and little else is to be kept."""
        input, weights = self._given
        kept = sum(s.weights.nbytes for c in self._chains for s in c if s.weights is not None)
        own = weights is NOT_GIVEN or self.operands.w is weights
        return self.operands.x is input and own and kept <= _KEPT


def _total(parts: Iterable[Any], length: bool, *, own: bool = False) -> Any:
    """The sum of `parts`, or the root of the sum of their squares; None where there are none.

    Parts that are this module's `own` are overwritten.
    """
    total: Any = None
    for part in parts:
        if length and own:
            part *= part
        elif length:
            part = part * part
        if total is None:
            total = part
        elif own:
            total += part
        else:
            total = total + part
    if not length or total is None:
        return total
    return (total**0.5).astype(total.dtype, copy=False)


@dataclass(frozen=True)
class _Slide:
    """How a filter slides over an array, and in what types: from shapes and options alone."""

    windows: Windows
    weights_shape: Shape
    weights_type: DType
    conjugate: bool


@lru_cache(maxsize=4096)
def _slide(
    function: str,
    x_type: DType,
    w_type: DType,
    dtype: DType,
    ndim: int,
    taps: Shape,
    axes: Shape,
    origins: tuple[int, ...],
    mode: PaddingMode,
    flip: bool,
    single: bool,
    cuts: bool,
    separable: bool,
) -> _Slide:
    # Floating inputs are summed in their own type, integers in float64 (or, to the same, float32).
    integers = dtypes.FLOAT32 if single else dtypes.FLOAT64
    work = integers if x_type.is_exact else x_type
    if not dtype.is_exact:
        work = dtypes.promote(work, dtype)
    work = dtypes.accumulator(work)
    pads, shape = [(0, 0)] * ndim, [1] * ndim
    for axis, origin, n in zip(axes, origins, taps, strict=True):
        before = n // 2 + _shift(function, origin, n, flip)
        pads[axis], shape[axis] = (before, n - 1 - before), n
    windows = Windows(
        function,
        work if dtype.is_exact and not cuts else dtype,
        pads=tuple(pads),
        stride=(1,) * ndim,
        flip=flip,
        padding_mode=mode,
        method="direct",
        separable=separable,
    )
    weights_type = work if w_type.is_complex else _real(work)
    return _Slide(windows, tuple(shape), weights_type, w_type.is_complex and not flip)


def _shift(function: str, origin: int, taps: int, flip: bool) -> int:
    """How far a filter lies to the left of its centre."""
    shift = -origin - (1 - taps % 2) if flip else origin
    if not -(taps // 2) <= shift <= (taps - 1) // 2:
        raise ValueError(
            f"{function}: Invalid origin; origin must satisfy -(weights.shape[k] // 2) <= "
            f"origin[k] <= (weights.shape[k]-1) // 2; got {origin} for {taps} weights"
        )
    return shift


def _exact_in_float32(x: Any, w: Any, dtype: DType, cval: Any) -> bool:
    """Whether float32 holds every sum of these integers exactly: half of float64's memory."""
    if not (dtype.is_exact and x.dtype.kind in "biu" and x.dtype.itemsize <= 2):
        return False
    if not isinstance(w, np.ndarray) or w.dtype.kind == "c" or np.any(w % 1) or cval % 1:
        return False
    largest = max(1 << 8 * x.dtype.itemsize, abs(cval))
    return bool(np.abs(w).sum() * largest < _EXACT)


def _means_hold(x: Any, size: int, mode: PaddingMode, cval: Any) -> bool:
    """Whether a mean of integers may be a sum of products with weights a little above 1 / `size`.

    Cut off, such a sum is the quotient of the exact sum: the excess outweighs the rounding (all
    of uint8's terms are positive, so float32 will do), but lifts no quotient to the next integer.
    """
    small = x.dtype.kind in "biu" and x.dtype.itemsize <= 2 and size <= 64
    return small and (mode != "zeros" or not cval)


def _truncated(y: Any, dtype: DType, divisor: int = 1) -> Any:
    """y / divisor in the output's type.

    As integers: cut off towards zero, and modulo 2^n where they do not fit, as SciPy's are.
    """
    if not (dtype.is_exact and y.dtype.kind in "fc"):
        return (y if divisor == 1 else y / divisor).astype(dtype.numpy, copy=False)
    whole = np.uint64 if dtype is dtypes.UINT64 else np.int64
    with np.errstate(invalid="ignore"):
        if not (isinstance(y, np.ndarray) and y.flags.c_contiguous and y.size > _BLOCK):
            return (y if divisor == 1 else y / divisor).astype(whole).astype(dtype.numpy)
        result = np.empty(y.shape, dtype.numpy)
        source, target = y.reshape(-1), result.reshape(-1)
        for start in range(0, y.size, _BLOCK):  # so that the 64-bit integers stay in the cache
            block = source[start : start + _BLOCK]
            target[start : start + _BLOCK] = (block / divisor if divisor != 1 else block).astype(
                whole
            )
        return result


def _real(dtype: DType) -> DType:
    return {dtypes.COMPLEX64: dtypes.FLOAT32, dtypes.COMPLEX128: dtypes.FLOAT64}.get(dtype, dtype)


def _mode(function: str, mode: Any) -> PaddingMode:
    if not isinstance(mode, str) and isinstance(mode, Iterable):
        raise RuntimeError(f"{function}: A sequence of modes is not supported; got {mode!r}")
    if mode not in _MODES:
        raise RuntimeError(
            f"{function}: boundary mode not supported: {mode!r}; it is one of {', '.join(_MODES)}"
        )
    return _MODES[mode]


def _axes(function: str, axes: Any, ndim: int) -> Shape:
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


def _gaussians(
    call: _Call, sigma: Any, order: Any, mode: Modes, truncate: float, radius: Any, axes: Any
) -> list[_Pass]:
    """The passes of a Gaussian, or of its derivatives; none along an axis of sigma 0."""
    return [
        _Pass(_gaussian(call.function, float(s), o, truncate, r), (axis,), _mode(call.function, m))
        for axis, s, o, m, r in call.per_axis(axes, sigma, order, mode, radius)
        if s > 1e-15
    ]


def _gaussian(
    function: str, sigma: float, order: int, truncate: float, radius: int | None
) -> HostArray:
    reach = int(truncate * sigma + 0.5) if radius is None else radius
    if not isinstance(reach, (int, np.integer)) or reach < 0:
        raise ValueError(f"{function}: Radius must be a nonnegative integer; got {reach!r}")
    if order < 0:
        raise ValueError(f"{function}: order must be non-negative; got {order}")
    return _gaussian_weights(sigma, order, int(reach))


@lru_cache(maxsize=256)
def _gaussian_weights(sigma: float, order: int, radius: int) -> HostArray:
    """The Gaussian at radius … -radius, normalised to sum 1, or its derivative of `order`.

    A derivative is a polynomial times the Gaussian: q' = dq/dx - x q / sigma^2, `order` times.
    """
    x = np.arange(-radius, radius + 1)
    bell = np.exp(-0.5 / sigma**2 * x**2)
    bell /= bell.sum()
    q = np.polynomial.Polynomial([1.0])
    for _ in range(order):
        q = q.deriv() + q * np.polynomial.Polynomial([0.0, -1.0 / sigma**2])
    weights: HostArray = (q(x) * bell)[::-1]
    weights.flags.writeable = False
    return weights


def _derivatives(
    call: _Call, order: int, sigma: Any, mode: Modes, axes: Any, kwargs: dict[str, Any]
) -> Iterator[list[_Pass]]:
    """For each axis the passes of a Gaussian's derivative of `order` along it."""
    sigmas: list[Any] = [0] * call.ndim  # 0: an axis that is not filtered
    for axis, s in call.per_axis(axes, sigma):
        sigmas[axis] = s
    options = {"truncate": 4.0, "radius": None, **kwargs}
    for axis, axis_mode in call.per_axis(axes, mode):
        orders = [order if i == axis else 0 for i in range(call.ndim)]
        yield _gaussians(call, sigmas, orders, axis_mode, axes=None, **options)


def _one_gaussian(
    call: _Call, sigma: Any, axis: int, order: int, mode: Any, truncate: float, radius: Any
) -> list[_Pass]:
    weights = _gaussian(call.function, float(sigma), order, truncate, radius)
    return [_Pass(weights, (call.axis(axis),), _mode(call.function, mode))]


def _one_mean(call: _Call, size: int, axis: int, mode: Any, origin: int) -> list[_Pass]:
    return [_mean(call.function, size, call.axis(axis), mode, origin)]


def _means(call: _Call, size: Any, mode: Modes, origin: Any, axes: Any) -> list[_Pass]:
    return [
        _mean(call.function, int(n), axis, m, o)
        for axis, n, o, m in call.per_axis(axes, size, origin, mode)
        if n > 1
    ]


def _mean(function: str, size: int, axis: int, mode: Any, origin: int) -> _Pass:
    if size < 1:
        raise RuntimeError(f"{function}: incorrect filter size; got {size}")
    if not 0 <= size // 2 + origin < size:
        raise ValueError(f"{function}: invalid origin; got {origin} for size {size}")
    return _Pass(np.ones(size), (axis,), _mode(function, mode), (origin,), divisor=size)


def _slope(call: _Call, axis: int, mode: Modes, across: str) -> list[_Pass]:
    along = call.axis(axis)
    modes = [_mode(call.function, m) for m in _one_each(call.function, mode, call.ndim)]
    others = [i for i in range(call.ndim) if i != along]
    passes = [_Pass(_SLOPE, (along,), modes[along])]
    return passes + [_Pass(_ACROSS[across], (i,), modes[i]) for i in others]


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
    """The sum of the caller's derivatives along all axes, or the root of the sum of squares."""
    input = array_like(input)
    is_array = output is not None and arrays.maybe_library(output) is not None
    operands = Operands(
        function, x=input, out=output if is_array else None, names=("input", "w", "output")
    )
    into = operands.library.dtype(output) if is_array else output
    ndim = len(input.shape)
    filtered = _axes(function, axes, ndim)
    if not filtered:
        call = _Call(function, input, output)
        return call.finish(call.in_turn([], cval))

    def parts() -> Iterator[Any]:
        for axis, m in zip(filtered, _one_each(function, mode, len(filtered)), strict=True):
            part = derivative(
                input, axis, into, m, cval, *extra_arguments, **(extra_keywords or {})
            )
            yield Operands(function, x=part).x

    with operands.active():
        return operands.deliver(_total(parts(), length))
