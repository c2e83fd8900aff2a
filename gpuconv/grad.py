"""Derivatives of the convolutions: what backpropagation needs, for every option that they take.

For ``y = conv2d(x, w, bias, ...)`` and a loss L, given ``grad_output`` = dL/dy:

    conv2d_input    dx[n, c, i] = sum over k, r, p  of  dy[n, k, p] conj(w[k, c, r])
    conv2d_weight   dw[k, c, r] = sum over n, p     of  dy[n, k, p] conj(x[n, c, i])
    conv2d_bias     db[k]       = sum over n, p     of  dy[n, k, p]

over all p and r with i = stride*p + dilation*r - pad. They are the exact adjoints,
<conv(x), y> = <x, input(y)> = <w, weight(x, y)>, for every stride, pad, dilation, group count,
layout, dtype and padding mode: where the convolution reads an element of x beyond the edge, its
gradient goes back to that element. Of complex arrays they are the conjugate (Wirtinger) gradients
that torch computes. Each function reads as a convolution does: describe the problem, choose a plan,
run it; every sum has a fixed order, so the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuconv import conv, dtypes
from gpuconv.conv import Padding
from gpuconv.execute import Operands
from gpuconv.problem import LAYOUTS, ConvProblem, as_shape

__all__ = [
    "conv1d_bias", "conv1d_input", "conv1d_weight",
    "conv2d_bias", "conv2d_input", "conv2d_weight",
    "conv3d_bias", "conv3d_input", "conv3d_weight",
]  # fmt: skip


def conv1d_input(
    input_shape: Sequence[int],
    w: Any,
    grad_output: Any,
    /,
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
    """The gradient of `conv1d` with respect to x: `conv2d_input` with one axis.

    input_shape is x's, (N, C, W) or as `layout` writes it; w is (K, C/groups, S).

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv1d_input((1, 1, 4), np.ones((1, 1, 3)), np.ones((1, 1, 2)))
    array([[[1., 2., 2., 1.]]])
    """
    return _input(
        "conv1d_input",
        1,
        input_shape,
        w,
        grad_output,
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


def conv1d_weight(
    x: Any,
    weight_shape: Sequence[int],
    grad_output: Any,
    /,
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
    """The gradient of `conv1d` with respect to w: `conv2d_weight` with one axis.

    x is (N, C, W) or as `layout` writes it; weight_shape is w's, (K, C/groups, S).

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv1d_weight(np.array([[[1.0, 2.0, 3.0]]]), (1, 1, 2), np.ones((1, 1, 2)))
    array([[[3., 5.]]])
    """
    return _weight(
        "conv1d_weight",
        1,
        x,
        weight_shape,
        grad_output,
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


def conv1d_bias(grad_output: Any, /, *, layout: str = "NCW", dtype: Any = None) -> Any:
    """The gradient of `conv1d` with respect to its bias: `conv2d_bias` with one axis.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv1d_bias(np.ones((2, 3, 5)))
    array([10., 10., 10.])
    """
    return _bias("conv1d_bias", 1, grad_output, layout, dtype)


def conv2d_input(
    input_shape: Sequence[int],
    w: Any,
    grad_output: Any,
    /,
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
    """The gradient of `conv2d` with respect to x (dgrad).

    dx[n, c, i] is the sum of dy[n, k, p] conj(w[k, c, r]) over all k, p, r in which the convolution
    reads x[n, c, i], beyond its edge included.

    Parameters
    ----------
    input_shape : sequence of int
        x's shape, (N, C, H, W) or (C, H, W), or as `layout` writes it.
    w : array, (K, C/groups, R, S)
    grad_output : array, (N, K, P, Q) or (K, P, Q), or as `layout` writes it
        The loss's derivative by the convolution's result.
    stride, padding, dilation, groups, padding_mode, layout
        Those of the convolution.
    dtype, precision, algorithm, workspace_limit, out
        As in `conv2d`. `dtype` left out: the type promoted from grad_output and w.

    Returns
    -------
    array of `input_shape`
        Of grad_output's library, device and memory order.

    Raises
    ------
    ValueError, TypeError, gpuconv.BackendError
        As `conv2d`.

    Notes
    -----
    The name and the order of arguments follow ``torch.nn.grad.conv2d_input``. Image n of a batch
    gets the bits that it gets alone with the same plan.

    Examples
    --------
    How often a 2x2 filter reads each pixel of a 3x3 image, and what "replicate" adds at the edge:

    >>> import numpy as np
    >>> from gpuconv import grad
    >>> w = np.ones((1, 1, 2, 2))
    >>> grad.conv2d_input((1, 1, 3, 3), w, np.ones((1, 1, 2, 2)))
    array([[[[1., 2., 1.],
             [2., 4., 2.],
             [1., 2., 1.]]]])
    >>> grad.conv2d_input((3, 3, 1), w, np.ones((4, 4, 1)), padding=1, padding_mode="replicate",
    ...                   layout="NHWC")[..., 0]
    array([[9., 6., 9.],
           [6., 4., 6.],
           [9., 6., 9.]])
    """
    return _input(
        "conv2d_input",
        2,
        input_shape,
        w,
        grad_output,
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


def conv2d_weight(
    x: Any,
    weight_shape: Sequence[int],
    grad_output: Any,
    /,
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
    """The gradient of `conv2d` with respect to w (wgrad).

    dw[k, c, r] is the sum of dy[n, k, p] conj(x[n, c, stride*p + dilation*r - pad]) over n and p.

    Parameters
    ----------
    x : array, (N, C, H, W) or (C, H, W), or as `layout` writes it
    weight_shape : sequence of int
        w's shape, (K, C/groups, R, S).
    grad_output : array, (N, K, P, Q) or (K, P, Q), or as `layout` writes it
        The loss's derivative by the convolution's result.
    stride, padding, dilation, groups, padding_mode, layout
        Those of the convolution.
    dtype, precision, algorithm, workspace_limit, out
        As in `conv2d`. `dtype` left out: the type promoted from x and grad_output.

    Returns
    -------
    array of `weight_shape`

    Raises
    ------
    ValueError, TypeError, gpuconv.BackendError
        As `conv2d`.

    Notes
    -----
    The name and the order of arguments follow ``torch.nn.grad.conv2d_weight``. The sum over batch
    and pixels has a fixed order: the same call gives the same bits.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> grad.conv2d_weight(x, (1, 1, 2, 2), np.ones((1, 1, 2, 2)))
    array([[[[ 8., 12.],
             [20., 24.]]]])
    """
    return _weight(
        "conv2d_weight",
        2,
        x,
        weight_shape,
        grad_output,
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


def conv2d_bias(grad_output: Any, /, *, layout: str = "NCHW", dtype: Any = None) -> Any:
    """The gradient of `conv2d` with respect to its bias: the sum over images and pixels.

    Parameters
    ----------
    grad_output : array, (N, K, P, Q) or (K, P, Q), or as `layout` writes it
    layout : "NCHW" or "NHWC"
    dtype : optional
        The result's type. Left out: grad_output's for floating and complex types (16-bit floats are
        summed in float32), int64 or uint64 for integers and bool.

    Returns
    -------
    array, (K,)

    Raises
    ------
    ValueError, TypeError
        As `conv2d`.

    Notes
    -----
    The third of the gradients that ``torch.nn.grad`` has two of.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv2d_bias(np.ones((8, 2, 3, 3)))
    array([72., 72.])
    """
    return _bias("conv2d_bias", 2, grad_output, layout, dtype)


def conv3d_input(
    input_shape: Sequence[int],
    w: Any,
    grad_output: Any,
    /,
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
    """The gradient of `conv3d` with respect to x: `conv2d_input` with three axes.

    input_shape is x's, (N, C, D, H, W) or as `layout` writes it; w is (K, C/groups, T, R, S).

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv3d_input((1, 1, 2, 2, 2), np.ones((3, 1, 1, 1, 1)), np.ones((1, 3, 2, 2, 2))).max()
    np.float64(3.0)
    """
    return _input(
        "conv3d_input",
        3,
        input_shape,
        w,
        grad_output,
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


def conv3d_weight(
    x: Any,
    weight_shape: Sequence[int],
    grad_output: Any,
    /,
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
    """The gradient of `conv3d` with respect to w: `conv2d_weight` with three axes.

    x is (N, C, D, H, W) or as `layout` writes it; weight_shape is w's, (K, C/groups, T, R, S).

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv3d_weight(np.ones((1, 1, 2, 2, 2)), (1, 1, 1, 1, 1), np.ones((1, 1, 2, 2, 2)))
    array([[[[[8.]]]]])
    """
    return _weight(
        "conv3d_weight",
        3,
        x,
        weight_shape,
        grad_output,
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


def conv3d_bias(grad_output: Any, /, *, layout: str = "NCDHW", dtype: Any = None) -> Any:
    """The gradient of `conv3d` with respect to its bias: `conv2d_bias` with three axes.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuconv import grad
    >>> grad.conv3d_bias(np.ones((1, 2, 3, 3, 3)))
    array([27., 27.])
    """
    return _bias("conv3d_bias", 3, grad_output, layout, dtype)


def input_product(
    name: str, ndim: int, input_shape: Sequence[int], grad_output: Any, w: Any, **options: Any
) -> Any:
    """The gradient of x without a conjugate, bilinear: what the bridges differentiate again."""
    options = {"dtype": None, "conjugate": False, **options}
    return _input(f"{name}_input", ndim, input_shape, w, grad_output, None, "auto", **options)


def weight_product(
    name: str, ndim: int, weight_shape: Sequence[int], x: Any, grad_output: Any, **options: Any
) -> Any:
    """The gradient of w without a conjugate."""
    options = {"dtype": None, "conjugate": False, **options}
    return _weight(f"{name}_weight", ndim, x, weight_shape, grad_output, None, "auto", **options)


def _input(
    function: str,
    ndim: int,
    input_shape: Sequence[int],
    w: Any,
    grad_output: Any,
    out: Any,
    algorithm: str,
    **options: Any,
) -> Any:
    shape = as_shape(function, "input_shape", input_shape)

    def problem(operands: Operands) -> ConvProblem:
        described = conv.described(
            function,
            ndim,
            shape,
            operands.w.shape,
            operands.x.dtype,
            operands.w.dtype,
            channels_last=operands.memory_order(ndim, options["layout"]),
            operation="dgrad",
            names=("input_shape", "w"),
            **options,
        )
        _same_batch(function, described, "input_shape", operands.x)
        return described

    names = "grad_output", "w", "out"
    return conv.run(
        problem, function, grad_output, w, None, out, algorithm, options, shape=shape, names=names
    )


def _weight(
    function: str,
    ndim: int,
    x: Any,
    weight_shape: Sequence[int],
    grad_output: Any,
    out: Any,
    algorithm: str,
    **options: Any,
) -> Any:
    shape = as_shape(function, "weight_shape", weight_shape)

    def problem(operands: Operands) -> ConvProblem:
        described = conv.described(
            function,
            ndim,
            operands.x.shape,
            shape,
            operands.x.dtype,
            operands.w.dtype,
            channels_last=operands.memory_order(ndim, options["layout"]),
            operation="wgrad",
            names=("x", "weight_shape"),
            **options,
        )
        _same_batch(function, described, "x", operands.w)
        return described

    names = "x", "grad_output", "out"
    return conv.run(
        problem, function, x, grad_output, None, out, algorithm, options, shape=shape, names=names
    )


def _bias(function: str, ndim: int, grad_output: Any, layout: str, dtype: Any) -> Any:
    operands = Operands(function, x=grad_output, names=("grad_output", "w", "out"))
    layouts = LAYOUTS[ndim]
    if layout not in layouts:
        raise ValueError(f"{function}: layout is one of {', '.join(layouts)}; got {layout!r}")
    grad = operands.x
    if grad.ndim not in (ndim + 1, ndim + 2):
        written = layout.translate(str.maketrans("CDHW", "KZPQ"))
        raise ValueError(
            f"{function}: grad_output has shape {tuple(grad.shape)}, {grad.ndim}-D; it takes "
            f"({', '.join(written)}), or ({', '.join(written[1:])}) for one without a batch"
        )
    try:
        own = dtypes.of(grad.dtype)
        natural = dtypes.natural_result(own, own)
        result = natural if dtype is None else dtypes.of(dtype)
    except TypeError as error:
        raise TypeError(f"{function}: {error}") from None
    if not dtypes.can_convert(natural, result):
        raise TypeError(
            f"{function}: dtype={result} cannot hold a sum of {own}; convert the result yourself"
        )
    try:
        operands.library.check_result(result)
    except TypeError as error:
        raise TypeError(f"{function}: {error}") from None
    channel = grad.ndim - 1 if layout.endswith("C") else grad.ndim - ndim - 1
    axes = tuple(axis for axis in range(grad.ndim) if axis != channel)
    wide = dtypes.sum_type(own, own, result)
    with operands.active(), np.errstate(all="ignore"):
        total = grad.sum(axis=axes, dtype=wide.numpy)
        return operands.give(total.astype(result.numpy, copy=False))


def _same_batch(function: str, problem: ConvProblem, name: str, grad: Any) -> None:
    """A plan runs for any batch; here both shapes are the caller's own, and must agree."""
    if problem.batched and grad.ndim == problem.ndim + 2 and grad.shape[0] != problem.batch:
        raise ValueError(
            f"{function}: {name} has a batch of {problem.batch} but grad_output one of "
            f"{grad.shape[0]}; they must be the same"
        )
