"""The convolutions with JAX's transformations: imported on request, ``import gpuconv.jax``.

``gpuconv.jax.conv2d`` is ``gpuconv.conv2d`` under ``jax.jit`` and ``jax.grad``: a callback with
derivatives of its own. Each of convolution, input gradient and weight gradient is bilinear in two
of (x, w, y), and its derivatives are the other two: they can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax  # the library: imports are absolute, this module is gpuconv.jax
import numpy as np

import gpuconv
from gpuconv import backends, grad
from gpuconv.conv import Padding, described, freeze_extents
from gpuconv.execute import as_layout_shape
from gpuconv.plan import check_algorithm, choose
from gpuconv.problem import Operation

__all__ = ["conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class _Convolution:
    """What all three products of one call share; hashable, as jit wants it."""

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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(of: _Convolution, operation: Operation, a: Any, b: Any) -> Any:
    """One of the three bilinear maps."""
    result = jax.ShapeDtypeStruct(of.shape(operation), a.dtype)
    callback = partial(of.compute, operation)
    return jax.pure_callback(callback, result, a, b, vmap_method="sequential")


def _forward(of: _Convolution, operation: Operation, a: Any, b: Any) -> tuple[Any, Any]:
    return _product(of, operation, a, b), (a, b)


def _backward(of: _Convolution, operation: Operation, kept: Any, g: Any) -> tuple[Any, Any]:
    a, b = kept
    if operation == "fprop":  # a: x, b: w, g: y's
        return _product(of, "dgrad", g, b), _product(of, "wgrad", a, g)
    if operation == "dgrad":  # a: y's, b: w, g: x's
        return _product(of, "fprop", g, b), _product(of, "wgrad", g, a)
    return _product(of, "dgrad", b, g), _product(of, "fprop", a, g)  # a: x, b: y's, g: w's


_product.defvjp(_forward, _backward)


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
        tuple(x.shape),
        tuple(w.shape),
        as_layout_shape(problem.y_shape, last, problem.batched),
        algorithm,
        backends.forced_backend(),
        tuple(options.items()),
    )
    check_algorithm(function, algorithm)
    name = backends.forced_backend() or "numpy"  # a callback is given host arrays
    choose(function, problem, name, backends.backend(name).device(), algorithm)
    y = _product(of, "fprop", x, w)
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
    """2-D convolution of JAX arrays with gradients: `gpuconv.conv2d` under jit, grad and vmap.

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
        Differentiable in reverse by x, w and bias, any number of times.

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
    gpuconv's; ``jax.lax.conv_general_dilated`` has other words for them.

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
