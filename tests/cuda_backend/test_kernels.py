"""Every registered algorithm, on random problems, against the reference.

``REFUSALS`` aside, nothing here names an algorithm: a new one is tested once it is registered.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuconv
from gpuconv import cuda_backend, dtypes, testing
from gpuconv.execute import channels_first
from gpuconv.plan import Plan, choose
from gpuconv.problem import ConvProblem, describe
from gpuconv.testing import Case, assert_close, in_memory_order, random_array, random_case
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device

# What can only be asked for by name makes conditions of its own, and has tests of its own.
ALGORITHMS = [
    a.__name__.rpartition(".")[2]
    for a in cuda_backend.algorithms()
    if not hasattr(a, "only_by_name") and "fprop" in getattr(a, "OPERATIONS", ("fprop",))
]
SEEDS = st.integers(0, 2**32)
SAME_DEVICE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def plan_of(case: Case, device: Any, algorithm: str = "auto", **changes: Any) -> Plan | None:
    """The case's plan with `algorithm`; None where that cannot serve it."""
    problem = dataclasses.replace(case.problem(), **changes)
    try:
        return choose("test", problem, "cuda", device, algorithm)
    except ValueError:
        return None


def run(plan: Plan, device: Any, *arrays: Any, out: Any = None) -> Any:
    return on_host(plan(*(on_device(device, a) for a in arrays), out=on_device(device, out)))


def bound_of(algorithm: str) -> float:
    """The algorithm's own constant in the error bound."""
    module = next(a for a in cuda_backend.algorithms() if a.__name__.endswith(f".{algorithm}"))
    return getattr(module, "ERROR_CONSTANT", 1.0)


@each_algorithm
@pytest.mark.parametrize("block", range(6))
def test_random_problems(cuda_device: Any, algorithm: str, block: int) -> None:
    served = 0
    for seed in range(250 * block, 250 * (block + 1)):
        case = random_case(seed)
        if plan := plan_of(case, cuda_device, algorithm):
            x, w, bias = case.arrays()
            y = run(plan, cuda_device, x, w, bias)
            assert_close(plan.problem, y, x, w, bias, c=bound_of(algorithm))
            served += 1
    assert served, f"{algorithm} serves none of the random problems"


@each_algorithm
def test_integer_valued_data_is_exact(cuda_device: Any, algorithm: str) -> None:
    for seed in range(300):
        case = random_case(seed, channels=3, largest=8)
        if not case.integers or bound_of(algorithm) != 1.0:
            continue
        options = {k: v for k, v in case.kwargs.items() if k != "dtype"}
        case = dataclasses.replace(case, options=tuple(options.items()))
        if plan := plan_of(case, cuda_device, algorithm):
            x, w, bias = case.arrays()
            exact = not plan.problem.result_dtype.is_half
            assert_close(plan.problem, run(plan, cuda_device, x, w, bias), x, w, bias, exact=exact)


@each_algorithm
def test_images_of_a_batch_have_the_bits_they_have_alone(cuda_device: Any, algorithm: str) -> None:
    for seed in range(120):
        case = random_case(seed, largest=9)
        plan = plan_of(case, cuda_device, algorithm)
        if plan is None or not plan.problem.batched:
            continue
        x, w, bias = case.arrays()
        whole = run(plan, cuda_device, x, w, bias)
        np.testing.assert_array_equal(whole, run(plan, cuda_device, x, w, bias))
        for n in range(len(x)):
            alone = run(plan, cuda_device, x[n : n + 1], w, bias)
            np.testing.assert_array_equal(whole[n : n + 1], alone)
        many = run(plan, cuda_device, np.concatenate([x] * 3), w, bias)
        np.testing.assert_array_equal(many, np.concatenate([whole] * 3))


