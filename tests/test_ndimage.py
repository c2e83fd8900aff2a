"""gpuconv.ndimage against scipy.ndimage: values, types, outputs, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import ndimage
from tests.emulator import emulated_device

scipy_ndimage = pytest.importorskip("scipy.ndimage")

TYPES = ("float64", "float32", "complex128", "complex64", "int64", "int32", "int16", "uint8")
MODES = (
    "reflect", "mirror", "nearest", "wrap", "constant", "grid-mirror", "grid-wrap",
    "grid-constant",
)  # fmt: skip
LARGEST = {1: 40, 2: 12, 3: 7, 4: 5, 5: 4}
FUNCTIONS = (
    "convolve", "correlate", "convolve1d", "correlate1d", "gaussian_filter", "gaussian_filter1d",
    "uniform_filter", "uniform_filter1d", "sobel", "prewitt", "laplace", "gaussian_laplace",
    "gaussian_gradient_magnitude",
)  # fmt: skip


def random_image(rng: np.random.Generator, ndim: int, dtype: str | None = None) -> np.ndarray:
    shape = tuple(rng.integers(1, LARGEST[ndim], ndim))
    dtype = dtype or str(rng.choice(TYPES))
    values = 40 * rng.standard_normal(shape)
    if dtype.startswith("complex"):
        values = values + 40j * rng.standard_normal(shape)
    if dtype.startswith("uint"):
        values = np.abs(values)
    return np.asarray(values).astype(dtype)


def random_options(
    rng: np.random.Generator, function: str, image: np.ndarray
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments after the image."""
    ndim = image.ndim
    axis = int(rng.integers(-ndim, ndim))
    kwargs: dict[str, Any] = {"mode": str(rng.choice(MODES)), "cval": float(rng.choice([0, 2.5]))}
    if rng.random() < 0.3:
        real = str(rng.choice(["float64", "float32", "int32"]))
        kwargs["output"] = "complex128" if image.dtype.kind == "c" else real
    many = not function.endswith("1d") and function not in ("convolve", "correlate")
    axes = tuple(range(ndim))
    if function not in ("sobel", "prewitt") and not function.endswith("1d") and rng.random() < 0.4:
        axes = tuple(sorted(map(int, rng.permutation(ndim)[: rng.integers(1, ndim + 1)])))
        kwargs["axes"] = axes
    if many and rng.random() < 0.4:
        each = ndim if function in ("sobel", "prewitt") else len(axes)
        kwargs["mode"] = [str(m) for m in rng.choice(MODES, each)]
    sigma = float(rng.choice([0.5, 1, 2]))
    if function in ("convolve", "correlate"):
        taps = tuple(map(int, rng.integers(1, 5 if ndim < 4 else 4, len(axes))))
        weights = rng.integers(-3, 4, taps).astype(str(rng.choice(["float64", "int32"])))
        if rng.random() < 0.25:
            weights = weights + 1j * rng.integers(-3, 4, taps)
            kwargs.pop("output", None)
        origin = [int(rng.integers(-(k // 2), (k - 1) // 2 + 1)) for k in taps]
        if function == "convolve" and rng.random() < 0.5:
            origin = 0 if rng.random() < 0.5 else [0] * len(taps)  # type: ignore[assignment]
        return (weights,), {**kwargs, "origin": origin}
    if function in ("convolve1d", "correlate1d"):
        k = int(rng.integers(1, 7))
        origin_1d = int(rng.integers(-(k // 2), (k - 1) // 2 + 1))
        weights = rng.integers(-3, 4, k).astype(str(rng.choice(["float64", "int32"])))
        return (weights,), {**kwargs, "axis": axis, "origin": origin_1d}
    if function == "gaussian_filter":
        if rng.random() < 0.3:
            kwargs["radius"] = [int(r) for r in rng.integers(0, 4, len(axes))]
        return (sigma, int(rng.integers(0, 3))), kwargs
    if function == "gaussian_filter1d":
        return (sigma, axis, int(rng.integers(0, 4))), {**kwargs, "truncate": 3.0}
    if function == "uniform_filter1d":
        size = int(rng.integers(1, 6))
        origin_1d = int(rng.integers(-(size // 2), (size - 1) // 2 + 1))
        return (size,), {**kwargs, "axis": axis, "origin": origin_1d}
    if function == "uniform_filter":
        return ([int(n) for n in rng.integers(1, 6, len(axes))],), kwargs
    if function in ("sobel", "prewitt"):
        return (axis,), kwargs
    if function == "laplace":
        return (), kwargs
    if function == "gaussian_gradient_magnitude":  # see the test of its axes
        kwargs = {"mode": str(rng.choice(MODES)), "cval": kwargs["cval"]}
    return (sigma,), kwargs


def assert_same(got: Any, expected: Any, image: np.ndarray, function: str, context: Any) -> None:
    assert got.shape == expected.shape, context
    assert got.dtype == expected.dtype, context
    if expected.dtype.kind not in "iu":
        single = "float32" in (image.dtype.name, expected.dtype.name)
        single |= "complex64" in (image.dtype.name, expected.dtype.name)
        # SciPy sums float32 in float64, gpuconv in float32.
        tolerance = (3e-6 if single else 1e-13) * (100 + np.abs(expected).max(initial=0))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance, err_msg=str(context))
    elif "gaussian" not in function:
        np.testing.assert_array_equal(got, expected, err_msg=str(context))
    else:  # sums beside an integer are truncated to one or the other; derivatives sum several
        bits = 8 * expected.dtype.itemsize
        off = (got.astype(np.int64) - expected.astype(np.int64)) % (1 << min(bits, 62))
        off = np.minimum(off, (1 << min(bits, 62)) - off)
        assert (off <= max(image.ndim, 2) ** 2).all(), (context, off.max())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # SciPy's, of casts
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5])
def test_it_is_scipys(function: str, ndim: int) -> None:
    rng = np.random.default_rng(ndim + 100 * FUNCTIONS.index(function))
    for seed in range(25):
        image = random_image(rng, ndim)
        if function == "gaussian_gradient_magnitude" and image.dtype.kind in "iu":
            image = image.astype(np.float64)  # squares of truncated integers: any bit may differ
        elif "gaussian" in function and image.dtype.kind == "u":
            image = image.astype(np.int32)  # 0 or -1: the next pass would tell them apart
        args, kwargs = random_options(rng, function, image)
        context = seed, image.shape, image.dtype, args, kwargs
        expected = getattr(scipy_ndimage, function)(image, *args, **kwargs)
        got = getattr(ndimage, function)(image, *args, **kwargs)
        assert_same(got, expected, image, function, context)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0), (-1, 0), (1, -1)])
@pytest.mark.parametrize("function", ["convolve", "correlate"])
def test_weights_lie_along_the_axes_as_scipys_do(function: str, order: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image, weights = rng.random((6, 7, 8)), rng.random((3, 4))
    kwargs: dict[str, Any] = {"axes": order, "origin": (1, 0), "mode": "wrap"}
    if function == "convolve":
        kwargs["origin"] = (0, -1)
    expected = getattr(scipy_ndimage, function)(image, weights, **kwargs)
    np.testing.assert_allclose(getattr(ndimage, function)(image, weights, **kwargs), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extent", [1, 2, 3])
def test_filters_far_larger_than_the_image(mode: str, extent: int) -> None:
    image = np.arange(1.0, extent + 1)
    weights = np.arange(1.0, 12)
    np.testing.assert_allclose(
        ndimage.correlate1d(image, weights, mode=mode, cval=2),
        scipy_ndimage.correlate1d(image, weights, mode=mode, cval=2),
    )


def test_output_array_is_written_and_returned() -> None:
    image = np.arange(30.0).reshape(5, 6)
    for dtype in (np.float64, np.float32, np.int16):
        out = np.empty((5, 6), dtype)
        for call in (
            lambda m, out: m.convolve(image, [[1, 2], [3, 4]], output=out),
            lambda m, out: m.gaussian_filter(image, 1.0, output=out),
            lambda m, out: m.sobel(image, output=out),
            lambda m, out: m.laplace(image, output=out),
            lambda m, out: m.gaussian_gradient_magnitude(image, 1.0, output=out),
            lambda m, out: m.generic_laplace(image, m.sobel, output=out),
        ):
            expected = np.empty_like(out)
            call(scipy_ndimage, expected)
            assert call(ndimage, out) is out
            np.testing.assert_allclose(
                out, expected, rtol=1e-6, atol=2 if dtype == np.int16 else 1e-5
            )


def test_output_may_be_the_image_itself_or_overlap_it() -> None:
    expected = scipy_ndimage.gaussian_filter(np.arange(64.0).reshape(8, 8), 1.0)
    image = np.arange(64.0).reshape(8, 8)
    ndimage.gaussian_filter(image, 1.0, output=image)
    np.testing.assert_allclose(image, expected)
    buffer = np.arange(40.0)
    expected = scipy_ndimage.correlate1d(buffer[:-3].copy(), [1, 2, 3])
    ndimage.correlate1d(buffer[:-3], [1, 2, 3], output=buffer[3:])
    np.testing.assert_allclose(buffer[3:], expected)


@pytest.mark.parametrize("output", [np.float32, "float32", np.dtype("float32"), "f"])
def test_output_types(output: Any) -> None:
    assert ndimage.convolve(np.arange(5), [1, 1], output=output).dtype == np.float32


def test_the_type_is_the_images_and_integers_are_truncated() -> None:
    image = np.array([[1, 2], [3, 250]], np.uint8)
    assert ndimage.convolve(image, [[0.5, 0.5]]).tolist() == [[1, 2], [126, 250]]
    assert ndimage.uniform_filter(image, 3).dtype == np.uint8
    assert ndimage.gaussian_filter(image.astype(np.float16), 1.0).dtype == np.float16
    assert ndimage.convolve(image, [[1j]]).dtype == np.complex64


def test_complex_weights_promote_a_real_output_with_a_warning() -> None:
    image = np.arange(5.0)
    with pytest.warns(UserWarning, match="promoting specified output dtype to complex"):
        got = ndimage.correlate1d(image, [1, 1j], output=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = scipy_ndimage.correlate1d(image, [1, 1j], output=np.float32)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected)


def test_cval_of_a_complex_image() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((5, 6)) + 1j * rng.random((5, 6))
    for weights in (np.ones((3, 2)), np.full((3, 2), 1 + 2j)):
        for function in ("convolve", "correlate"):
            args = (image, weights)
            kwargs = {"mode": "constant", "cval": 2 - 3j}
            np.testing.assert_allclose(
                getattr(ndimage, function)(*args, **kwargs),
                getattr(scipy_ndimage, function)(*args, **kwargs),
            )


def test_generic_filters_pass_their_arguments_on() -> None:
    image = np.random.default_rng(0).random((6, 7))

    def derivative(
        x: Any, axis: int, output: Any, mode: str, cval: Any, a: float, b: float = 1
    ) -> Any:
        weights = [-a * b, 0, a * b]
        return scipy_ndimage.correlate1d(x, weights, axis, output, mode, cval)

    for name in ("generic_laplace", "generic_gradient_magnitude"):
        for kwargs in (
            {"extra_arguments": (2,)},
            {"extra_arguments": (2,), "extra_keywords": {"b": 3}, "mode": ["wrap", "nearest"]},
            {"extra_keywords": {"a": 0.5}, "axes": (1,), "output": np.float32},
        ):
            got = getattr(ndimage, name)(image, derivative, **kwargs)
            expected = getattr(scipy_ndimage, name)(image, derivative, **kwargs)
            assert got.dtype == expected.dtype
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_gradients_axes_are_those_that_are_filtered() -> None:
    """As documented; SciPy smooths along the others too."""
    image = np.random.default_rng(0).random((5, 6, 7))
    slopes = [scipy_ndimage.gaussian_filter(image, (1, 0, 2), o) for o in ((1, 0, 0), (0, 0, 1))]
    got = ndimage.gaussian_gradient_magnitude(image, (1, 2), axes=(0, 2))
    np.testing.assert_allclose(got, np.hypot(*slopes))


def test_generic_filters_leave_what_the_derivative_returns_as_it_was() -> None:
    image = np.ones((3, 3))
    ndimage.generic_laplace(image, lambda x, *args: x)
    assert image.tolist() == np.ones((3, 3)).tolist()


def test_images_without_pixels_or_axes() -> None:
    assert ndimage.gaussian_filter(np.zeros((0, 4), np.float32), 1.0).shape == (0, 4)
    assert ndimage.sobel(np.zeros((3, 0))).shape == (3, 0)
    image = np.arange(4.0)
    for same in (
        ndimage.gaussian_filter(image, 0),
        ndimage.uniform_filter(image, 1),
        ndimage.gaussian_filter(image, 1, axes=()),
        ndimage.laplace(image, axes=()),
    ):
        assert same.tolist() == image.tolist()
        assert not np.may_share_memory(same, image)


def test_views_of_any_strides() -> None:
    big = np.random.default_rng(0).random((20, 30, 3))
    for view in (big[::-2, ::3], big.transpose(2, 0, 1), big[:, ::-1, 1]):
        np.testing.assert_allclose(
            ndimage.gaussian_filter(view, 1.0), scipy_ndimage.gaussian_filter(view, 1.0)
        )
        np.testing.assert_allclose(
            ndimage.correlate1d(view, [1, 2, 4], 0), scipy_ndimage.correlate1d(view, [1, 2, 4], 0)
        )


A = np.arange(12.0).reshape(3, 4)
REFUSED = [
    (RuntimeError, "convolve", (A, [1, 2]), {}, r"weights.ndim \(1\) must match len\(axes\) \(2\)"),
    (RuntimeError, "correlate", (A, np.ones((0, 3))), {}, "with no empty axis"),
    (RuntimeError, "correlate", (A, [[1]]), {"axes": (0,)}, r"must match len\(axes\) \(1\)"),
    (RuntimeError, "correlate1d", (A, []), {}, "no filter weights given"),
    (RuntimeError, "correlate1d", (A, [[1]]), {}, "no filter weights given"),
    (ValueError, "correlate1d", (A, [1, 2, 3]), {"origin": 2}, "Invalid origin; .*got 2 for 3"),
    (ValueError, "convolve1d", (A, [1, 2]), {"origin": 1}, "Invalid origin"),
    (ValueError, "convolve", (A, np.ones((3, 3))), {"origin": (0, -2)}, "Invalid origin"),
    (RuntimeError, "convolve", (A, np.ones((3, 3))), {"origin": (0, 0, 0)}, "sequence argument"),
    (ValueError, "uniform_filter1d", (A, 3), {"origin": 3}, "invalid origin"),
    (RuntimeError, "uniform_filter1d", (A, 0), {}, "incorrect filter size"),
    (RuntimeError, "convolve", (A, [[1]]), {"mode": "spam"}, "boundary mode not supported: 'spam'"),
    (RuntimeError, "convolve", (A, [[1]]), {"mode": ["wrap", "wrap"]}, "sequence of modes"),
    (RuntimeError, "gaussian_filter", (A, 1.0), {"mode": ["wrap"]}, "sequence argument must have"),
    (RuntimeError, "gaussian_filter", (A, (1.0, 1.0, 1.0)), {}, "sequence argument must have"),
    (ValueError, "gaussian_filter1d", (A, 1.0), {"radius": -1}, "nonnegative integer; got -1"),
    (ValueError, "gaussian_filter1d", (A, 1.0), {"radius": 1.5}, "nonnegative integer; got 1.5"),
    (ValueError, "gaussian_filter1d", (A, 1.0), {"order": -1}, "order must be non-negative"),
    (ValueError, "gaussian_filter", (A, 1.0), {"axes": (0, 0)}, "axes must be unique"),
    (ValueError, "laplace", (A,), {"axes": 2}, "specified axis: 2 is out of range"),
    (ValueError, "convolve", (A, [[1]]), {"axes": 1.5j}, "axes must be an integer|integer"),
    (np.exceptions.AxisError, "sobel", (A, 2), {}, "axis 2 is out of bounds"),
    (np.exceptions.AxisError, "correlate1d", (A, [1]), {"axis": -3}, "axis -3 is out of bounds"),
    (RuntimeError, "convolve", (A, [[1]]), {"output": np.empty((4, 3))}, "output shape not corr"),
    (RuntimeError, "convolve", (A, [[1j]]), {"output": A.copy()}, "output must have complex dtype"),
    (RuntimeError, "convolve", (A, [[1j]]), {"output": "float64"}, "output must have complex"),
    (ValueError, "convolve", (A, [[1j]]), {"cval": 1j}, "complex-valued cval when the input is"),
    (ValueError, "correlate", (A, [[1]]), {"output": np.broadcast_to(A, (3, 4))}, "read-only"),
    (TypeError, "correlate", (A.astype(object), [[1]]), {}, "not one that gpuconv computes"),
    (TypeError, "correlate", (np.ma.array(A), [[1]]), {}, "masked array"),
    (TypeError, "correlate", (A, [[1]]), {"output": "spam"}, "'spam' is not one"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "function", "args", "kwargs", "message"), REFUSED)
def test_what_is_refused(error: Any, function: str, args: Any, kwargs: Any, message: str) -> None:
    if "axes" in kwargs and kwargs["axes"] == 1.5j:
        error = (ValueError, TypeError)
    with pytest.raises(error, match=message):
        getattr(ndimage, function)(*args, **kwargs)


def test_nothing_is_written_after_an_error() -> None:
    out = np.full((3, 4), 7.0)
    with pytest.raises(ValueError, match="Invalid origin"):
        ndimage.correlate(A, np.ones((3, 3)), output=out, origin=5)
    assert (out == 7).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_torch_in_torch_out(function: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    image = random_image(rng, 2, "float64")
    args, kwargs = random_options(rng, function, image)
    kwargs.pop("output", None)
    expected = getattr(ndimage, function)(image, *args, **kwargs)
    weights = tuple(a.tolist() if isinstance(a, np.ndarray) else a for a in args)
    got = getattr(ndimage, function)(torch.from_numpy(image), *weights, **kwargs)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), expected)
    tensors = tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args)
    got = getattr(ndimage, function)(torch.from_numpy(image), *tensors, **kwargs)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_torch_outputs() -> None:
    torch = pytest.importorskip("torch")
    image = torch.arange(12.0).reshape(3, 4)
    out = torch.empty((3, 4), dtype=torch.float64)
    assert ndimage.gaussian_filter(image, 1.0, output=out) is out
    np.testing.assert_allclose(out, scipy_ndimage.gaussian_filter(image.numpy(), 1.0, output="d"))
    assert ndimage.sobel(image, output=torch.float64).dtype is torch.float64
    with pytest.raises(TypeError, match="input is of torch on cpu but weights is of numpy"):
        ndimage.convolve(image, np.ones((2, 2)))


def test_jax_and_array_api_strict_in_and_out() -> None:
    jnp = pytest.importorskip("jax.numpy")
    strict = pytest.importorskip("array_api_strict")
    image = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = scipy_ndimage.gaussian_filter(image, 1.0)
    for array in (jnp.asarray(image), strict.asarray(image)):
        got = ndimage.gaussian_filter(array, 1.0)
        assert type(got) is type(array)
        np.testing.assert_allclose(np.from_dlpack(got), expected, rtol=1e-5)
        assert ndimage.convolve(array, [[1, 2]], output=array.dtype).dtype == array.dtype
    with pytest.raises(ValueError, match="output is a read-only jax array"):
        ndimage.sobel(jnp.asarray(image), output=jnp.asarray(image))


@pytest.fixture(scope="module")
def cuda() -> Any:
    with emulated_device() as device:
        yield device


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_backends_agree(cuda: Any, function: str) -> None:
    rng = np.random.default_rng(FUNCTIONS.index(function))
    for ndim in (1, 2, 3, 4):
        for seed in range(3):
            image = random_image(rng, ndim)
            args, kwargs = random_options(rng, function, image)
            expected = getattr(ndimage, function)(image, *args, **kwargs)
            with gpuconv.use_backend("cuda"):
                got = getattr(ndimage, function)(image, *args, **kwargs)
            context = seed, image.shape, image.dtype, args, kwargs
            assert_same(got, expected, image, function + "gaussian", context)


def test_output_on_the_other_backend(cuda: Any) -> None:
    image, out = np.arange(12.0).reshape(3, 4), np.empty((3, 4), np.float32)
    with gpuconv.use_backend("cuda"):
        assert ndimage.gaussian_filter(image, 1.0, output=out) is out
    np.testing.assert_allclose(out, scipy_ndimage.gaussian_filter(image, 1.0), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16"])
@pytest.mark.parametrize("size", [2, 3, 7, 31, 63, 64, 65])
def test_means_of_integers_are_scipys(dtype, size):
    rng = np.random.default_rng(size)
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, (70, 90), dtype, endpoint=True)
    x[:40] = x[:40] // 64 * 64  # quotients that are whole numbers
    x[:20] = rng.integers(0, 2, (20, 90)) * limits.max
    for mode in ("reflect", "constant"):
        np.testing.assert_array_equal(
            ndimage.uniform_filter(x, size, mode=mode),
            scipy_ndimage.uniform_filter(x, size, mode=mode),
        )


@pytest.mark.parametrize("shape", [(40, 50), (600, 700)])
@pytest.mark.parametrize("x_type", ["uint8", "int32", "float32", "float64"])
@pytest.mark.parametrize("output", ["uint8", "int16", "int64", "bool"])
def test_sums_are_cut_off_and_wrap_as_scipys(shape, x_type, output):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 200, shape).astype(x_type)
    for w in (rng.integers(-9, 9, (3, 3)) + 0.25, rng.integers(-9, 9, (5, 3)) * 1.0):
        expected = scipy_ndimage.correlate(x.astype(np.float64), w).astype(np.int64).astype(output)
        np.testing.assert_array_equal(ndimage.correlate(x, w, output=output), expected)


REPEATED: dict[str, Any] = {
    "convolve": lambda x, **options: ndimage.convolve(x, WEIGHTS, **options),
    "correlate at an origin": lambda x, **options: ndimage.correlate(
        x, WEIGHTS, mode="nearest", origin=[-1, 1], **options
    ),
    "convolve1d": lambda x, **options: ndimage.convolve1d(x, WEIGHTS[0], 0, **options),
    "correlate1d": lambda x, **options: ndimage.correlate1d(x, WEIGHTS[0], **options),
    "gaussian_filter": lambda x, **options: ndimage.gaussian_filter(x, (1, 2.0), **options),
    "gaussian_filter1d": lambda x, **options: ndimage.gaussian_filter1d(x, 1.0, **options),
    "uniform_filter": lambda x, **options: ndimage.uniform_filter(x, 3, **options),
    "uniform_filter1d": lambda x, **options: ndimage.uniform_filter1d(x, 4, **options),
    "sobel": lambda x, **options: ndimage.sobel(x, 0, **options),
    "prewitt": lambda x, **options: ndimage.prewitt(x, mode=["wrap", "mirror"], **options),
    "laplace": lambda x, **options: ndimage.laplace(x, **options),
    "gaussian_laplace": lambda x, **options: ndimage.gaussian_laplace(x, 1, **options),
    "gaussian_gradient_magnitude": lambda x, **options: ndimage.gaussian_gradient_magnitude(
        x, 1, truncate=3.0, **options
    ),
}
WEIGHTS = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64"])
@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_call_gives_what_the_first_would(name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    call = REPEATED[name]
    for options in ({}, {"output": "float32"}, {"output": np.int16}):
        ndimage._calls.clear()
        call(random_of(rng, dtype), **options)
        x = random_of(rng, dtype)
        again, into = call(x, **options), np.zeros(x.shape, again_type(x, options))
        ndimage._calls.clear()
        expected = call(x, **options)
        np.testing.assert_array_equal(again, expected)
        assert again.dtype == expected.dtype
        for _ in range(2):
            into[...] = 0
            assert call(x, output=into) is into
            np.testing.assert_array_equal(into, expected)


def random_of(rng: np.random.Generator, dtype: str) -> np.ndarray:
    return (200 * rng.random((9, 11))).astype(dtype)


def again_type(x: np.ndarray, options: Any) -> Any:
    return options.get("output", x.dtype)


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeated_call_asks_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((9, 11), np.float32)
    first = REPEATED[name](image)
    monkeypatch.setattr(ndimage, "_Call", None)
    np.testing.assert_array_equal(REPEATED[name](image.copy()), first)


def test_repeated_calls_see_their_own_weights_and_options() -> None:
    image = np.arange(20, dtype=np.uint8).reshape(4, 5)
    for weights in ([[1.0, 1.0]], [[0.5, 0.25]], [[300.0, 7.0]], [[0.5, 0.25]]):
        np.testing.assert_array_equal(
            ndimage.correlate(image, np.array(weights)), scipy_ndimage.correlate(image, weights)
        )
    square = np.arange(9, dtype=np.uint8).reshape(3, 3)
    for scale in (1, 20):
        np.testing.assert_array_equal(
            ndimage.convolve(square * scale, square * scale),
            scipy_ndimage.convolve(square * scale, square * scale),
        )
    weights = np.ones((2, 2))
    for origin in (0, -1, [0, -1]):
        np.testing.assert_array_equal(
            ndimage.correlate(image, weights, origin=origin),
            scipy_ndimage.correlate(image, weights, origin=origin),
        )
    with pytest.raises(TypeError):
        ndimage.correlate(image, weights, origin=0.0)


def test_a_repeated_call_checks_its_output() -> None:
    image = np.ones((4, 5))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="output shape"):
            ndimage.sobel(image, output=np.ones((4, 4)))
        ndimage.sobel(image, output=image)
        frozen = np.ones((4, 5))
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            ndimage.sobel(image, output=frozen)
