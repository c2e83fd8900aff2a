"""The convolutions with JAX's transformations: imported on request, ``import gpuconv.jax``.

``gpuconv.jax.conv2d`` is ``gpuconv.conv2d`` under ``jit``, ``grad``, ``jvp`` and ``vmap``, in any
nesting. Each of convolution, input gradient and weight gradient is bilinear in two of (x, w, y),
and transposed in one of these it is another of the three. So there is one primitive, which computes
any of them by a callback: JAX's derivatives of every order and mode follow from its transposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax  # the library: imports are absolute, this module is gpuconv.jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import gpuconv
from gpuconv import backends, grad
from gpuconv.conv import Padding, described, freeze_extents
from gpuconv.execute import as_layout_shape
from gpuconv.plan import check_algorithm, choose
from gpuconv.problem import Operation

__all__ = ["conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class _Convolution:
    """What all three products of one call share; hashable, as jit wants it. x and y have an N."""

    ndim: int
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    algorithm: str  # of the convolution itself
    backend: str | None  # a callback may run in a thread without the caller's use_backend
    options: tuple[tuple[str, Any], ...]

    def compute(self, operation: Operation, a: Any, b: Any) -> Any:
        name, options = f"conv{self.ndim}d", dict(self.options)
        a, b = np.asarray(a), np.asarray(b)
        with gpuconv.use_backend(self.backend) if self.backend else nullcontext():
            if operation == "fprop":
                return getattr(gpuconv, name)(a, b, algorithm=self.algorithm, **options)
            if operation == "dgrad":
                return grad.input_product(name, self.ndim, self.x_shape, a, b, **options)
            return grad.weight_product(name, self.ndim, self.w_shape, a, b, **options)

    def shape(self, operation: Operation) -> tuple[int, ...]:
        return {"fprop": self.y_shape, "dgrad": self.x_shape, "wgrad": self.w_shape}[operation]

    def with_batch(self, batch: int) -> _Convolution:
        x_shape, y_shape = ((batch, *shape[1:]) for shape in (self.x_shape, self.y_shape))
        return replace(self, x_shape=x_shape, y_shape=y_shape)


_primitive = Primitive("gpuconv")


def _product(of: _Convolution, operation: Operation, a: Any, b: Any) -> Any:
    """One of the three bilinear maps."""
    return _primitive.bind(a, b, of=of, operation=operation)


def _call(a: Any, b: Any, *, of: _Convolution, operation: Operation) -> Any:
    result = jax.ShapeDtypeStruct(of.shape(operation), a.dtype)
    return jax.pure_callback(partial(of.compute, operation), result, a, b)


def _abstract(a: Any, b: Any, *, of: _Convolution, operation: Operation) -> Any:
    return jax.core.ShapedArray(of.shape(operation), a.dtype)


def _transposed_in_a(g: Any, _: Any, b: Any, *, of: _Convolution, operation: Operation) -> Any:
    if operation == "fprop":  # a: x, b: w, g: y's
        return _product(of, "dgrad", g, b)
    if operation == "dgrad":  # a: y's, b: w, g: x's
        return _product(of, "fprop", g, b)
    return _product(of, "dgrad", b, g)  # a: x, b: y's, g: w's


def _transposed_in_b(g: Any, a: Any, _: Any, *, of: _Convolution, operation: Operation) -> Any:
    if operation == "fprop":
        return _product(of, "wgrad", a, g)
    if operation == "dgrad":
        return _product(of, "wgrad", g, a)
    return _product(of, "fprop", a, g)


def _batched(
    operands: tuple[Any, Any], axes: tuple[Any, Any], *, of: _Convolution, operation: Operation
) -> tuple[Any, int]:
    """Images under one filter are a larger batch; else one product after the other."""
    moved = [
        array if axis is None else jax.numpy.moveaxis(array, axis, 0)
        for array, axis in zip(operands, axes, strict=True)
    ]
    if axes[1] is None and operation != "wgrad":
        a, b = moved
        count, batch = a.shape[:2]
        whole = of.with_batch(count * batch)
        result = _product(whole, operation, a.reshape(count * batch, *a.shape[2:]), b)
        return result.reshape(count, batch, *result.shape[1:]), 0

    def one(mapped: list[Any]) -> Any:
        rest = iter(mapped)
        pair = (
            array if axis is None else next(rest)
            for array, axis in zip(operands, axes, strict=True)
        )
        return _product(of, operation, *pair)

    mapped = [array for array, axis in zip(moved, axes, strict=True) if axis is not None]
    return jax.lax.map(one, mapped), 0


_primitive.def_impl(_call)
_primitive.def_abstract_eval(_abstract)
mlir.register_lowering(_primitive, mlir.lower_fun(_call, multiple_results=False))
ad.defbilinear(_primitive, _transposed_in_a, _transposed_in_b)
batching.primitive_batchers[_primitive] = _batched


def _conv(ndim: int, x: Any, w: Any, bias: Any, algorithm: str, options: dict[str, Any]) -> Any:
    function = f"gpuconv.jax.conv{ndim}d"
    x, w = jax.numpy.asarray(x), jax.numpy.asarray(w)
    if x.dtype != w.dtype:
        raise TypeError(f"{function}: w is {w.dtype} but x is {x.dtype}; bring them to one dtype")
    freeze_extents(function, options)
    problem = described(function, ndim, x.shape, w.shape, x.dtype, w.dtype, **options)
    if problem.y_dtype.name != str(x.dtype):
        raise TypeError(f"{function}: x is {x.dtype}; it takes floating and complex arrays")
    last = problem.layout.endswith("C")
    of = _Convolution(
        ndim,
        as_layout_shape(problem.x_shape, last, batched=True),
        tuple(w.shape),
        as_layout_shape(problem.y_shape, last, batched=True),
        algorithm,
        backends.forced_backend(),
        tuple(options.items()),
    )
    check_algorithm(function, algorithm)
    name = backends.forced_backend() or "numpy"  # a callback is given host arrays
    choose(function, problem, name, backends.backend(name).device(), algorithm)
    y = _product(of, "fprop", x.reshape(of.x_shape), w)
    if not problem.batched:
        y = y[0]
    if bias is None:
        return y
    bias = jax.numpy.asarray(bias)
    if bias.dtype != x.dtype:
        raise TypeError(
            f"{function}: bias is {bias.dtype} but x is {x.dtype}; bring them to one dtype"
        )
    if tuple(bias.shape) != tuple(w.shape[:1]):
        raise ValueError(
            f"{function}: bias has shape {tuple(bias.shape)}; it takes {tuple(w.shape[:1])}"
        )
    return y + (bias if last else bias.reshape(-1, *[1] * ndim))


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
    """1-D convolution of JAX arrays with gradients: `conv2d` with one axis.

    x is (N, C, W) or (C, W), or as `layout` writes it; w is (K, C/groups, S).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, gpuconv.jax
    >>> w = jnp.ones((1, 1, 2))
    >>> jax.grad(lambda x: gpuconv.jax.conv1d(x, w).sum())(jnp.ones((1, 1, 4)))
    Array([[[1., 2., 2., 1.]]], dtype=float32)
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
    """2-D convolution of JAX arrays with gradients: `gpuconv.conv2d` under jit, grad, jvp and vmap.

    Parameters
    ----------
    x : jax.Array, (N, C, H, W) or (C, H, W)
    w : jax.Array, (K, C/groups, R, S)
    bias : jax.Array, (K,), optional
        All of one dtype.
    stride, padding, dilation, groups, padding_mode, layout, precision, workspace_limit
        As in `gpuconv.conv2d`; they hold for the gradients, too.
    algorithm : str
        The convolution's own; each gradient takes its fastest.

    Returns
    -------
    jax.Array, (N, K, P, Q), or as `layout` writes it
        Differentiable by x, w and bias, any number of times, backward and forward.

    Raises
    ------
    TypeError
        Arrays of different dtypes.
    ValueError, gpuconv.BackendError
        As `gpuconv.conv2d`, while the function is traced.

    Notes
    -----
    The arrays reach gpuconv by ``jax.pure_callback``, in host memory: on the backend "numpy", or
    that of the ``gpuconv.use_backend`` that surrounds the tracing. Padding and layouts are
    gpuconv's; ``jax.lax.conv_general_dilated`` has other words for them. ``jax.vmap`` over x makes
    one larger batch; over w, or of weight gradients, one call follows the other.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, gpuconv.jax
    >>> x, w = jnp.ones((1, 1, 3, 3)), jnp.ones((1, 1, 2, 2))
    >>> jax.jit(jax.grad(lambda w: gpuconv.jax.conv2d(x, w).sum()))(w)
    Array([[[[4., 4.],
             [4., 4.]]]], dtype=float32)
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
    """3-D convolution of JAX arrays with gradients: `conv2d` with three axes.

    x is (N, C, D, H, W) or (C, D, H, W), or as `layout` writes it; w is (K, C/groups, T, R, S).

    Examples
    --------
    >>> import jax.numpy as jnp, gpuconv.jax
    >>> gpuconv.jax.conv3d(jnp.ones((1, 1, 2, 2, 2)), jnp.ones((4, 1, 1, 1, 1))).shape
    (1, 4, 2, 2, 2)
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
