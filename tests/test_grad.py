"""Gradients and transposed convolutions: adjoint, differentiated, and as in torch and ONNX."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv import grad, testing
from gpuconv.execute import as_layout_shape
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe
from gpuconv.testing import assert_close, random_array, random_case

SEEDS = st.integers(0, 2**32)


def rand(*shape, dtype="float64", seed=0):
    return random_array(np.random.default_rng(seed), shape, dtype)


def cpu():
    return gpuconv.backends.backend("numpy").device()


def grad_output(case, dtype):
    """A random gradient of the case's result, in its layout and memory order."""
    problem = case.problem()
    last = problem.layout.endswith("C")
    shape = as_layout_shape(problem.y_shape, last, problem.batched)
    array = random_array(np.random.default_rng(case.seed + 1), shape, dtype, case.integers)
    return testing.in_memory_order(array, case.memory, -1 if last else -case.ndim - 1)


def gradient(case, operation, **changes):
    """The problem of one gradient of a random case, and its two operands."""
    x, w, _ = case.arrays()
    dy = grad_output(case, case.w_dtype if operation == "dgrad" else case.x_dtype)
    first, second = (dy, w) if operation == "dgrad" else (x, dy)
    options = {k: v for k, v in case.options if k != "dtype"}
    problem = describe(
        "test", case.ndim, case.x_shape, case.w_shape, first.dtype, second.dtype,
        operation=operation, **options,
    )  # fmt: skip
    return replace(problem, **changes), first, second


def candidates(problem):
    plan = choose("test", problem, "numpy", cpu())
    # Whether "separable" serves is up to w's values; what "auto" must not choose has its own bound.
    return [c.algorithm for c in plan.candidates if not c.rejected and c.algorithm != "separable"]


def run(problem, first, second, algorithm="auto"):
    return choose("test", problem, "numpy", cpu(), algorithm)(first, second)


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
@pytest.mark.parametrize("block", range(4))
def test_random_problems_agree_with_the_reference(operation, block):
    for seed in range(75 * block, 75 * (block + 1)):
        case = random_case(seed, largest=10)
        problem, first, second = gradient(case, operation)
        for algorithm in {"auto", *candidates(problem)} - {"direct"}:
            y = run(problem, first, second, algorithm)
            assert_close(problem, y, first, second)
            again = run(problem, first, second, algorithm)
            np.testing.assert_array_equal(y, again)


@given(SEEDS, st.sampled_from(["dgrad", "wgrad"]), st.sampled_from([None, 0, 1000, 100_000]))
def test_every_algorithm_agrees_within_its_workspace(seed, operation, limit):
    case = random_case(seed, largest=6, channels=3)
    problem, first, second = gradient(
        case, operation, workspace_limit=limit, flip=seed % 3 == 0, conjugate=seed % 2 == 0
    )
    names = candidates(problem)
    assert "direct" in names
    for algorithm in names:
        plan = choose("test", problem, "numpy", cpu(), algorithm)
        assert limit is None or plan.workspace_bytes <= limit
        assert plan.workspace_bytes <= 64 << 20
        assert_close(problem, plan(first, second), first, second)


@given(SEEDS)
def test_gradients_are_the_adjoints_exactly(seed):
    """<conv(x, w), y> = <x, dgrad(y, w)> = <w, wgrad(x, y)> modulo 2^64."""
    rng = np.random.default_rng(seed)
    case = random_case(seed, dtypes=("int64",), largest=9)
    x, w, _ = case.arrays()
    options = {k: v for k, v in case.options if k != "dtype"}
    y = getattr(gpuconv, case.function)(x, w, **options)
    dy = rng.integers(-(2**62), 2**62, y.shape)
    dx = getattr(grad, case.function + "_input")(x.shape, w, dy, **options)
    dw = getattr(grad, case.function + "_weight")(x, w.shape, dy, **options)
    assert dx.shape == x.shape
    assert dw.shape == w.shape
    with np.errstate(over="ignore"):
        product = (y * dy).sum()
        assert (x * dx).sum() == product
        assert (w * dw).sum() == product


