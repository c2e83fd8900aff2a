"""The convolutions of neural networks and image stacks, and their plans.

They correlate, as torch, JAX and ONNX do: ``y[p] = sum_r x[stride*p + dilation*r - pad] w[r]``, the
filter unflipped. Each function reads: describe the problem, choose a plan, run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import NoneType
from typing import Any

import numpy as np

from gpuconv import backends, tuning
from gpuconv.calls import Calls, signature
from gpuconv.execute import Operands, as_layout_shape
from gpuconv.plan import Plan, check_algorithm, choose
from gpuconv.problem import (
    LAYOUTS,
    ConvProblem,
    Operation,
    as_shape,
    describe,
    describe_transpose,
    freeze,
)

Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


def conv1d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """1-D convolution, as neural networks use the word (cross-correlation: w is not flipped).

    x is (N, C, W) or (C, W), with ``layout="NWC"`` (N, W, C); w is (K, C/groups, S); the result
    (N, K, Q), or as `layout` writes it. Everything else is as in `conv2d`, with one axis.

    Examples
    --------
    How far does a ball get that is dropped twice, if a drop carries it 0, 1 or 2 metres with
    probabilities 0.2, 0.5 and 0.3? A convolution flips the filter, so it is given flipped here:

    >>> import numpy as np, gpuconv
    >>> drop = np.array([[[0.2, 0.5, 0.3]]])
    >>> gpuconv.conv1d(drop, drop[..., ::-1], padding="full").round(2)
    array([[[0.04, 0.2 , 0.37, 0.3 , 0.09]]])
    """
    return _conv(
        described,
        "conv1d",
        1,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def conv2d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCHW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """2-D convolution, as neural networks use the word (cross-correlation: w is not flipped).

    Along each axis ``out = (in + pad_lo + pad_hi - dilation*(filter-1) - 1) // stride + 1``.

    Parameters
    ----------
    x : array, (N, C, H, W) or (C, H, W)
        Of any strides. Without N the result has none either. With ``layout="NHWC"`` the channels
        come last.
    w : array, (K, C/groups, R, S)
        In both layouts.
    bias : array, (K,), optional
    stride, dilation : int or 2 ints, at least 1
    padding : int, 2 ints, 2 pairs (before, after), "valid", "full", "same" or "same_lower"
        "same" gives ``out = ceil(in/stride)``, the odd element padded at the end; "same_lower" at
        the start (ONNX SAME_UPPER and SAME_LOWER; JAX's SAME). "full" pads dilation*(filter-1).
    groups : int
        Divides C and K: output channels of a group see only its C/groups input channels.
    padding_mode : "zeros", "reflect", "symmetric", "replicate" or "circular"
        What lies beyond the edge of ``a b c d``: zeros; ``d c b | a b c d | c b a``;
        ``b a | a b``; ``a a | a b``; the input over again. Pads may be longer than the input.
    layout : "NCHW" or "NHWC"
        How the shapes of x and of the result are written.
    dtype : optional
        The result's type. Left out: the promoted type of x and w for floating and complex types
        (an integer beside a float takes the float's), int64 or uint64 for integers and bool. Sums
        run in float32 for 16-bit floats, exactly in 64 bits for integers, else in the type itself.
        A wider `dtype` widens the sums too; of a narrower integer type, results are the sums' low
        bits, as NumPy converts. Integers under a floating `dtype` are summed as floats of that type
        are, and round as these do: leave it out for exact sums.
    precision : "ieee", "tf32" or "tf32x3"
        How a GPU may compute float32 products; "ieee" is full float32.
    algorithm : "auto" or a name out of ``plan_conv2d(...).candidates``
        "auto" keeps NaN and Inf to the outputs whose windows hold them.
    workspace_limit : int, optional
        A hard cap on scratch memory, in bytes.
    out : array, optional
        Where to write the result; of its shape, dtype, library and device.

    Returns
    -------
    array, (N, K, P, Q), or as `layout` writes it
        Of x's library, device and memory order.

    Raises
    ------
    ValueError
        Shapes or values that do not fit, or an output without extent.
    TypeError
        A type that is no array or not supported, mixed libraries or devices.
    gpuconv.BackendError
        The backend asked for by ``use_backend`` cannot run here.

    After an error nothing has been written, `out` included.

    Notes
    -----
    The same call gives the same bits, and each image of a batch the bits it would get alone with
    the same plan or the same named `algorithm`: "auto" may choose by the size of the batch.
    The arguments follow ``torch.nn.functional.conv2d``; "same", dtypes and pairs the rules of
    ONNX Conv and ``jax.lax.conv_general_dilated``.

    Examples
    --------
    >>> import numpy as np, gpuconv
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> sobel = np.array([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]])
    >>> gpuconv.conv2d(x, sobel)
    array([[[[8., 8.],
             [8., 8.]]]])
    >>> gpuconv.conv2d(x, sobel, stride=2, padding="same", padding_mode="reflect").shape
    (1, 1, 2, 2)
    """
    return _conv(
        described,
        "conv2d",
        2,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def conv3d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCDHW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """3-D convolution, as neural networks use the word (cross-correlation: w is not flipped).

    x is (N, C, D, H, W) or (C, D, H, W), with ``layout="NDHWC"`` (N, D, H, W, C); w is
    (K, C/groups, T, R, S); the result (N, K, Z, P, Q), or as `layout` writes it. Everything else
    is as in `conv2d`, with three axes.

    Examples
    --------
    >>> import numpy as np, gpuconv
    >>> x = np.ones((1, 2, 5, 6, 7), np.float32)
    >>> gpuconv.conv3d(x, np.ones((4, 2, 3, 3, 3), np.float32), padding=1).shape
    (1, 4, 5, 6, 7)
    """
    return _conv(
        described,
        "conv3d",
        3,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def conv_transpose1d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    layout: str = "NCW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """1-D transposed convolution: the adjoint of `conv1d`.

    x is (N, C, W) or (C, W), with ``layout="NWC"`` (N, W, C); w is (C, K/groups, S); the result
    (N, K, Q), or as `layout` writes it. Everything else is as in `conv_transpose2d`, with one axis.

    Examples
    --------
    Every element of x lays a copy of the filter, multiplied by it, two places further on:

    >>> import numpy as np, gpuconv
    >>> x = np.array([[[1.0, 2.0, 3.0]]])
    >>> gpuconv.conv_transpose1d(x, np.array([[[1.0, 1.0, 0.5]]]), stride=2)
    array([[[1. , 1. , 2.5, 2. , 4. , 3. , 1.5]]])
    """
    return _conv(
        described_transpose,
        "conv_transpose1d",
        1,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def conv_transpose2d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    layout: str = "NCHW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """2-D transposed convolution: the adjoint of `conv2d` ("deconvolution", upsampling).

    Every element of x lays a copy of the (unflipped) filter, multiplied by it, into the result at
    ``stride`` times its place; `padding` cuts off the margin. Along each axis
    ``out = (in - 1)*stride - pad_lo - pad_hi + dilation*(filter-1) + output_padding + 1``.

    It maps the shape of a result of ``conv2d(..., stride, padding, dilation, groups)`` back to one
    of its input, and is that linear map's transpose (no conjugate is taken): sum(conv2d(a, w) * b)
    is sum(a * conv_transpose2d(b, w)).

    Parameters
    ----------
    x : array, (N, C, H, W) or (C, H, W)
        Of any strides. Without N the result has none either. With ``layout="NHWC"`` the channels
        come last.
    w : array, (C, K/groups, R, S)
        In both layouts.
    bias : array, (K,), optional
    stride, dilation : int or 2 ints, at least 1
    padding : int, 2 ints, 2 pairs (before, after), "valid", "full", "same" or "same_lower"
        That of the convolution which this is the adjoint of. "same" gives ``out = in*stride``.
    output_padding : int or 2 ints, less than stride or dilation
        Rows and columns added at the end: a strided convolution gives the same shape for several
        inputs, and this tells them apart.
    groups : int
        Divides C and K.
    layout, dtype, precision, algorithm, workspace_limit, out
        As in `conv2d`.

    Returns
    -------
    array, (N, K, P, Q), or as `layout` writes it
        Of x's library, device and memory order.

    Raises
    ------
    ValueError, TypeError, gpuconv.BackendError
        As `conv2d`.

    Notes
    -----
    The arguments follow ``torch.nn.functional.conv_transpose2d``; "same" is that of ONNX
    ConvTranspose.

    Examples
    --------
    >>> import numpy as np, gpuconv
    >>> x = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> gpuconv.conv_transpose2d(x, np.ones((1, 1, 2, 2)), stride=2)
    array([[[[1., 1., 2., 2.],
             [1., 1., 2., 2.],
             [3., 3., 4., 4.],
             [3., 3., 4., 4.]]]])
    """
    return _conv(
        described_transpose,
        "conv_transpose2d",
        2,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def conv_transpose3d(
    x: Any,
    w: Any,
    /,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    layout: str = "NCDHW",
    dtype: Any = None,
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    out: Any = None,
) -> Any:
    """3-D transposed convolution: the adjoint of `conv3d`.

    x is (N, C, D, H, W) or (C, D, H, W), with ``layout="NDHWC"`` (N, D, H, W, C); w is
    (C, K/groups, T, R, S); the result (N, K, Z, P, Q), or as `layout` writes it. Everything else is
    as in `conv_transpose2d`, with three axes.

    Examples
    --------
    >>> import numpy as np, gpuconv
    >>> x = np.ones((1, 2, 3, 4, 5), np.float32)
    >>> gpuconv.conv_transpose3d(x, np.ones((2, 4, 2, 2, 2), np.float32), stride=2).shape
    (1, 4, 6, 8, 10)
    """
    return _conv(
        described_transpose,
        "conv_transpose3d",
        3,
        x,
        w,
        bias,
        out,
        algorithm,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        layout=layout,
        dtype=dtype,
        precision=precision,
        workspace_limit=workspace_limit,
    )


def plan_conv1d(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    /,
    *,
    dtype: Any = "float32",
    bias: bool = False,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    backend: str | None = None,
    operation: Operation = "fprop",
) -> Plan:
    """The plan of a ``conv1d``; its parameters and result are those of `plan_conv2d`.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.plan_conv1d((8, 4, 100), (16, 4, 3), padding=1).flops
    307200
    """
    return _plan(
        "plan_conv1d",
        1,
        x_shape,
        w_shape,
        dtype,
        bias,
        algorithm,
        backend,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        precision=precision,
        workspace_limit=workspace_limit,
        operation=operation,
    )


def plan_conv2d(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    /,
    *,
    dtype: Any = "float32",
    bias: bool = False,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCHW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    backend: str | None = None,
    operation: Operation = "fprop",
) -> Plan:
    """The plan of a ``conv2d``: made from shapes alone, inspected, run many times.

    Parameters
    ----------
    x_shape, w_shape : sequences of int
        As the x and w of `conv2d`.
    dtype : dtype of x and w, or the pair (x's, w's), or the triple (x's, w's, the result's)
    bias : bool
        Whether the plan is called with a bias, of the result's dtype.
    stride, padding, dilation, groups, padding_mode, layout, precision, algorithm, workspace_limit
        As in `conv2d`.
    backend : "numpy", "cuda" or None
        None: that of the surrounding ``use_backend``, or else ``default_backend()``.
    operation : "fprop", "dgrad" or "wgrad"
        The convolution; the gradient of x, as ``gpuconv.grad.conv2d_input`` computes it; or that of
        w, as ``gpuconv.grad.conv2d_weight`` does. The shapes are the convolution's in each case,
        `dtype` that of the two arrays that are read.

    Returns
    -------
    gpuconv.Plan
        ``plan(x, w, bias=None, out=None)`` runs it, for any batch; ``print(plan)`` explains it.
        A dgrad is called ``plan(grad_output, w)``, a wgrad ``plan(x, grad_output)``. It has
        ``algorithm``, ``candidates``, ``workspace_bytes``, ``flops`` and ``bytes_moved``.

    Raises
    ------
    ValueError, TypeError
        As `conv2d`.
    gpuconv.BackendError
        `backend` cannot run here.

    Examples
    --------
    >>> import numpy as np, gpuconv
    >>> plan = gpuconv.plan_conv2d((8, 3, 32, 32), (16, 3, 3, 3), padding=1, backend="numpy")
    >>> plan.flops
    7077888
    >>> x, w = np.ones((8, 3, 32, 32), np.float32), np.ones((16, 3, 3, 3), np.float32)
    >>> plan(x, w).shape
    (8, 16, 32, 32)
    """
    return _plan(
        "plan_conv2d",
        2,
        x_shape,
        w_shape,
        dtype,
        bias,
        algorithm,
        backend,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        precision=precision,
        workspace_limit=workspace_limit,
        operation=operation,
    )


def plan_conv3d(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    /,
    *,
    dtype: Any = "float32",
    bias: bool = False,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCDHW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
    backend: str | None = None,
    operation: Operation = "fprop",
) -> Plan:
    """The plan of a ``conv3d``; its parameters and result are those of `plan_conv2d`.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.plan_conv3d((1, 2, 5, 6, 7), (4, 2, 3, 3, 3), padding=1).flops
    90720
    """
    return _plan(
        "plan_conv3d",
        3,
        x_shape,
        w_shape,
        dtype,
        bias,
        algorithm,
        backend,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        layout=layout,
        precision=precision,
        workspace_limit=workspace_limit,
        operation=operation,
    )


def conv_output_shape(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    /,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    layout: str | None = None,
) -> tuple[int, ...]:
    """The shape of what conv1d, conv2d or conv3d would return.

    Along each axis ``out = (in + pad_lo + pad_hi - dilation*(filter-1) - 1) // stride + 1``.

    Parameters
    ----------
    x_shape, w_shape : sequences of int
        As x and w of the convolution that w_shape's length names: (K, C/groups, S) is 1-D, with R
        2-D, with T 3-D.
    stride, padding, dilation, groups, layout
        As in `conv2d`; no layout means the channels-first one.

    Raises
    ------
    ValueError
        As the convolution itself would.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.conv_output_shape((32, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    (32, 64, 112, 112)
    """
    function = "conv_output_shape"
    x_shape = as_shape(function, "x_shape", x_shape)
    w_shape = as_shape(function, "w_shape", w_shape)
    ndim = len(w_shape) - 2
    if ndim not in LAYOUTS:
        raise ValueError(
            f"{function}: w_shape {w_shape} is {len(w_shape)}-D; it takes (K, C/groups, S), "
            f"(K, C/groups, R, S) or (K, C/groups, T, R, S)"
        )
    problem = described(
        function,
        ndim,
        x_shape,
        w_shape,
        "float32",
        "float32",
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        layout=layout,
    )
    return as_layout_shape(problem.y_shape, problem.layout.endswith("C"), problem.batched)


_EXTENTS = ("stride", "padding", "output_padding", "dilation")
_INTEGERS = (int, type(None))
_calls = Calls(1024)


def _key(
    function: str,
    shape: tuple[int, ...],
    x: Any,
    w: Any,
    bias: Any,
    out: Any,
    algorithm: str,
    options: dict[str, Any],
) -> Any:
    """All that decides how a call goes; None where that shows only at a closer look."""
    arrays = signature(x, w, bias, out)
    if arrays is None:
        return None
    freeze_extents(function, options)
    # 1 == 1.0 == True, which the checks tell apart.
    if type(options["groups"]) is not int or type(options["workspace_limit"]) not in _INTEGERS:
        return None
    if not _integers(shape):
        return None
    return (function, shape, algorithm, tuning.state(), *options.values(), arrays)


def _conv(
    describe: Callable[..., ConvProblem],
    function: str,
    ndim: int,
    x: Any,
    w: Any,
    bias: Any,
    out: Any,
    algorithm: str,
    **options: Any,
) -> Any:
    def problem(operands: Operands) -> ConvProblem:
        return describe(
            function,
            ndim,
            operands.x.shape,
            operands.w.shape,
            operands.x.dtype,
            operands.w.dtype,
            bias=None if operands.bias is None else operands.bias.dtype,
            channels_last=operands.memory_order(ndim, options["layout"]),
            **options,
        )

    return run(problem, function, x, w, bias, out, algorithm, options)


def run(
    problem: Callable[[Operands], ConvProblem],
    function: str,
    x: Any,
    w: Any,
    bias: Any,
    out: Any,
    algorithm: str,
    options: dict[str, Any],
    *,
    shape: tuple[int, ...] = (),
    names: tuple[str, str, str] = ("x", "w", "out"),
) -> Any:
    """Describe, plan and compute; or only compute, where a call with such arguments went before.

    `problem` describes the operands; with them, `function`, `options` and `shape` (the shape that
    a caller gives in place of an array) decide what it says.
    """
    key = _key(function, shape, x, w, bias, out, algorithm, options)
    try:
        call = _calls.get(key)
    except TypeError:  # an option without a hash: the checks below say what is wrong with it
        key = call = None
    if call is not None:
        return call(x, w, bias, out)
    operands = Operands(function, x=x, w=w, bias=bias, out=out, names=names)
    described = problem(operands)
    check_algorithm(function, algorithm)
    plan = choose(function, described, operands.backend, operands.device, algorithm, tuning.state())
    return operands.run(plan, _calls, key)


def _plan(
    function: str,
    ndim: int,
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    dtype: Any,
    bias: bool,
    algorithm: str,
    backend: str | None,
    **options: Any,
) -> Plan:
    dtypes = tuple(dtype) if isinstance(dtype, (tuple, list)) else (dtype, dtype)
    if len(dtypes) not in (2, 3):
        raise ValueError(
            f"{function}: dtype is one dtype, the pair (x's, w's), or the triple (x's, w's, the "
            f"result's); got {dtype!r}"
        )
    if not isinstance(bias, (int, np.bool_, NoneType)):
        raise TypeError(
            f"{function}: bias says whether there will be one, True or False; "
            f"got {bias!r} ({type(bias).__name__})"
        )
    if bias and options["operation"] != "fprop":
        raise ValueError(
            f"{function}: operation={options['operation']!r} takes no bias; its gradient is "
            f"gpuconv.grad.conv{ndim}d_bias"
        )
    problem = described(
        function,
        ndim,
        as_shape(function, "x_shape", x_shape),
        as_shape(function, "w_shape", w_shape),
        *dtypes[:2],
        dtype=dtypes[2] if len(dtypes) == 3 else None,
        bias=True if bias else None,
        **options,
    )
    if backend is None:
        name = backends.current_backend()
    else:
        name = backends.check_backend(function, backend)
    device = backends.backend(name).device()
    check_algorithm(function, algorithm)
    return choose(function, problem, name, device, algorithm, tuning.state())


def freeze_extents(function: str, options: dict[str, Any]) -> None:
    """Make every extent among the options an int or tuples of them, in place."""
    for name in _EXTENTS:
        value = options.get(name, 1)
        if type(value) is not int:
            options[name] = freeze(function, name, value)


def _remembered(describe: Callable[..., ConvProblem]) -> Callable[..., ConvProblem]:
    """`describe`, once for all calls with the same arguments."""
    once = lru_cache(maxsize=4096, typed=True)(describe)

    def described(
        function: str,
        ndim: int,
        x_shape: tuple[int, ...],
        w_shape: tuple[int, ...],
        *dtypes: Any,
        **options: Any,
    ) -> ConvProblem:
        freeze_extents(function, options)
        args = (function, ndim, x_shape, w_shape, *dtypes)
        if not _integers(x_shape) or not _integers(w_shape):
            return describe(*args, **options)
        try:
            hash((dtypes, *options.values()))
        except TypeError:  # `describe` says what is wrong with them
            return describe(*args, **options)
        return once(*args, **options)

    return described


def _integers(shape: tuple[int, ...]) -> bool:
    """Of plain ones only: (7.0, True) == (7, 1), which the checks tell apart."""
    return all(type(extent) is int for extent in shape)


described = _remembered(describe)
described_transpose = _remembered(describe_transpose)
