"""The convolutions with torch's autograd: imported on request, ``import gpuconv.torch``.

``gpuconv.torch.conv2d`` is ``gpuconv.conv2d`` for tensors that require gradients, on CPU and CUDA,
differentiable any number of times, backward and forward, and under ``torch.func``: each of
convolution, input gradient and weight gradient is bilinear in two of (x, w, y), and its derivatives
are the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch  # the library: imports are absolute, this module is gpuconv.torch

import gpuconv
from gpuconv import grad
from gpuconv.conv import Padding
from gpuconv.problem import Operation

__all__ = ["conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class _Convolution:
    """What all three products of one call share."""

    ndim: int
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    algorithm: str  # of the convolution itself
    options: dict[str, Any]

    def compute(self, operation: Operation, a: Any, b: Any, bias: Any) -> Any:
        name = f"conv{self.ndim}d"
        if operation == "fprop":
            function = getattr(gpuconv, name)
            return function(a, b, bias, algorithm=self.algorithm, **self.options)
        if operation == "dgrad":
            return grad.input_product(name, self.ndim, self.x_shape, a, b, **self.options)
        return grad.weight_product(name, self.ndim, self.w_shape, a, b, **self.options)


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """One of the three bilinear maps; no factor is conjugated but where a derivative asks."""

    @staticmethod
    def forward(of: _Convolution, operation: Operation, a: Any, b: Any, bias: Any) -> Any:
        return of.compute(operation, a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.of, ctx.operation, a, b, _ = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.y_shape = tuple(output.shape)

    @staticmethod
    def jvp(ctx: Any, _of: Any, _operation: Any, to_a: Any, to_b: Any, to_bias: Any) -> Any:
        a, b = ctx.saved_tensors
        parts = []
        if to_a is not None:
            parts.append(_product(ctx.of, ctx.operation, to_a, b))
        if to_b is not None:
            parts.append(_product(ctx.of, ctx.operation, a, to_b))
        if to_bias is not None:
            shape = [1] * len(ctx.y_shape)
            shape[_channel_axis(ctx.of, len(shape))] = -1
            parts.append(to_bias.reshape(shape).expand(ctx.y_shape).clone())
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        results = [
            _Product.apply(
                *(
                    argument if dim is None else argument.select(dim, i)
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        of, to_a, to_b = ctx.of, None, None
        _, _, need_a, need_b, need_bias = ctx.needs_input_grad
        if ctx.operation == "fprop":  # a: x, b: w, g: y's
            to_a = _product(of, "dgrad", g, b.conj()) if need_a else None
            to_b = _product(of, "wgrad", a.conj(), g) if need_b else None
        elif ctx.operation == "dgrad":  # a: y's, b: w, g: x's
            to_a = _product(of, "fprop", g, b.conj()) if need_a else None
            to_b = _product(of, "wgrad", g, a.conj()) if need_b else None
        else:  # a: x, b: y's, g: w's
            to_a = _product(of, "dgrad", b.conj(), g) if need_a else None
            to_b = _product(of, "fprop", a.conj(), g) if need_b else None
        to_bias = _channel_sums(of, g) if need_bias else None
        return None, None, to_a, to_b, to_bias


def _product(of: _Convolution, operation: Operation, a: Any, b: Any) -> Any:
    return _Product.apply(of, operation, a, b, None)


def _channel_sums(of: _Convolution, g: Any) -> Any:
    channel = _channel_axis(of, g.ndim)
    return g.sum([axis for axis in range(g.ndim) if axis != channel])


def _channel_axis(of: _Convolution, ndim: int) -> int:
    return ndim - 1 if str(of.options["layout"]).endswith("C") else ndim - of.ndim - 1


def _conv(ndim: int, x: Any, w: Any, bias: Any, algorithm: str, options: dict[str, Any]) -> Any:
    for name, array in (("x", x), ("w", w), ("bias", bias)):
        if array is None and name == "bias":
            continue
        if not isinstance(array, torch.Tensor):
            raise TypeError(
                f"gpuconv.torch.conv{ndim}d: {name} is a {type(array).__name__}; it takes a "
                f"torch.Tensor (gpuconv.conv{ndim}d takes the arrays of other libraries)"
            )
        if array.dtype != x.dtype:
            raise TypeError(
                f"gpuconv.torch.conv{ndim}d: {name} is {array.dtype} but x is {x.dtype}; bring "
                f"them to one dtype"
            )
    if bias is not None and tuple(bias.shape) != tuple(w.shape[:1]):
        raise ValueError(
            f"gpuconv.torch.conv{ndim}d: bias has shape {tuple(bias.shape)}; it takes "
            f"{tuple(w.shape[:1])}"
        )
    of = _Convolution(ndim, tuple(x.shape), tuple(w.shape), algorithm, options)
    return _Product.apply(of, "fprop", x, w, bias)


def conv1d(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
) -> Any:
    """1-D convolution of torch tensors with gradients: `conv2d` with one axis.

    x is (N, C, W) or (C, W), or as `layout` writes it; w is (K, C/groups, S).

    Examples
    --------
    >>> import torch, gpuconv.torch
    >>> x = torch.ones(1, 1, 4, requires_grad=True)
    >>> gpuconv.torch.conv1d(x, torch.ones(1, 1, 2)).sum().backward()
    >>> x.grad
    tensor([[[1., 2., 2., 1.]]])
    """
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "layout": layout,
        "precision": precision,
        "workspace_limit": workspace_limit,
    }
    return _conv(1, x, w, bias, algorithm, options)


def conv2d(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCHW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
) -> Any:
    """2-D convolution of torch tensors with gradients: `gpuconv.conv2d` under autograd.

    Parameters
    ----------
    x : torch.Tensor, (N, C, H, W) or (C, H, W)
    w : torch.Tensor, (K, C/groups, R, S)
    bias : torch.Tensor, (K,), optional
        All of one dtype and device.
    stride, padding, dilation, groups, padding_mode, layout, precision, workspace_limit
        As in `gpuconv.conv2d`; they hold for the gradients, too.
    algorithm : str
        The convolution's own; each gradient takes its fastest.

    Returns
    -------
    torch.Tensor, (N, K, P, Q), or as `layout` writes it
        Differentiable by x, w and bias, any number of times.

    Raises
    ------
    TypeError
        What is no tensor, or tensors of different dtypes or devices.
    ValueError, gpuconv.BackendError
        As `gpuconv.conv2d`.

    Notes
    -----
    The arguments follow ``torch.nn.functional.conv2d``; gradients are those of gpuconv.grad, the
    same bits at every call. ``torch.compile`` cannot look inside: in what it compiles, call
    ``torch.compiler.disable(gpuconv.torch.conv2d)``.

    Examples
    --------
    >>> import torch, gpuconv.torch
    >>> x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2, requires_grad=True)
    >>> gpuconv.torch.conv2d(x, w, padding=1, padding_mode="replicate").sum().backward()
    >>> w.grad
    tensor([[[[16., 16.],
              [16., 16.]]]])
    """
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "layout": layout,
        "precision": precision,
        "workspace_limit": workspace_limit,
    }
    return _conv(2, x, w, bias, algorithm, options)


def conv3d(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    layout: str = "NCDHW",
    precision: str = "ieee",
    algorithm: str = "auto",
    workspace_limit: int | None = None,
) -> Any:
    """3-D convolution of torch tensors with gradients: `conv2d` with three axes.

    x is (N, C, D, H, W) or (C, D, H, W), or as `layout` writes it; w is (K, C/groups, T, R, S).

    Examples
    --------
    >>> import torch, gpuconv.torch
    >>> w = torch.ones(1, 1, 1, 1, 1, requires_grad=True)
    >>> gpuconv.torch.conv3d(torch.ones(1, 1, 2, 2, 2), w).sum().backward()
    >>> w.grad.item()
    8.0
    """
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "layout": layout,
        "precision": precision,
        "workspace_limit": workspace_limit,
    }
    return _conv(3, x, w, bias, algorithm, options)