@each_algorithm
def test_memory_orders_of_x_w_and_out_change_nothing(cuda_device: Any, algorithm: str) -> None:
    for seed in range(60):
        case = random_case(seed, largest=8)
        plan = plan_of(case, cuda_device, algorithm)
        if plan is None:
            continue
        x, w, bias = case.arrays()
        y = run(plan, cuda_device, x, w, bias)
        for memory in testing.MEMORY_ORDERS:
            filled = np.full_like(np.ascontiguousarray(y), 1)
            out = in_memory_order(filled, memory, channel_axis=1 if case.ndim < y.ndim - 1 else 0)
            given_x = in_memory_order(np.ascontiguousarray(x), memory, channel_axis=-1)
            given_w = in_memory_order(np.ascontiguousarray(w), memory, channel_axis=1)
            again = run(plan, cuda_device, given_x, given_w, bias, out=out)
            assert_close(plan.problem, again, x, w, bias, c=bound_of(algorithm))


@each_algorithm
def test_a_workspace_limit_of_zero(cuda_device: Any, algorithm: str) -> None:
    for seed in range(60):
        case = random_case(seed, largest=7, channels=3)
        x, w, bias = case.arrays()
        for name in ("auto", algorithm):
            plan = plan_of(case, cuda_device, name, workspace_limit=0)
            assert plan or name != "auto", f"nothing serves {case.problem()} without workspace"
            if plan:
                assert plan.workspace_bytes == 0
                y = run(plan, cuda_device, x, w, bias)
                assert_close(plan.problem, y, x, w, bias, c=bound_of(plan.algorithm))


@each_algorithm
@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_no_race_and_no_access_out_of_bounds(algorithm: str, mode: Any) -> None:
    """Every load and store watched, the threads of a block in random order."""
    for order in ("random", "interleaved"):
        with (
            emulated_device(mode=mode, order=order, block_order="shuffled") as device,
            gpuconv.use_backend("cuda"),
        ):
            for seed in range(0, 400, 17):
                # Few dtypes, each with its own size: every one is compiled for this mode.
                case = random_case(
                    seed,
                    largest=6,
                    dtypes=("float32", "float16", "int8", "complex128"),
                    mixed_dtypes=False,
                )
                case = dataclasses.replace(
                    case, options=tuple((k, v) for k, v in case.options if k != "dtype")
                )
                if plan := plan_of(case, device, algorithm):
                    x, w, bias = case.arrays()
                    y = run(plan, device, x, w, bias)
                    assert_close(plan.problem, y, x, w, bias, c=bound_of(algorithm))


@SAME_DEVICE
@given(
    st.sampled_from(["zeros", "reflect", "symmetric", "replicate", "circular"]),
    st.integers(1, 9),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_boundaries_any_distance_from_the_edge(
    cuda_device: Any, mode: str, extent: int, lo: int, hi: int
) -> None:
    """A filter of one tap copies the padded input."""
    from gpuconv.numpy_backend.boundary import source_index

    x = np.arange(1, extent + 1, dtype=np.float32)
    y = gpuconv.conv1d(
        x[None, None], np.ones((1, 1, 1), np.float32), padding=((lo, hi),), padding_mode=mode
    )
    index = source_index(extent, lo, hi, mode)
    np.testing.assert_array_equal(y[0, 0], np.where(index < 0, 0, x[index]))


EMPTY = [
    ((0, 3, 5, 5), (2, 3, 3, 3), (0, 2, 3, 3)),
    ((2, 0, 5, 5), (4, 0, 3, 3), (2, 4, 3, 3)),
    ((2, 3, 5, 5), (0, 3, 3, 3), (2, 0, 3, 3)),
    ((2, 3, 0, 5), (4, 3, 1, 3), (2, 4, 2, 3)),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "y_shape"), EMPTY)
def test_empty_arrays(cuda_device: Any, x_shape: Any, w_shape: Any, y_shape: Any) -> None:
    padding = (1, 0) if x_shape[2] == 0 else 0
    x, w = np.ones(x_shape, np.float32), np.ones(w_shape, np.float32)
    bias = np.arange(w_shape[0], dtype=np.float32)
    y = gpuconv.conv2d(x, w, bias, padding=padding)
    assert y.shape == y_shape
    np.testing.assert_array_equal(y, np.broadcast_to(bias[:, None, None], y_shape))