@given(SEEDS)
def test_gradients_are_adjoint_over_complex_numbers(seed):
    case = replace(
        random_case(seed, dtypes=("complex128",), mixed_dtypes=False, largest=7), integers=True
    )
    x, w, _ = case.arrays()
    y = getattr(gpuconv, case.function)(x, w, **case.kwargs | {"dtype": None})
    rng = np.random.default_rng(seed)
    dy = rng.integers(-2, 3, y.shape) + 1j * rng.integers(-2, 3, y.shape)
    options = case.kwargs | {"dtype": None}
    dx = getattr(grad, case.function + "_input")(x.shape, w, dy, **options)
    dw = getattr(grad, case.function + "_weight")(x, w.shape, dy, **options)
    product = np.vdot(y, dy)
    assert np.vdot(x, dx) == product
    assert np.vdot(w, dw) == product


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("seed", range(4))
def test_central_differences(mode, seed):
    """In float64, of a loss that is not linear."""
    case = random_case(
        (30, 33, 41, 54)[seed], dtypes=("float64",), mixed_dtypes=False, largest=6, channels=3
    )
    options = case.kwargs | {"dtype": None, "padding_mode": mode}
    x, w, _ = replace(case, bias=False, integers=False).arrays()
    bias = rand(w.shape[0])
    conv = getattr(gpuconv, case.function)

    def loss(x, w, bias):
        return np.sin(conv(x, w, bias, **options)).sum()

    dy = np.cos(conv(x, w, bias, **options))
    kept = {k: v for k, v in options.items() if k != "dtype"}
    gradients = (
        getattr(grad, case.function + "_input")(x.shape, w, dy, **kept),
        getattr(grad, case.function + "_weight")(x, w.shape, dy, **kept),
        getattr(grad, case.function + "_bias")(dy, layout=options["layout"]),
    )
    rng, h = np.random.default_rng(seed), 1e-5
    for which, gradient in enumerate(gradients):
        for flat in rng.choice(gradient.size, min(gradient.size, 12), replace=False):
            at = np.unravel_index(flat, gradient.shape)
            values = []
            for step in (h, -h):
                moved = [np.array(a) for a in (x, w, bias)]
                moved[which][at] += step
                values.append(loss(*moved))
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(gradient[at], abs=1e-7)


@given(SEEDS)
def test_each_image_of_a_batch_gets_the_bits_it_would_get_alone(seed):
    case = random_case(seed, largest=9)
    problem, dy, w = gradient(case, "dgrad")
    if not problem.batched:
        return
    for algorithm in candidates(problem):
        plan = choose("test", problem, "numpy", cpu(), algorithm)
        whole = plan(dy, w)
        for n in range(len(dy)):
            np.testing.assert_array_equal(whole[n : n + 1], plan(dy[n : n + 1], w))


@given(SEEDS, st.sampled_from(["dgrad", "wgrad"]))
def test_out_takes_the_same_bits_in_any_memory(seed, operation):
    case = random_case(seed, largest=8)
    problem, first, second = gradient(case, operation)
    plan = choose("test", problem, "numpy", cpu())
    y = plan(first, second)
    for memory in testing.MEMORY_ORDERS:
        out = testing.in_memory_order(np.ones_like(np.ascontiguousarray(y)), memory, 1)
        assert plan(first, second, out=out) is out
        np.testing.assert_array_equal(out, y)


def test_a_plan_of_wgrad_serves_other_batches():
    plan = gpuconv.plan_conv2d((4, 3, 9, 8), (5, 3, 3, 3), dtype="float64", operation="wgrad")
    for n in (1, 3, 11):
        x, dy = rand(n, 3, 9, 8), rand(n, 5, 7, 6)
        np.testing.assert_allclose(plan(x, dy), grad.conv2d_weight(x, (5, 3, 3, 3), dy))
    with pytest.raises(ValueError, match="x has a batch of 2 but grad_output one of 3"):
        plan(rand(2, 3, 9, 8), rand(3, 5, 7, 6))


