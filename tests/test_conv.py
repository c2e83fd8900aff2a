"""conv1d, conv2d, conv3d against the reference, SciPy and torch, with every option."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv import testing
from gpuconv.testing import assert_close, random_array, random_case

SEEDS = st.integers(0, 2**32)


def call(case, **changes):
    x, w, bias = case.arrays()
    return getattr(gpuconv, case.function)(x, w, bias, **(case.kwargs | changes))


def rand(*shape, dtype="float32", seed=0):
    return random_array(np.random.default_rng(seed), shape, dtype)


@pytest.mark.parametrize("block", range(8))
def test_random_problems_agree_with_the_reference(block):
    for seed in range(250 * block, 250 * (block + 1)):
        case = random_case(seed)
        assert_close(case.problem(), call(case), *case.arrays())


@given(SEEDS)
def test_integer_valued_data_is_exact_in_every_dtype(seed):
    case = random_case(seed, channels=3, largest=8)
    if case.integers:
        y = call(case, dtype=None)
        problem = case.problem()
        case = type(case)(
            **{**case.__dict__, "options": tuple((case.kwargs | {"dtype": None}).items())}
        )
        problem = case.problem()
        assert_close(problem, y, *case.arrays(), exact=not problem.result_dtype.is_half)


@given(SEEDS)
def test_every_algorithm_agrees_and_keeps_to_its_workspace(seed):
    case = random_case(seed, largest=9)
    problem, arrays = case.problem(), case.arrays()
    plan = gpuconv.plan.choose("test", problem, "numpy", _cpu())
    for candidate in plan.candidates:
        # Whether "separable" serves is up to w's values: it has tests of its own.
        if candidate.cost is not None and candidate.algorithm != "separable":
            y = call(case, algorithm=candidate.algorithm)
            assert_close(problem, y, *arrays)


@given(SEEDS, st.sampled_from([0, 1000, 100_000]))
def test_a_workspace_limit_always_leaves_an_algorithm(seed, limit):
    case = random_case(seed, largest=7, channels=3)
    assert_close(case.problem(), call(case, workspace_limit=limit), *case.arrays())


@given(SEEDS)
def test_out_is_written_in_any_memory(seed):
    case = random_case(seed, largest=8)
    y = call(case)
    for memory in testing.MEMORY_ORDERS:
        out = testing.in_memory_order(np.ones_like(np.ascontiguousarray(y)), memory, 1)
        assert call(case, out=out) is out
        assert_close(case.problem(), out, *case.arrays())
    out = np.empty_like(y)  # in the memory that a new result would have: the very same bits
    call(case, out=out)
    np.testing.assert_array_equal(out, y)


@given(SEEDS)
def test_each_image_of_a_batch_gets_the_bits_it_would_get_alone(seed):
    case = random_case(seed, largest=9)
    if len(case.x_shape) != case.ndim + 2:
        return
    x, w, bias = case.arrays()
    for candidate in _plan(case).candidates:
        if candidate.cost is None or candidate.algorithm == "separable":
            continue
        plan = _plan(case, candidate.algorithm)
        whole = plan(x, w, bias)
        again = plan(x, w, bias)
        np.testing.assert_array_equal(whole, again)
        for n in range(len(x)):
            np.testing.assert_array_equal(whole[n : n + 1], plan(x[n : n + 1], w, bias))


def _cpu():
    return gpuconv.backends.backend("numpy").device()


def _plan(case, algorithm="auto"):
    from gpuconv.plan import choose

    return choose("test", case.problem(), "numpy", _cpu(), algorithm)


@given(SEEDS)
def test_a_flipped_filter_is_a_convolution(seed):
    from dataclasses import replace

    from gpuconv.plan import choose

    case = random_case(seed, largest=7, channels=3)
    x, w, bias = case.arrays()
    problem = replace(case.problem(), flip=True)
    for candidate in choose("test", problem, "numpy", _cpu()).candidates:
        if candidate.cost is not None and candidate.algorithm != "separable":
            plan = choose("test", problem, "numpy", _cpu(), candidate.algorithm)
            assert_close(problem, plan(x, w, bias), x, w, bias)


def test_one_plan_serves_every_batch_size():
    plan = gpuconv.plan_conv2d((4, 3, 20, 21), (5, 3, 3, 3), padding=1)
    x, w = rand(9, 3, 20, 21), rand(5, 3, 3, 3)
    np.testing.assert_array_equal(plan(x, w)[2:6], plan(x[2:6], w))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_boundaries_are_those_of_numpy_pad_even_far_beyond_the_edge(mode, n):
    names = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}
    x = np.arange(1.0, n + 1)
    y = gpuconv.conv1d(x[None, None], np.ones((1, 1, 1)), padding=((7, 11),), padding_mode=mode)
    np.testing.assert_array_equal(y[0, 0], np.pad(x, (7, 11), names.get(mode, mode)))


def test_channels_last_memory_under_a_channels_first_shape_is_kept():
    x, w = rand(2, 3, 8, 9), rand(4, 3, 3, 3)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    y = gpuconv.conv2d(last, w)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_allclose(y, gpuconv.conv2d(x, w), rtol=1e-5, atol=1e-5)
    view = np.zeros((2, 16, 18, 6), np.float32)[:, ::2, ::2, ::2].transpose(0, 3, 1, 2)
    view[...] = x
    assert gpuconv.conv2d(view, w).transpose(0, 2, 3, 1).flags.c_contiguous
    first = np.ascontiguousarray(x).transpose(0, 2, 3, 1)
    y = gpuconv.conv2d(first, w, layout="NHWC")
    assert y.transpose(0, 3, 1, 2).flags.c_contiguous


@pytest.mark.parametrize(("channels", "pixels"), [(1, (8, 9)), (3, (1, 1)), (1, (1, 1))])
def test_strides_of_extents_of_one_tell_the_memory_order(channels, pixels):
    w = rand(4, channels, 1, 1)
    first, last = rand(2, channels, *pixels), rand(2, *pixels, channels)

    def runs_last(x, **options):
        y = gpuconv.conv2d(x, w, padding=1, **options)  # 4 channels, 3x3 pixels and more
        return y.strides[1 if options.get("layout") != "NHWC" else 3] == y.itemsize

    alike = channels == 1 == pixels[0]  # a stride of 1 each: nothing tells
    assert not runs_last(first)
    assert runs_last(last, layout="NHWC")
    assert runs_last(last.transpose(0, 3, 1, 2)) is not alike
    assert runs_last(first.transpose(0, 2, 3, 1), layout="NHWC") is alike
    if channels == 1:
        assert not runs_last(first[:, 0][:, None])  # NumPy's new axes have a stride of 0
        assert not runs_last(np.broadcast_to(rand(3, *pixels), (2, 3, *pixels))[:, :1])
        assert runs_last(last[..., 0][..., None], layout="NHWC")
        assert runs_last(rand(2, *pixels, 3)[..., :1].transpose(0, 3, 1, 2))
        assert not runs_last(rand(2, 3, *pixels)[:, :1])


def test_unbatched_input_gives_an_unbatched_result():
    x, w = rand(3, 8, 9), rand(4, 3, 3, 3)
    np.testing.assert_array_equal(gpuconv.conv2d(x, w), gpuconv.conv2d(x[None], w)[0])
    last = np.moveaxis(x, 0, -1)
    assert gpuconv.conv2d(last, w, layout="NHWC").shape == (6, 7, 4)
    assert gpuconv.conv1d(rand(3, 8), rand(4, 3, 3)).shape == (4, 6)


@pytest.mark.parametrize(
    ("x", "w", "shape"),
    [
        ((0, 3, 8, 9), (4, 3, 3, 3), (0, 4, 6, 7)),
        ((2, 3, 8, 9), (0, 3, 3, 3), (2, 0, 6, 7)),
        ((2, 0, 8, 9), (4, 0, 3, 3), (2, 4, 6, 7)),
    ],
)
def test_empty_arrays_give_what_the_formula_says(x, w, shape):
    y = gpuconv.conv2d(np.ones(x, np.float32), np.ones(w, np.float32))
    assert y.shape == shape
    assert not y.any()


def test_no_channels_leave_the_bias():
    y = gpuconv.conv2d(np.ones((1, 0, 4, 4)), np.ones((2, 0, 3, 3)), np.array([1.0, 2.0]))
    np.testing.assert_array_equal(y[0, :, 0, 0], [1, 2])


def test_an_empty_input_can_be_padded_with_zeros():
    y = gpuconv.conv2d(np.ones((1, 2, 0, 4)), np.ones((1, 2, 3, 3)), padding=2)
    assert y.shape == (1, 1, 2, 6)
    assert not y.any()


def test_filters_larger_than_the_image():
    x, w = rand(1, 2, 3, 3, dtype="float64"), rand(1, 2, 7, 9, dtype="float64")
    full = gpuconv.conv2d(x, w, padding="full")
    assert full.shape == (1, 1, 9, 11)
    np.testing.assert_allclose(full.sum(), (x.sum((2, 3)) * w.sum((2, 3))).sum())


@pytest.mark.parametrize("mode", ["valid", "full", "same"])
@pytest.mark.parametrize("shape", [((40,), (7,)), ((20, 31), (5, 4)), ((7, 8, 9), (3, 2, 3))])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "int16"])
def test_scipy_agrees(mode, shape, dtype):
    signal = pytest.importorskip("scipy.signal")
    ndim = len(shape[0])
    x, w = rand(*shape[0], dtype=dtype), rand(*shape[1], dtype=dtype, seed=1)
    if dtype == "int16":
        x, w = x.astype("int64"), w.astype("int64")
    # SciPy conjugates w; its "same" centres even filters one element later than padding="same".
    expected = signal.correlate(x, np.conj(w), mode, method="direct")
    padding = tuple((f // 2, (f - 1) // 2) for f in shape[1]) if mode == "same" else mode
    got = getattr(gpuconv, f"conv{ndim}d")(x[None, None], w[None, None], padding=padding)[0, 0]
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-3 if dtype == "float32" else 1e-9, atol=1e-4)


@pytest.mark.parametrize("block", range(4))
def test_torch_agrees(block):
    torch = pytest.importorskip("torch")
    for seed in range(40 * block, 40 * (block + 1)):
        case = random_case(seed, dtypes=("float32", "float64", "complex64"), mixed_dtypes=False)
        options = case.kwargs
        if options["layout"].endswith("C") or isinstance(options["padding"], str):
            continue
        if not all(isinstance(p, int) for p in np.atleast_1d(options["padding"]).tolist()):
            continue
        x, w, bias = (None if a is None else np.ascontiguousarray(a) for a in case.arrays())
        function = getattr(torch.nn.functional, case.function)
        expected = function(
            torch.from_numpy(x),
            torch.from_numpy(w),
            None if bias is None else torch.from_numpy(bias),
            **{k: options[k] for k in ("stride", "padding", "dilation", "groups")},
        )
        got = call(case, padding_mode="zeros", dtype=None)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_nan_and_inf_stay_within_their_windows():
    x, w = rand(1, 2, 40, 41), rand(3, 2, 5, 5, seed=1)
    clean = gpuconv.conv2d(x, w, padding=2)
    for value in (np.nan, np.inf):
        for algorithm in _choosable((1, 2, 40, 41), (3, 2, 5, 5)):
            dirty = x.copy()
            dirty[0, 0, 20, 10] = value
            y = gpuconv.conv2d(dirty, w, padding=2, algorithm=algorithm)
            hit = np.zeros(y.shape, bool)
            hit[:, :, 18:23, 8:13] = True
            assert not np.isfinite(y[hit]).any()
            np.testing.assert_allclose(y[~hit], clean[~hit], rtol=1e-4, atol=1e-4)


def _choosable(x_shape, w_shape):
    plan = gpuconv.plan_conv2d(x_shape, w_shape, padding=2)
    return [c.algorithm for c in plan.candidates if c.rejected is None]


def test_integers_wrap_modulo_64_bits_and_no_sooner():
    big = np.full((1, 1, 4), 2**62)
    np.testing.assert_array_equal(gpuconv.conv1d(big, np.ones((1, 1, 2), np.int64)), -(2**63))
    bytes_ = np.full((1, 1, 300), 255, np.uint8)
    y = gpuconv.conv1d(bytes_, np.full((1, 1, 300), 255, np.uint8))
    assert y.dtype == np.uint64
    assert y.item() == 300 * 255 * 255
    odd = np.full((1, 1, 3), 2**53 + 1)  # a float64 on the way would lose the 1
    assert gpuconv.conv1d(odd, np.array([[[1, 0, 0]]])).item() == 2**53 + 1
    small = gpuconv.conv1d(bytes_, np.ones((1, 1, 2), np.uint8), dtype="uint8")
    assert small.dtype == np.uint8
    assert (small == 254).all()


def test_booleans_count():
    x = np.array([[[True, True, False, True]]])
    np.testing.assert_array_equal(gpuconv.conv1d(x, x[..., :2]), [[[2, 1, 1]]])
    np.testing.assert_array_equal(gpuconv.conv1d(x, x[..., :2], dtype=bool), [[[True, True, True]]])


def test_half_precision_sums_in_float32():
    x = np.full((1, 1, 4096), 1 / 16, np.float16)
    assert gpuconv.conv1d(x, np.ones((1, 1, 4096), np.float16)).item() == 256


def test_an_out_that_overlaps_its_operands_is_still_right():
    x = rand(1, 1, 10, 10)
    w = rand(1, 1, 3, 3, seed=1)
    expected = gpuconv.conv2d(x, w, padding=1)
    assert gpuconv.conv2d(x, w, padding=1, out=x) is x
    np.testing.assert_array_equal(x, expected)


BAD_OUT = [
    (np.zeros((1, 1, 4, 4), np.float32), ValueError, "out has shape (1, 1, 4, 4); it takes (1, 1,"),
    (np.zeros((1, 1, 8, 8), np.float64), TypeError, "out is float64; it takes float32"),
    ([[0.0]], TypeError, "out is a list; it takes an array"),
]


@pytest.mark.parametrize(("out", "error", "message"), BAD_OUT)
def test_a_bad_out_is_refused_and_left_alone(out, error, message):
    before = np.array(out, copy=True)
    with pytest.raises(error, match=re.escape(message)):
        gpuconv.conv2d(
            np.ones((1, 1, 10, 10), np.float32), np.ones((1, 1, 3, 3), np.float32), out=out
        )
    np.testing.assert_array_equal(before, out)


def test_a_read_only_out_is_refused():
    out = np.zeros((1, 1, 8, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="conv2d: out is a read-only numpy array"):
        gpuconv.conv2d(
            np.ones((1, 1, 10, 10), np.float32), np.ones((1, 1, 3, 3), np.float32), out=out
        )


@pytest.mark.parametrize("shape", [(3,), (4, 1), ()])
def test_a_bias_of_the_wrong_shape_is_refused(shape):
    out = np.full((1, 4, 8, 8), 7, np.float32)
    with pytest.raises(
        ValueError, match=re.escape(f"conv2d: bias has shape {shape}; it takes (4,)")
    ):
        gpuconv.conv2d(rand(1, 2, 10, 10), rand(4, 2, 3, 3), np.zeros(shape, np.float32), out=out)
    assert (out == 7).all()


def test_an_array_in_place_of_a_shape_is_named():
    x, w = rand(1, 2, 10, 10), rand(4, 2, 3, 3)
    with pytest.raises(TypeError, match=r"plan_conv2d: x_shape .* shape \(1, 2, 10, 10\); its .sh"):
        gpuconv.plan_conv2d(x, w)
    with pytest.raises(TypeError, match="conv_output_shape: w_shape takes a sequence"):
        gpuconv.conv_output_shape(np.array(x.shape), w)
    assert gpuconv.conv_output_shape(np.array(x.shape), np.array(w.shape)) == (1, 4, 8, 8)


def test_an_algorithm_that_cannot_serve_says_why():
    with pytest.raises(
        ValueError, match=re.escape("conv2d: algorithm is 'auto' or, on the backend")
    ):
        gpuconv.conv2d(rand(1, 2, 10, 10), rand(4, 2, 3, 3), algorithm="magic")
    plan = gpuconv.plan_conv2d((1, 2, 10, 10), (4, 2, 3, 3), backend="numpy")
    refused = [c for c in plan.candidates if c.cost is None]
    assert refused
    for candidate in refused:
        with pytest.raises(ValueError, match=re.escape(candidate.rejected)):
            gpuconv.conv2d(rand(1, 2, 10, 10), rand(4, 2, 3, 3), algorithm=candidate.algorithm)


def test_arrays_are_positional_and_options_keywords():
    x, w = rand(1, 1, 4, 4), rand(1, 1, 3, 3)
    with pytest.raises(TypeError):
        gpuconv.conv2d(x=x, w=w)
    with pytest.raises(TypeError):
        gpuconv.conv2d(x, w, None, 1)


@given(SEEDS)
def test_conv_output_shape_is_the_shape_that_comes(seed):
    case = random_case(seed, largest=6, dtypes=("float32",))
    options = {k: v for k, v in case.kwargs.items() if k not in ("padding_mode", "dtype")}
    assert gpuconv.conv_output_shape(case.x_shape, case.w_shape, **options) == call(case).shape


def test_conv_output_shape_knows_its_dimension_from_the_filter():
    assert gpuconv.conv_output_shape((3, 10), (4, 3, 3)) == (4, 8)
    assert gpuconv.conv_output_shape((1, 10, 3), (4, 3, 3), layout="NWC") == (1, 8, 4)
    with pytest.raises(ValueError, match=re.escape("conv_output_shape: w_shape (3, 3) is 2-D")):
        gpuconv.conv_output_shape((3, 10), (3, 3))


def test_workspaces_stay_under_64_mib_for_any_input():
    import tracemalloc

    x, w = rand(1, 64, 300, 300), rand(64, 64, 3, 3)
    out = np.empty((1, 64, 300, 300), np.float32)
    plan = gpuconv.plan_conv2d(x.shape, w.shape, padding=1, backend="numpy")
    assert plan.workspace_bytes <= 64 << 20
    plan(x, w, out=out)
    tracemalloc.start()
    plan(x, w, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= plan.workspace_bytes + (1 << 20)


def test_the_twice_dropped_ball():
    """The article's first example: the sum over f(a) g(c-a), written out."""
    f, g = [0.1, 0.2, 0.4, 0.3], [0.5, 0.25, 0.25]
    reach = [
        sum(f[a] * g[c - a] for a in range(len(f)) if 0 <= c - a < len(g))
        for c in range(len(f) + len(g) - 1)
    ]
    y = gpuconv.conv1d(np.array([[f]]), np.array([[g[::-1]]]), padding="full")
    np.testing.assert_allclose(y[0, 0], reach)
    assert abs(y.sum() - 1) < 1e-12