@each_algorithm
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_filters_larger_than_the_image(cuda_device: Any, algorithm: str, ndim: int) -> None:
    rng = np.random.default_rng(0)
    for mode in ("zeros", "reflect", "symmetric", "replicate", "circular"):
        x = random_array(rng, (2, 3, *(3, 2, 4)[:ndim]), "float32")
        w = random_array(rng, (4, 3, *(7, 6, 9)[:ndim]), "float32")
        problem = problem_of(x, w, padding="full", padding_mode=mode)
        try:
            plan = choose("test", problem, "cuda", cuda_device, algorithm)
        except ValueError:
            continue
        assert_close(problem, run(plan, cuda_device, x, w), x, w, c=bound_of(algorithm))


@each_algorithm
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "complex64"])
def test_nan_and_infinity_stay_where_their_windows_are(
    cuda_device: Any, algorithm: str, dtype: str
) -> None:
    if bound_of(algorithm) != 1.0:
        pytest.skip("an algorithm that mixes outputs, which 'auto' avoids where it matters")
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (2, 3, 11, 13), dtype), random_array(rng, (5, 3, 3, 3), dtype)
    x[0, 1, 4, 4], x[1, 2, 0, 0] = np.nan, np.inf
    problem = problem_of(x, w, padding=1)
    try:
        plan = choose("test", problem, "cuda", cuda_device, algorithm)
    except ValueError:
        return
    y = run(plan, cuda_device, x, w)
    clean = np.ones(y.shape, bool)
    clean[0, :, 3:6, 3:6] = clean[1, :, :2, :2] = False
    assert np.isfinite(y[clean]).all()
    assert not np.isfinite(y[~clean]).any()


def problem_of(x: Any, w: Any, **options: Any) -> ConvProblem:
    ndim = w.ndim - 2
    return describe(f"conv{ndim}d", ndim, x.shape, w.shape, x.dtype, w.dtype, **options)


# ---- past 2^31 elements, in memory that exists only where it is touched ------------------------


def sparse(folder: str, shape: tuple[int, ...], strides: tuple[int, ...], name: str) -> Any:
    """An int8 array of these strides over a file of holes."""
    span = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + 1
    memory: Any = np.memmap(Path(folder) / name, np.int8, "w+", shape=(span,))
    start = sum((n - 1) * -s for n, s in zip(shape, strides, strict=True) if s < 0)
    return np.lib.stride_tricks.as_strided(np.asarray(memory)[start:], shape, strides)


FAR = 2**31 + 1000  # elements, and with int8 bytes too
NEAR = 2**31 - 2**27  # just below where 64-bit offsets take over