def test_plans_explain_the_gradients():
    text = str(gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3), operation="dgrad", backend="numpy"))
    assert "dgrad 2-D NCHW float32 dy[2,4,6,7] w[4,3,3,3] -> dx[2,3,8,9]" in text
    assert "im2col" in text
    text = str(gpuconv.plan_conv2d((2, 3, 8, 9), (4, 3, 3, 3), operation="wgrad", backend="numpy"))
    assert "wgrad 2-D NCHW float32 x[2,3,8,9] dy[2,4,6,7] -> dw[4,3,3,3]" in text
    plan = gpuconv.plan_conv2d(
        (2, 4, 8, 9), (4, 4, 3, 3), stride=2, operation="dgrad", backend="numpy"
    )
    assert "mixed" in {c.algorithm for c in plan.candidates if not c.rejected}
    assert plan.flops == gpuconv.plan_conv2d((2, 4, 8, 9), (4, 4, 3, 3), stride=2).flops


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
def test_nan_and_infinity_stay_where_they_are_read(operation):
    """Depthwise and dense: a tap that no infinity meets is finite."""
    x, w = rand(2, 4, 9, 9, dtype="float32"), rand(4, 4, 3, 3, dtype="float32")
    for groups in (1, 4):
        w_g = w[:, : 4 // groups]
        dy = rand(2, 4, 9, 9, dtype="float32")
        options = {"padding": 1, "groups": groups}
        if operation == "dgrad":
            dy[1, 2, 4, 4] = np.inf
            dx = grad.conv2d_input(x.shape, w_g, dy, **options)
            clean = np.ones(dx.shape, bool)
            clean[1, slice(None) if groups == 1 else 2, 3:6, 3:6] = False
            assert np.isfinite(dx[clean]).all()
            assert not np.isfinite(dx[~clean]).any()
        else:
            bad = x.copy()
            bad[0, 1, 0, 0] = np.nan  # the corner: no position meets it in the last row or column
            dw = grad.conv2d_weight(bad, w_g.shape, dy, **options)
            clean = np.ones(dw.shape, bool)
            at = (slice(None), 1) if groups == 1 else (1, 0)
            clean[(*at, slice(0, 2), slice(0, 2))] = False
            assert np.isfinite(dw[clean]).all()
            assert not np.isfinite(dw[~clean]).any()


# ---- torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_gradients_are_torch_s(seed):
    torch = pytest.importorskip("torch")
    case = random_case(seed, dtypes=("float64", "complex128"), mixed_dtypes=False, largest=9)
    problem = case.problem()
    if any(lo != hi for lo, hi in zip(problem.pad_lo, problem.pad_hi, strict=True)):
        return
    x, w, _ = replace(case, memory="contiguous").arrays()
    last = problem.layout.endswith("C")
    x = np.ascontiguousarray(np.moveaxis(x, -1, -case.ndim - 1)) if last else x
    options = {
        "stride": problem.stride, "padding": problem.pad_lo, "dilation": problem.dilation,
        "groups": problem.groups,
    }  # fmt: skip
    tx, tw = (torch.from_numpy(a).requires_grad_() for a in (x, w))
    y = getattr(torch.nn.functional, case.function)(tx, tw, **options)
    dy = torch.from_numpy(rand(*y.shape, dtype=str(x.dtype), seed=1))
    y.backward(dy)
    dx = getattr(grad, case.function + "_input")(x.shape, w, dy.numpy(), **options)
    dw = getattr(grad, case.function + "_weight")(x, w.shape, dy.numpy(), **options)
    np.testing.assert_allclose(dx, tx.grad.numpy(), atol=1e-12, rtol=1e-10)
    np.testing.assert_allclose(dw, tw.grad.numpy(), atol=1e-12, rtol=1e-10)
    tensors = getattr(grad, case.function + "_input")(x.shape, tw.detach(), dy, **options)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(tensors.numpy(), dx)


@pytest.mark.parametrize("seed", range(150))
def test_transposed_convolutions_are_torch_s(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(1, 4))
    stride, dilation = (tuple(map(int, rng.integers(1, 4, ndim))) for _ in range(2))
    filters, extents = (tuple(map(int, rng.integers(1, 5, ndim))) for _ in range(2))
    groups, c, k = (int(n) for n in rng.integers(1, 4, 3))
    extra = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True))
    padding = tuple(int(n) for n in rng.integers(0, 4, ndim))
    dtype = ("float64", "complex128")[seed % 2]
    x = rand(2, groups * c, *extents, dtype=dtype)
    w = rand(groups * c, k, *filters, dtype=dtype)
    bias = rand(groups * k, dtype=dtype)
    if seed % 3 == 0:
        x = x[0]
    options = {
        "stride": stride, "padding": padding, "output_padding": extra, "groups": groups,
        "dilation": dilation,
    }  # fmt: skip
    name = f"conv_transpose{ndim}d"
    try:
        expected = getattr(torch.nn.functional, name)(
            *map(torch.from_numpy, (x, w, bias)), **options
        )
    except RuntimeError:
        with pytest.raises(ValueError, match="the output would be empty along"):
            getattr(gpuconv, name)(x, w, bias, **options)
        return
    y = getattr(gpuconv, name)(x, w, bias, **options)
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-12)
    channel = x.ndim - ndim - 1
    layout = gpuconv.problem.LAYOUTS[ndim][1]
    last = np.moveaxis(x, channel, -1)
    z = getattr(gpuconv, name)(last, w, bias, layout=layout, **options)
    np.testing.assert_allclose(np.moveaxis(z, -1, channel), y, atol=1e-12)
    out = np.empty_like(y)
    for algorithm in ("direct", "im2col"):
        assert getattr(gpuconv, name)(x, w, bias, out=out, algorithm=algorithm, **options) is out
        np.testing.assert_allclose(out, y, atol=1e-12)


