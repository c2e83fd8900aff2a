"""gpuconv.torch and gpuconv.jax: gradients through the libraries' own machinery."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import gpuconv
from gpuconv.testing import random_array, random_case

CASES = [
    (1, (2, 3, 9), (4, 3, 3), {"stride": 2, "padding": 1, "padding_mode": "reflect"}),
    (2, (2, 4, 5, 6), (4, 2, 3, 2), {"groups": 2, "padding": ((1, 2), (0, 1))}),
    (2, (3, 5, 4), (2, 3, 2, 2), {"stride": (2, 1), "padding": "same"}),
    (2, (2, 5, 4, 3), (6, 1, 3, 3), {"groups": 3, "padding": 1, "layout": "NHWC",
                                     "padding_mode": "circular"}),
    (3, (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {"dilation": (1, 2, 1), "padding": 1,
                                           "padding_mode": "symmetric"}),
]  # fmt: skip


def data(*shape, dtype="float64", seed=0):
    return random_array(np.random.default_rng(seed), shape, dtype)


@pytest.mark.parametrize(("ndim", "x_shape", "w_shape", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_torch_gradcheck(ndim, x_shape, w_shape, options, dtype):
    torch = pytest.importorskip("torch")
    bridge = importlib.import_module("gpuconv.torch")
    conv = getattr(bridge, f"conv{ndim}d")
    x, w, b = (
        torch.from_numpy(data(*shape, dtype=dtype)).requires_grad_()
        for shape in (x_shape, w_shape, w_shape[:1])
    )

    def function(x, w, b):
        return conv(x, w, b, **options)

    plain = getattr(gpuconv, f"conv{ndim}d")(*(t.detach() for t in (x, w, b)), **options)
    assert torch.equal(function(x, w, b), plain)
    assert torch.autograd.gradcheck(function, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@pytest.mark.parametrize(("ndim", "x_shape", "w_shape", "options"), CASES)
def test_torch_forward_mode(ndim, x_shape, w_shape, options):
    torch = pytest.importorskip("torch")
    conv = getattr(importlib.import_module("gpuconv.torch"), f"conv{ndim}d")
    x, w, b = (
        torch.from_numpy(data(*shape)).requires_grad_() for shape in (x_shape, w_shape, w_shape[:1])
    )
    check = torch.autograd.gradcheck
    assert check(lambda *a: conv(*a, **options), (x, w, b), check_forward_ad=True, fast_mode=True)
    assert check(
        lambda b: conv(x.detach(), w.detach(), b, **options),
        (b,),
        check_forward_ad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(
        lambda *a: conv(*a, **options), (x, w, b), check_fwd_over_rev=True, fast_mode=True
    )


def test_torch_func():
    torch = pytest.importorskip("torch")
    ours, theirs = importlib.import_module("gpuconv.torch").conv2d, torch.nn.functional.conv2d
    func = torch.func
    x, w = torch.from_numpy(data(3, 2, 5, 5)), torch.from_numpy(data(4, 2, 3, 3, seed=1))

    def loss(conv):
        return lambda w, x: conv(x, w, padding=1).square().sum()

    close = torch.testing.assert_close
    close(func.vmap(lambda x: ours(x, w))(x), theirs(x, w))
    close(func.vmap(ours, in_dims=(None, 1))(x, w[:, None])[0], theirs(x, w))
    samples = [func.vmap(func.grad(loss(f)), in_dims=(None, 0))(w, x) for f in (ours, theirs)]
    close(*samples)
    close(*(func.hessian(loss(f))(w[:1], x[:1]) for f in (ours, theirs)))


def test_torch_trains_as_torch_does():
    torch = pytest.importorskip("torch")
    import gpuconv.torch as bridge

    x, w = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double()
    results = []
    for conv in (bridge.conv2d, torch.nn.functional.conv2d):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        conv(a, b, bias, stride=2, padding=1).relu().pow(2).sum().backward()
        results.append((a.grad, b.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    half = bridge.conv2d(x.bfloat16(), w.bfloat16().requires_grad_())
    half.sum().backward()
    with torch.no_grad():
        assert not bridge.conv2d(x, w.requires_grad_()).requires_grad


def test_torch_errors():
    torch = pytest.importorskip("torch")
    import gpuconv.torch as bridge

    x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
    with pytest.raises(TypeError, match=r"gpuconv.torch.conv2d: w is a ndarray; it takes a torch"):
        bridge.conv2d(x, w.numpy())
    with pytest.raises(TypeError, match=r"w is torch.float64 but x is torch.float32"):
        bridge.conv2d(x, w.double())
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); it takes \(1,\)"):
        bridge.conv2d(x, w, torch.ones(3))
    with pytest.raises(ValueError, match="conv2d: x has 1 channels but w"):
        bridge.conv2d(x, torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize(("ndim", "x_shape", "w_shape", "options"), CASES)
def test_jax_gradients(ndim, x_shape, w_shape, options):
    jax = pytest.importorskip("jax")
    import gpuconv.jax as bridge

    conv = getattr(bridge, f"conv{ndim}d")
    x, w, b = (data(*s, dtype="float32") for s in (x_shape, w_shape, w_shape[:1]))
    plain = getattr(gpuconv, f"conv{ndim}d")(x, w, **options)
    np.testing.assert_array_equal(jax.jit(lambda *a: conv(*a, **options))(x, w), plain)

    def loss(x, w, b):
        return jax.numpy.sin(conv(x, w, b, **options)).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, b)
    last = options.get("layout", "").endswith("C")
    bias = b if last else b.reshape(-1, *[1] * ndim)
    dy = np.cos(plain + bias)
    module = gpuconv.grad
    expected = (
        getattr(module, f"conv{ndim}d_input")(x.shape, w, dy, **options),
        getattr(module, f"conv{ndim}d_weight")(x, w.shape, dy, **options),
        getattr(module, f"conv{ndim}d_bias")(
            dy, **({"layout": options["layout"]} if "layout" in options else {})
        ),
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)

    # A Hessian-vector product: the gradients are differentiable themselves.
    def along(v):
        return jax.grad(lambda w: (jax.grad(loss, argnums=1)(x, w, b) * v).sum())(w)

    v = data(*w_shape, dtype="float32", seed=1)
    h = 1e-2
    steps = [jax.grad(loss, argnums=1)(x, w + s * h * v, b) for s in (1, -1)]
    np.testing.assert_allclose(along(v), (steps[0] - steps[1]) / (2 * h), rtol=0.05, atol=0.5)


def by_lax(jax, x, w):
    """``conv2d(x, w, stride=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2), groups=2)``."""
    return jax.lax.conv_general_dilated(
        x, w, (2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2), feature_group_count=2
    )


@pytest.mark.parametrize("transform", ["as written", "jit"])
def test_jax_transformations_follow_lax(transform):
    jax = pytest.importorskip("jax")
    import gpuconv.jax as bridge

    def close(ours, theirs):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            assert isinstance(a, jax.Array)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    def conv(x, w):
        options = {"stride": (2, 1), "padding": ((1, 0), (0, 2)), "dilation": (1, 2), "groups": 2}
        return bridge.conv2d(x, w, **options)

    ours, theirs = jax.jit(conv) if transform == "jit" else conv, partial(by_lax, jax)
    shapes = (2, 2, 4, 4), (2, 1, 2, 2)
    x, w = (data(*s, dtype="float32", seed=i) for i, s in enumerate(shapes))
    to_x, to_w = (data(*s, dtype="float32", seed=5 + i) for i, s in enumerate(shapes))
    close(jax.jvp(ours, (x, w), (to_x, to_w)), jax.jvp(theirs, (x, w), (to_x, to_w)))
    close(*(jax.linearize(f, x, w)[1](to_x, to_w) for f in (ours, theirs)))
    dy = data(*theirs(x, w).shape, dtype="float32", seed=9)
    close(*(jax.linear_transpose(lambda x, f=f: f(x, w), x)(dy) for f in (ours, theirs)))

    xs, ws = np.stack([x, to_x, x]), np.stack([w, to_w, to_w])
    close(*(jax.vmap(f, (1, None))(np.moveaxis(xs, 0, 1), w) for f in (ours, theirs)))
    close(*(jax.vmap(f, (None, 0))(x, ws) for f in (ours, theirs)))
    close(*(jax.vmap(f, (0, 4), 2)(xs, np.moveaxis(ws, 0, 4)) for f in (ours, theirs)))

    losses = [lambda x, w, f=f: jax.numpy.sin(f(x, w)).sum() for f in (ours, theirs)]
    close(*(jax.vmap(jax.grad(f, (0, 1)))(xs, ws) for f in losses))
    close(*(jax.hessian(f, 1)(x, w) for f in losses))
    close(*(jax.jacrev(jax.grad(f), 1)(x, w) for f in losses))
    close(*(jax.jacfwd(jax.checkpoint(f), (0, 1))(x, w) for f in losses))


def test_jax_vmap_of_images_is_a_batch(monkeypatch):
    jax = pytest.importorskip("jax")
    import gpuconv.jax as bridge

    shapes = []
    conv = gpuconv.conv2d
    monkeypatch.setattr(gpuconv, "conv2d", lambda x, w, **o: shapes.append(x.shape) or conv(x, w))
    x, w = (data(*s, dtype="float32") for s in ((5, 3, 2, 6, 6), (4, 2, 3, 3)))
    y = jax.vmap(jax.vmap(lambda x: bridge.conv2d(x, w)))(x)
    np.testing.assert_array_equal(y, conv(x.reshape(15, 2, 6, 6), w).reshape(5, 3, 4, 4, 4))
    assert shapes == [(15, 2, 6, 6)]
    assert jax.vmap(lambda x: bridge.conv2d(x, w))(x[:0]).shape == (0, 3, 4, 4, 4)


def test_jax_complex_gradients_follow_jax():
    jax = pytest.importorskip("jax")
    import gpuconv.jax as bridge

    x, w = (data(*s, dtype="complex64") for s in ((1, 2, 6), (3, 2, 3)))

    def ours(w):
        return (abs(bridge.conv1d(x, w)) ** 2).sum()

    def theirs(w):
        y = jax.lax.conv_general_dilated(x, w, (1,), "VALID")
        return (abs(y) ** 2).sum()

    np.testing.assert_allclose(jax.grad(ours)(w), jax.grad(theirs)(w), rtol=1e-4, atol=1e-4)


def test_jax_errors_and_backends():
    jax = pytest.importorskip("jax")
    import gpuconv.jax as bridge

    x, w = (data(*s, dtype="float32") for s in ((1, 2, 6), (3, 2, 3)))
    with pytest.raises(TypeError, match=r"gpuconv.jax.conv1d: w is float16 but x is float32"):
        bridge.conv1d(x, w.astype("float16"))
    with pytest.raises(TypeError, match="it takes floating and complex arrays"):
        bridge.conv1d(x.astype(int), w.astype(int))
    with pytest.raises(ValueError, match=r"gpuconv.jax.conv1d: x has 2 channels but w"):
        bridge.conv1d(x, w[:, :1])
    with pytest.raises(ValueError, match="bias has shape"):
        bridge.conv1d(x, w, x)
    with pytest.raises(TypeError, match=r"gpuconv.jax.conv1d: bias is int32 but x is float32"):
        bridge.conv1d(x, w, [1, 2, 3])
    with pytest.raises(ValueError, match=r"gpuconv.jax.conv1d: algorithm is 'auto' or"):
        bridge.conv1d(x, w, algorithm="fastest")
    with gpuconv.use_backend("numpy"):
        np.testing.assert_array_equal(bridge.conv1d(x, w), gpuconv.conv1d(x, w))
    batched = jax.vmap(lambda x: bridge.conv1d(x, w))(np.stack([x, x]))
    np.testing.assert_array_equal(batched[1], gpuconv.conv1d(x, w))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_examples_run(name):
    pytest.importorskip(name)
    module = importlib.import_module(f"gpuconv.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_bridges_are_imported_on_request_alone():
    code = "import gpuconv, sys; assert not {'torch', 'jax', 'gpuconv.torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_cases_through_torch():
    torch = pytest.importorskip("torch")
    bridge = importlib.import_module("gpuconv.torch")
    for seed in range(25):
        case = random_case(seed, dtypes=("float64",), mixed_dtypes=False, largest=5, channels=3)
        x, w, _ = case.arrays()
        options = {k: v for k, v in case.options if k != "dtype"}
        conv = getattr(bridge, case.function)
        a, b = (torch.from_numpy(np.ascontiguousarray(t)).requires_grad_() for t in (x, w))
        assert torch.autograd.gradcheck(
            lambda a, b, conv=conv, options=options: conv(a, b, **options), (a, b), fast_mode=True
        )