@each_algorithm
@pytest.mark.parametrize("far", [FAR, NEAR])
@pytest.mark.parametrize("which", ["x batch", "x channel", "x row", "x back", "w", "y"])
def test_offsets_past_two_to_the_31(cuda_device: Any, algorithm: str, which: str, far: int) -> None:
    rng = np.random.default_rng(0)
    x = random_array(rng, (2, 2, 5, 6), "int8")
    w = random_array(rng, (3, 2, 2, 3), "int8")
    problem = problem_of(x, w, dtype="int8", padding=1)
    plan = choose("test", problem, "cuda", cuda_device)
    try:
        plan = choose("test", problem, "cuda", cuda_device, algorithm)
    except ValueError:
        return
    expected = gpuconv.testing.expected(problem, x, w)[0].astype(np.int8)
    strides = {
        "x batch": (far, 30, 6, 1),
        "x channel": (400, far, 6, 1),
        "x row": (100, 50, far // 4, 1),
        "x back": (60, 30, -far // 4, 1),
    }
    # A process may not have the address space, a disk not the holes: then this says so.
    with tempfile.TemporaryDirectory() as folder:
        given_x, given_w, out = x, w, None
        if which.startswith("x"):
            given_x = sparse(folder, x.shape, strides[which], "x")
            given_x[...] = x
        elif which == "w":
            given_w = sparse(folder, w.shape, (far // 2, 6, 3, 1), "w")
            given_w[...] = w
        else:
            out = sparse(folder, expected.shape, (far, 60, 8, 1), "y")
        y = run(plan, cuda_device, given_x, given_w, out=out)
        np.testing.assert_array_equal(y, expected)


# ---- conversions -----------------------------------------------------------------------------


def rounded(values: Any, dtype: str) -> Any:
    """float64 values rounded once to `dtype`, to nearest even, by arithmetic in float64."""
    if dtype == "float16":
        return values.astype(np.float16)
    bits = 8
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent, -125)  # subnormal from there on
    unit = np.ldexp(1.0, exponent - bits)
    with np.errstate(over="ignore"):
        return (np.round(values / unit) * unit).astype(dtypes.BFLOAT16.numpy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_double_sums_are_rounded_once(cuda_device: Any, dtype: str) -> None:
    """Ties, and numbers a hair beside them, which a rounding through float32 would make ties."""
    rng = np.random.default_rng(0)
    halves = rng.standard_normal(2000).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -20, 15, 2000
    )
    bits = 10 if dtype == "float16" else 7
    _, exponent = np.frexp(halves.astype(np.float64))
    unit = np.ldexp(1.0, exponent - 1 - bits)
    ties = (np.floor(halves / unit) + 0.5) * unit
    hair = np.ldexp(1.0, exponent - 45)
    values = np.concatenate([halves, ties, ties + hair, ties - hair, [0.0, -0.0, 1e-300, 65519.9]])
    y = gpuconv.conv1d(values[None, None], np.ones((1, 1, 1)), dtype=dtype)
    np.testing.assert_array_equal(
        y[0, 0].astype(np.float64), rounded(values, dtype).astype(np.float64)
    )


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_every_value_of_a_type_comes_through(cuda_device: Any, dtype: dtypes.DType) -> None:
    """A filter of one tap, 1, is the identity: all bits of small types, the edges of large ones."""
    if dtype.itemsize <= 2 and dtype.kind != "b":
        unsigned = np.uint8 if dtype.itemsize == 1 else np.uint16
        x = np.arange(1 << 8 * dtype.itemsize).astype(unsigned).view(dtype.numpy)
    elif dtype.is_exact and dtype.kind != "b":
        info = np.iinfo(dtype.name)
        x = np.array([info.min, info.min + 1, 0, 1, 7, info.max - 1, info.max], dtype.numpy)
    else:
        x = random_array(np.random.default_rng(0), (100,), dtype)
        if dtype.kind == "f":
            tiny = np.finfo(dtype.name)
            x[:6] = [tiny.tiny, tiny.smallest_subnormal, tiny.max, -0.0, np.inf, np.nan]
    one = np.ones((1, 1, 1), dtype.numpy)
    y = gpuconv.conv1d(x[None, None], one, dtype=dtype.name)
    wide = x.dtype if dtype.name != "bfloat16" else np.float32  # whose NaNs NumPy knows
    np.testing.assert_array_equal(y[0, 0].astype(wide), x.astype(wide))


def test_pad_and_weight_meet_as_numbers(cuda_device: Any) -> None:
    """0 * inf is NaN at the edge too, as on the NumPy backend."""
    x, w = np.ones((1, 1, 3), np.float32), np.array([[[np.inf, 1, 1]]], np.float32)
    y = gpuconv.conv1d(x, w, padding=1)
    with gpuconv.use_backend("numpy"):
        np.testing.assert_array_equal(y, gpuconv.conv1d(x, w, padding=1))
    assert np.isnan(y[0, 0, 0])


@each_algorithm
def test_a_flipped_filter(cuda_device: Any, algorithm: str) -> None:
    for seed in range(60):
        case = random_case(seed, largest=8)
        plan = plan_of(case, cuda_device, algorithm, flip=True)
        if plan:
            x, w, bias = case.arrays()
            y = run(plan, cuda_device, x, w, bias)
            assert_close(plan.problem, y, x, w, bias, c=bound_of(algorithm))


def test_views_are_channels_first_of_their_layout(cuda_device: Any) -> None:
    x = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    w = np.ones((2, 3, 2, 2), np.float32)
    y = gpuconv.conv2d(x, w, layout="NHWC")
    other = gpuconv.conv2d(np.ascontiguousarray(channels_first(x, True, True)), w)
    np.testing.assert_array_equal(channels_first(y, True, True), other)