# ---- transposed convolution --------------------------------------------------------------------


@given(SEEDS)
def test_a_transposed_convolution_is_the_adjoint(seed):
    case = random_case(seed, dtypes=("int64",), mixed_dtypes=False, largest=9)
    problem = case.problem()
    options = {k: v for k, v in case.options if k not in ("dtype", "padding_mode")}
    x, w, _ = case.arrays()
    y = getattr(gpuconv, case.function)(x, w, **options)
    dy = np.random.default_rng(seed).integers(-9, 9, y.shape)
    axes = range(problem.ndim)
    if options["padding"] in ("same", "same_lower"):
        extra = {}
        if any(problem.input[a] % problem.stride[a] for a in axes):
            return  # "same" goes back to a multiple of the stride
    else:
        reach = [
            (problem.output[a] - 1) * problem.stride[a]
            + problem.dilation[a] * (problem.filter[a] - 1) + 1
            for a in axes
        ]  # fmt: skip
        extra = {
            "output_padding": tuple(
                problem.input[a] + problem.pad_lo[a] + problem.pad_hi[a] - reach[a] for a in axes
            )
        }
    name = case.function.replace("conv", "conv_transpose")
    z = getattr(gpuconv, name)(dy, w, **options, **extra)
    assert z.shape == x.shape
    with np.errstate(over="ignore"):
        assert (y * dy).sum() == (x * z).sum()


def test_transposed_dtypes_follow_the_convolution():
    for dtype in ("float16", "bfloat16", "float32", "int8", "uint8", "bool"):
        x, w = (rand(1, 2, 4, 4, dtype=dtype), rand(2, 3, 2, 2, dtype=dtype))
        expected = gpuconv.conv2d(x, w.swapaxes(0, 1)).dtype
        assert gpuconv.conv_transpose2d(x, w).dtype == expected
    y = gpuconv.conv_transpose2d(
        rand(1, 2, 4, 4, dtype="uint8"), rand(2, 3, 2, 2, dtype="uint8"), dtype="float32"
    )
    assert y.dtype == np.float32


def test_onnx_conv_transpose_nodes(monkeypatch):
    """Every ConvTranspose among ONNX's own tests of its operators."""
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.case.node import convtranspose

    cases = []
    monkeypatch.setattr(
        convtranspose,
        "expect",
        lambda node, inputs, outputs, name: cases.append((node, inputs, outputs, name)),
    )
    for name, export in vars(convtranspose.ConvTranspose).items():
        if name.startswith("export"):
            export.__func__()
    for node, inputs, outputs, name in cases:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        x, w = inputs[:2]
        ndim = x.ndim - 2
        options = {
            "stride": tuple(given.get("strides", (1,) * ndim)),
            "dilation": tuple(given.get("dilations", (1,) * ndim)),
            "groups": given.get("group", 1),
        }
        extra = tuple(given.get("output_padding", (0,) * ndim))
        auto = given.get("auto_pad", b"NOTSET").decode()
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            padding = "same" if auto == "SAME_UPPER" else "same_lower"
        elif "output_shape" in given:  # what ONNX calls pads may be below zero: more output
            axes = zip(x.shape[2:], options["stride"], w.shape[2:], options["dilation"],
                       given["output_shape"], strict=True)  # fmt: skip
            total = [(n - 1) * s + d * (f - 1) + 1 - out for n, s, f, d, out in axes]
            padding = 0
            extra = tuple(-t for t in total)
        else:
            pads = given.get("pads", (0,) * 2 * ndim)
            padding = tuple(zip(pads[:ndim], pads[ndim:], strict=True))
        y = getattr(gpuconv, f"conv_transpose{ndim}d")(
            x, w, *inputs[2:], padding=padding, output_padding=extra, **options
        )
        np.testing.assert_allclose(y, outputs[0], rtol=1e-5, err_msg=name)
    assert len(cases) >= 8


