"""gpuconv.signal against scipy.signal: values, types, shapes, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import signal
from tests.emulator import emulated_device

scipy_signal = pytest.importorskip("scipy.signal")

TYPES = ("float64", "float32", "complex128", "complex64", "int64", "int32", "int16", "uint8")
MODES = ("full", "same", "valid")
LARGEST = {1: (40, 40), 2: (12, 12), 3: (7, 7), 4: (5, 4), 5: (4, 3)}


def random_array(rng: np.random.Generator, shape: Any, dtype: str) -> np.ndarray:
    values = 4 * rng.standard_normal(shape)
    if dtype.startswith("complex"):
        values = values + 4j * rng.standard_normal(shape)
    if dtype.startswith("uint"):
        values = np.abs(values)
    return np.asarray(values).astype(dtype)


def random_pair(rng: np.random.Generator, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    shapes = [tuple(rng.integers(1, most, ndim)) for most in LARGEST[ndim]]
    return tuple(random_array(rng, s, str(rng.choice(TYPES))) for s in shapes)  # type: ignore[return-value]


def attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        return error


def assert_same(ours: Any, scipys: Any, *inputs: np.ndarray, context: Any = "") -> None:
    if isinstance(scipys, Exception) or isinstance(ours, Exception):
        assert type(ours) is type(scipys), (context, ours, scipys)
        return
    assert ours.shape == scipys.shape, context
    assert ours.dtype == scipys.dtype, context
    if scipys.dtype.kind in "iu":
        np.testing.assert_array_equal(ours, scipys, err_msg=str(context))
        return
    single = any(np.dtype(a.dtype).name in ("float32", "complex64") for a in inputs)
    scale = 1 + np.abs(scipys).max(initial=0)
    tolerance = 2e-5 if single else 1e-12
    np.testing.assert_allclose(ours, scipys, rtol=0, atol=tolerance * scale, err_msg=str(context))


@pytest.mark.parametrize("function", ["convolve", "correlate"])
@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5])
def test_n_d_is_scipys(function: str, ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    for seed in range(60):
        a, b = random_pair(rng, ndim)
        mode = str(rng.choice(MODES))
        method = str(rng.choice(["direct", "auto"]))
        expected = attempt(getattr(scipy_signal, function), a, b, mode, "direct")
        got = attempt(getattr(signal, function), a, b, mode, method)
        assert_same(got, expected, a, b, context=(seed, a.shape, b.shape, a.dtype, b.dtype, mode))


@pytest.mark.parametrize("function", ["convolve2d", "correlate2d"])
@pytest.mark.parametrize("boundary", ["fill", "wrap", "symm", "pad", "circular", "symmetric"])
def test_2d_is_scipys(function: str, boundary: str) -> None:
    rng = np.random.default_rng(len(boundary))
    for seed in range(60):
        a, b = random_pair(rng, 2)
        mode = str(rng.choice(MODES))
        fill = rng.choice([0, 2])
        args = (a, b, mode, boundary, fill)
        expected = attempt(getattr(scipy_signal, function), *args)
        if function == "correlate2d" and mode == "valid" and b.size > a.size:
            # SciPy conjugates the first input here, against its own formula; correlate does not.
            expected = attempt(scipy_signal.correlate, a, b, mode, "direct")
        got = attempt(getattr(signal, function), *args)
        assert_same(got, expected, a, b, context=(seed, a.shape, b.shape, a.dtype, b.dtype, mode))


@pytest.mark.parametrize("function", ["fftconvolve", "oaconvolve"])
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_fft_functions_are_scipys_along_any_axes(function: str, ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    for seed in range(40):
        a, b = random_pair(rng, ndim)
        axes: Any = None
        if rng.random() < 0.5:
            axes = tuple(map(int, rng.permutation(ndim)[: rng.integers(1, ndim + 1)]))
            rest = [i for i in range(ndim) if i not in axes]
            shape = list(b.shape)
            for i in rest:
                shape[i] = int(rng.choice([1, a.shape[i]]))
            b = random_array(rng, shape, str(b.dtype))
            axes = tuple(axis - ndim * int(rng.integers(2)) for axis in axes)
        mode = str(rng.choice(MODES))
        used = range(ndim) if axes is None else [axis % ndim for axis in axes]
        if all(1 in (a.shape[i], b.shape[i]) for i in used):
            continue  # SciPy's result has another type where no FFT is needed
        expected = attempt(getattr(scipy_signal, function), a, b, mode, axes)
        got = attempt(getattr(signal, function), a, b, mode, axes)
        assert_same(got, expected, a, b, np.empty(0, "float32") if got_single(got) else a,
                    context=(seed, a.shape, b.shape, a.dtype, b.dtype, mode, axes))  # fmt: skip


def got_single(array: Any) -> bool:
    return getattr(array, "dtype", None) in (np.float32, np.complex64)


@pytest.mark.parametrize("function", ["convolve", "correlate"])
@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_strides_are_every_so_many_outputs(function: str, ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    ours = getattr(signal, function)
    for _ in range(30):
        a, b = random_pair(rng, ndim)
        mode = str(rng.choice(("full", "same")))
        steps = tuple(map(int, rng.integers(1, 4, ndim)))
        every = ours(a, b, mode, "direct")[tuple(slice(None, None, s) for s in steps)]
        assert_same(ours(a, b, mode, "direct", stride=steps), every, a, b)
        assert_same(ours(a, b, mode, "direct", stride=list(steps)), every, a, b)


def test_strides_in_2d_with_every_boundary() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((9, 11)), rng.random((3, 4))
    for name in ("convolve2d", "correlate2d"):
        for boundary in ("fill", "wrap", "symm"):
            for fill in (0, 1.5):
                args = (a, b, "same", boundary, fill)
                every = getattr(scipy_signal, name)(*args)[::2, ::3]
                assert_same(getattr(signal, name)(*args, stride=(2, 3)), every, a, b)


@pytest.mark.parametrize("function", ["convolve", "correlate"])
def test_axes_leave_the_others_as_batches(function: str) -> None:
    rng = np.random.default_rng(0)
    ours = getattr(signal, function)
    images, filters = rng.random((3, 8, 9, 4)), rng.random((3, 2, 3, 4))
    for mode in MODES:
        batches = ours(images, filters, mode, axes=(1, 2))
        shared = ours(images, filters[:1, :, :, :1], mode, axes=(-2, 1))
        for i in range(3):
            for c in range(4):
                one = ours(images[i, :, :, c], filters[i, :, :, c], mode)
                np.testing.assert_allclose(batches[i, :, :, c], one, rtol=1e-12)
                one = ours(images[i, :, :, c], filters[0, :, :, 0], mode)
                np.testing.assert_allclose(shared[i, :, :, c], one, rtol=1e-12)


def test_axes_and_strides_together() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 9, 8)), rng.random((1, 3, 3))
    every = signal.convolve(a, b, "same", axes=(1, 2))[:, ::2, ::3]
    np.testing.assert_allclose(
        signal.convolve(a, b, "same", axes=(1, 2), stride=(2, 3)), every, rtol=1e-12
    )


def test_integers_wrap_as_scipys_do() -> None:
    a = np.full((6,), 200, np.uint8)
    np.testing.assert_array_equal(
        signal.convolve(a, a, method="direct"), scipy_signal.convolve(a, a, method="direct")
    )


def test_long_inputs_by_fft() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(20_000), rng.standard_normal(700)
    expected = scipy_signal.fftconvolve(a, b)
    for got in (
        signal.convolve(a, b, method="fft"),
        signal.oaconvolve(a, b),
        signal.convolve(a, b),
    ):
        np.testing.assert_allclose(got, expected, atol=1e-10)


def test_auto_keeps_a_nan_where_it_belongs() -> None:
    a, b = np.ones(20_000), np.ones(700)
    a[500] = np.nan
    got = signal.convolve(a, b, mode="valid")
    assert np.isnan(got).sum() == 501
    assert np.isnan(got[:501]).all()


def test_scalars_give_scalars() -> None:
    product = signal.convolve(3, 4)
    assert product == 12
    assert isinstance(product, np.int64)
    assert signal.correlate(2j, 3j) == 6
    assert signal.fftconvolve(np.float32(2), np.float32(4)).dtype == np.float32


def test_empty_inputs_give_an_empty_array() -> None:
    for function in (signal.convolve, signal.correlate, signal.fftconvolve, signal.oaconvolve):
        assert function([], [1.0]).shape == (0,)
        assert function(np.zeros((0, 3)), np.zeros((2, 2))).shape == (0,)


def test_views_of_any_strides_are_read_right() -> None:
    rng = np.random.default_rng(0)
    big = rng.random((30, 40))
    for view in (big[::-2, ::3], big.T, np.broadcast_to(big[:1], (9, 40)), big[:, ::-1]):
        np.testing.assert_allclose(
            signal.convolve2d(view, big[:3, :4].T), scipy_signal.convolve2d(view, big[:3, :4].T)
        )


def test_choose_conv_method() -> None:
    assert signal.choose_conv_method(np.ones(10), np.ones(3)) == "direct"
    assert signal.choose_conv_method(np.ones((2048, 2048)), np.ones((101, 101))) == "fft"
    assert signal.choose_conv_method(np.ones(9999, int), np.ones(999, int)) == "direct"
    assert signal.choose_conv_method(np.array([2**51]), np.array([2**51])) == "direct"
    name, times = signal.choose_conv_method(np.ones(50), np.ones(7), measure=True)
    assert times.keys() == {"fft", "direct"}
    assert times[name] == min(times.values())


E2 = np.ones((2, 3)), np.ones((3, 2))
REFUSED = [
    ("convolve", (*E2, "valid"), {}, r"convolve: For 'valid' mode, one must be at least as large"),
    ("correlate", (*E2, "valid"), {}, r"correlate: For 'valid' mode.*\(2, 3\) and \(3, 2\)"),
    ("fftconvolve", (*E2, "valid"), {}, r"fftconvolve: For 'valid' mode"),
    ("convolve", ([1], [[2]]), {}, "same dimensionality; got 1-D and 2-D"),
    ("correlate", ([1], 2), {}, "same dimensionality; got 1-D and 0-D"),
    ("convolve", ([1], [2], "spam"), {}, "acceptable mode flags are .*; got 'spam'"),
    ("convolve", ([1], [2], "full", "bacon"), {}, "acceptable method flags are .*'bacon'"),
    ("convolve2d", ([[1]], [[2]], "full", "spam"), {}, "acceptable boundary flags .*'spam'"),
    ("convolve2d", ([1], [2]), {}, "inputs must both be 2-D arrays; got 1-D and 1-D"),
    ("correlate2d", (np.ones((2, 2, 2)), [[2]]), {}, "must both be 2-D arrays; got 3-D and 2-D"),
    ("convolve2d", ([[1.0]], [[1.0]], "full", "fill", [1, 2]), {}, "`fillvalue` must be scalar"),
    ("convolve2d", ([[1.0]], [[1.0]], "full", "fill", 1j), {}, "could not cast `fillvalue` direct"),
    ("convolve", ([1, 2], [2]), {"stride": 0}, r"stride takes one integer or 1.*got 0"),
    ("convolve", ([1, 2], [2]), {"stride": -1}, r"each at least 1; got -1"),
    ("convolve", ([1, 2], [2]), {"stride": (1, 2)}, r"stride takes one integer or 1"),
    ("convolve2d", E2, {"stride": (1, 2, 3)}, r"stride takes one integer or 2"),
    ("fftconvolve", ([1], [2]), {"axes": []}, "when provided, axes cannot be empty"),
    ("convolve", ([1], [2]), {"axes": 1}, "axes exceeds dimensionality of input; got 1 for 1-D"),
    ("oaconvolve", ([1], [2]), {"axes": [-2]}, "axes exceeds dimensionality"),
    ("fftconvolve", ([1], [2]), {"axes": [0, 0]}, "all axes must be unique"),
    ("fftconvolve", ([1], [2]), {"axes": [[1, 2], [3, 4]]}, "scalar or iterable of integers"),
    ("fftconvolve", ([1], [2]), {"axes": [1.0]}, "scalar or iterable of integers"),
    ("convolve", (np.ones((2, 5)), np.ones((3, 5))), {"axes": 1}, r"incompatible shapes for in1"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "kwargs", "message"), REFUSED)
def test_what_scipy_refuses_is_refused(function: str, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(signal, function)(*args, **kwargs)


def test_types_that_are_refused() -> None:
    with pytest.raises(TypeError, match="not one that gpuconv computes"):
        signal.convolve(np.ones(3, np.longdouble), np.ones(2))
    with pytest.raises(TypeError, match="not one that gpuconv computes"):
        signal.convolve(np.ones(3, object), np.ones(2))
    with pytest.raises(TypeError, match=r"stride takes integers, got 1\.5"):
        signal.convolve([1, 2], [1], stride=1.5)
    with pytest.raises(TypeError, match="masked array"):
        signal.convolve(np.ma.ones(3), np.ones(2))


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    a, b = rng.random((9, 8)), rng.random((3, 2))
    for function in ("convolve", "correlate", "convolve2d", "correlate2d", "fftconvolve"):
        got = getattr(signal, function)(torch.tensor(a), torch.tensor(b), "same")
        assert isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got.numpy(), getattr(scipy_signal, function)(a, b, "same"))
    assert signal.convolve(torch.tensor(3), torch.tensor(4)).shape == ()
    with pytest.raises(TypeError, match="torch on cpu but in2 is of numpy"):
        signal.convolve(torch.tensor(a), b)
    with pytest.raises(TypeError, match="requires grad"):
        signal.convolve(torch.tensor(a, requires_grad=True), torch.tensor(b))


def test_array_api_strict_in_and_out() -> None:
    strict = pytest.importorskip("array_api_strict")
    rng = np.random.default_rng(0)
    a, b = rng.random((9, 8)), rng.random((3, 2))
    for function in ("convolve", "convolve2d", "oaconvolve"):
        got = getattr(signal, function)(strict.asarray(a), strict.asarray(b))
        assert type(got) is type(strict.asarray(a))
        np.testing.assert_allclose(np.from_dlpack(got), getattr(scipy_signal, function)(a, b))


def test_jax_in_and_out() -> None:
    jax = pytest.importorskip("jax")
    a, b = np.arange(72, dtype=np.float32).reshape(9, 8), np.ones((3, 2), np.float32)
    got = signal.convolve2d(jax.numpy.asarray(a), jax.numpy.asarray(b), boundary="wrap")
    assert isinstance(got, jax.Array)
    np.testing.assert_allclose(got, scipy_signal.convolve2d(a, b, boundary="wrap"), rtol=1e-6)
    if not jax.config.jax_enable_x64:
        ints = jax.numpy.arange(5)
        with pytest.raises(TypeError, match="fftconvolve: the result is float64, which JAX holds"):
            signal.fftconvolve(ints, ints)


@pytest.fixture(scope="module")
def cuda() -> Any:
    with emulated_device() as device:
        yield device


@pytest.mark.parametrize("seed", range(12))
def test_the_backends_agree(cuda: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for ndim in (1, 2, 3, 4):
        a, b = random_pair(rng, ndim)
        mode = str(rng.choice(("full", "same")))
        for function in ("convolve", "correlate", "fftconvolve"):
            ours = getattr(signal, function)
            expected = ours(a, b, mode)
            with gpuconv.use_backend("cuda"):
                got = ours(a, b, mode)
            assert_same(got, expected, a, b, np.empty(0, "float32"))
    a, b = random_pair(rng, 2)
    for boundary in ("fill", "wrap", "symm"):
        args = (a, b, "same", boundary, 3)
        expected = signal.convolve2d(*args, stride=2)
        with gpuconv.use_backend("cuda"):
            assert_same(signal.convolve2d(*args, stride=2), expected, a, b, np.empty(0, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "uint8", "complex64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shapes", [((9, 8), (3, 2)), ((3, 2), (9, 8)), ((4, 1), (1, 5))])
@pytest.mark.parametrize("name", ["convolve", "correlate", "convolve2d", "correlate2d"])
def test_a_repeated_call_gives_what_the_first_would(
    name: str, shapes: Any, mode: str, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    if mode == "valid" and shapes[0][0] == 4:
        shapes = (4, 5), (1, 5)
    for options in ({}, {"stride": (2, 1)}, {"boundary": "wrap"}, {"fillvalue": 2}):
        if not name.endswith("2d") and not {"boundary", "fillvalue"}.isdisjoint(options):
            continue
        call = getattr(signal, name)
        call(*(random_array(rng, shape, dtype) for shape in shapes), mode, **options)
        pair = [random_array(rng, shape, dtype) for shape in shapes]
        again = call(*pair, mode, **options)
        signal._calls.clear()
        expected = call(*pair, mode, **options)
        assert again.dtype == expected.dtype
        np.testing.assert_array_equal(again, expected)


def test_a_repeated_call_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(0).random((2, 6, 7), np.float32)
    first = signal.convolve2d(a, b[:3, :3], "same")
    monkeypatch.setattr(signal, "_operands", None)
    np.testing.assert_array_equal(signal.convolve2d(a.copy(), b[:3, :3], "same"), first)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="mode flags"):
        signal.convolve2d(a, b[:3, :3], "Same")
    with pytest.raises(TypeError, match="stride"):
        signal.convolve2d(a, b[:3, :3], "same", stride=1.0)