# ---- empties and errors ------------------------------------------------------------------------


def test_empty_arrays():
    dx = grad.conv2d_input((0, 3, 5, 5), rand(4, 3, 3, 3), rand(0, 4, 3, 3))
    assert dx.shape == (0, 3, 5, 5)
    dw = grad.conv2d_weight(rand(0, 3, 5, 5), (4, 3, 3, 3), rand(0, 4, 3, 3))
    np.testing.assert_array_equal(dw, np.zeros((4, 3, 3, 3)))
    dx = grad.conv2d_input((2, 3, 5, 5), rand(0, 3, 3, 3), rand(2, 0, 3, 3))
    np.testing.assert_array_equal(dx, np.zeros((2, 3, 5, 5)))
    dw = grad.conv2d_weight(rand(2, 0, 5, 5), (4, 0, 3, 3), rand(2, 4, 3, 3))
    assert dw.shape == (4, 0, 3, 3)
    np.testing.assert_array_equal(grad.conv2d_bias(rand(0, 4, 3, 3)), np.zeros(4))
    y = gpuconv.conv_transpose2d(rand(0, 3, 5, 5), rand(3, 4, 3, 3), rand(4))
    assert y.shape == (0, 4, 7, 7)
    y = gpuconv.conv_transpose2d(rand(1, 0, 5, 5), rand(0, 4, 3, 3), rand(4, seed=3))
    np.testing.assert_array_equal(y, np.broadcast_to(rand(4, seed=3)[:, None, None], y.shape))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("ndim", "axis"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_transposed_sums_of_an_empty_axis_are_zeros_or_the_bias(ndim, axis, biased):
    extents = [3] * ndim
    extents[axis] = 0
    bias = rand(4, seed=3) if biased else None
    x, w = np.ones((1, 2, *extents)), np.ones((2, 4, *[3] * ndim))
    y = getattr(gpuconv, f"conv_transpose{ndim}d")(x, w, bias)
    assert y.shape == (1, 4, *(n + 2 for n in extents))
    expected = np.zeros(y.shape)
    if bias is not None:
        expected += bias.reshape(-1, *[1] * ndim)
    np.testing.assert_array_equal(y, expected)


W = np.ones((4, 3, 3, 3))
DY = np.ones((2, 4, 6, 6))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: grad.conv2d_input((2, 3, 8, 9), W, DY), ValueError,
         "conv2d_input: grad_output has shape (2, 4, 6, 6); it takes (2, 4, 6, 7)"),
        (lambda: grad.conv2d_input((3, 3, 8, 8), W, DY), ValueError,
         "conv2d_input: input_shape has a batch of 3 but grad_output one of 2; they must be the"),
        (lambda: grad.conv2d_input((2, 5, 8, 8), W, DY), ValueError,
         "conv2d_input: input_shape has 5 channels but w (4, 3, 3, 3) with groups=1 needs 3"),
        (lambda: grad.conv2d_input((2, 3), W, DY), ValueError,
         "conv2d_input: input_shape is (2, 3), 2-D; it takes (N, C, H, W), or (C, H, W)"),
        (lambda: grad.conv2d_input(7, W, DY), TypeError,
         "conv2d_input: input_shape takes a sequence of integers, got 7 (int)"),
        (lambda: grad.conv2d_input((2, 3, 8, 8), W, [1]), TypeError,
         "conv2d_input: grad_output is a list"),
        (lambda: grad.conv2d_weight(np.ones((2, 3, 8, 8)), (4, 3, 3), DY), ValueError,
         "conv2d_weight: weight_shape is (4, 3, 3), 3-D; it takes (K, C/groups, R, S)"),
        (lambda: grad.conv2d_weight(np.ones((1, 3, 8, 8)), W.shape, DY), ValueError,
         "conv2d_weight: x has a batch of 1 but grad_output one of 2"),
        (lambda: grad.conv2d_weight(np.ones((2, 3, 8, 8)), W.shape, DY, out=np.ones(3)),
         ValueError, "conv2d_weight: out has shape (3,); it takes (4, 3, 3, 3)"),
        (lambda: grad.conv2d_bias(np.ones((2, 3))), ValueError,
         "conv2d_bias: grad_output has shape (2, 3), 2-D; it takes (N, K, P, Q)"),
        (lambda: grad.conv2d_bias(DY, dtype="int32"), TypeError,
         "conv2d_bias: dtype=int32 cannot hold a sum of float64; convert the result yourself"),
        (lambda: grad.conv2d_input(DY, W, DY), TypeError,
         "conv2d_input: input_shape takes a sequence of integers, got an array of shape"),
        (lambda: grad.conv2d_bias(DY, layout="HW"), ValueError, "layout is one of NCHW, NHWC"),
        (lambda: gpuconv.conv_transpose2d(DY, W[:3]), ValueError,
         "conv_transpose2d: x has 4 channels but w (3, 3, 3, 3) takes 3; w is (C, K/groups"),
        (lambda: gpuconv.conv_transpose2d(DY, W, stride=2, output_padding=2), ValueError,
         "conv_transpose2d: output_padding is less than stride or dilation; got 2 along H"),
        (lambda: gpuconv.conv_transpose2d(DY, W, output_padding=-1), ValueError,
         "conv_transpose2d: output_padding is at least 0; got -1"),
        (lambda: gpuconv.conv_transpose2d(DY, W, padding=4), ValueError,
         "(in - 1)*stride - pad_lo - pad_hi + dilation*(filter-1) + output_padding + 1 = "
         "(6 - 1)*1 - 4 - 4 + 1*(3-1) + 0 + 1 = 0; less padding would do"),
        (lambda: gpuconv.conv_transpose2d(DY, W, stride=2, padding="same", output_padding=1),
         ValueError, "padding='same' makes the result stride times as large as x"),
        (lambda: gpuconv.conv_transpose2d(DY, W, groups=3), ValueError,
         "conv_transpose2d: x has 4 channels, which groups=3 does not divide"),
        (lambda: gpuconv.conv_transpose2d(DY, W, np.ones(4)), ValueError,
         "conv_transpose2d: bias has shape (4,); it takes (3,)"),
        (lambda: gpuconv.conv_transpose2d(DY, W, padding_mode="reflect"), TypeError,
         "padding_mode"),
        (lambda: gpuconv.plan_conv2d((2, 3, 8, 8), W.shape, operation="bprop"), ValueError,
         "plan_conv2d: operation is one of fprop, dgrad, wgrad; got 'bprop'"),
        (lambda: gpuconv.plan_conv2d((2, 3, 8, 8), W.shape, operation="dgrad", bias=True),
         ValueError, "plan_conv2d: operation='dgrad' takes no bias; its gradient is gpuconv.grad"),
    ],
)  # fmt: skip
def test_errors_say_what_came_and_what_would_do(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_nothing_is_written_after_an_error():
    out = np.full((2, 3, 8, 8), 7.0)
    with pytest.raises(ValueError, match="grad_output has shape"):
        grad.conv2d_input(out.shape, W, DY[..., :5], out=out)
    assert (out == 7).all()


def test_bias_gradients():
    for dtype, result in (("float16", "float16"), ("uint8", "uint64"), ("complex64", "complex64")):
        dy = rand(3, 4, 5, 6, dtype=dtype)
        db = grad.conv2d_bias(dy)
        assert db.dtype == result
        np.testing.assert_allclose(db, dy.sum(axis=(0, 2, 3), dtype=db.dtype), rtol=2e-2, atol=0.1)
        np.testing.assert_array_equal(grad.conv2d_bias(dy[0]), grad.conv2d_bias(dy[:1]))
        last = np.ascontiguousarray(np.moveaxis(dy, 1, -1))
        np.testing.assert_allclose(grad.conv2d_bias(last, layout="NHWC"), db, rtol=1e-2, atol=0.1)
    assert grad.conv1d_bias(rand(2, 3, 4), dtype="complex128").dtype == np.complex128
    ones = np.ones((4096, 1, 32, 32), np.float16)
    assert np.isinf(grad.conv2d_bias(ones))[0]  # 2^22 is no float16
    assert grad.conv2d_bias(ones, dtype="float32") == 2**22


def test_every_axis_count_and_function_is_there():
    for ndim, what in itertools.product((1, 2, 3), ("input", "weight", "bias")):
        assert f"conv{ndim}d_{what}" in grad.__all__
        assert ">>> " in getattr(grad, f"conv{ndim}d_{what}").__doc__
