"""The array type that comes in goes out, without a copy; what is mixed or no array is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

import gpuconv
from gpuconv import arrays

X = np.random.default_rng(0).standard_normal((2, 3, 8, 9)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)
Y = gpuconv.conv2d(X, W)


def test_numpy_views_and_subclasses():
    class Mine(np.ndarray):
        pass

    assert type(gpuconv.conv2d(X, W)) is np.ndarray
    np.testing.assert_array_equal(gpuconv.conv2d(X.view(Mine), W), Y)
    np.testing.assert_allclose(gpuconv.conv2d(X[:, ::-1], W[:, ::-1]), Y, rtol=1e-4, atol=1e-4)


def test_foreign_byte_order_is_read():
    y = gpuconv.conv2d(X.astype(">f4"), W)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, Y)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (4, 3, 1, 1), (4, 1, 3, 3), (3, 1, 1, 3)])
@pytest.mark.parametrize("dtype", ["int16", "uint64", "float32"])
def test_foreign_byte_order_is_written(shape, dtype):
    x, w = np.abs(X * 10).astype(dtype), np.full(shape, 3, dtype)
    y = gpuconv.conv2d(x[:, : 3 if shape[1] == 3 else 1], w)
    out = np.zeros(y.shape, y.dtype.newbyteorder(">"))
    for _ in range(2):  # also where the call is known from before
        out[...] = 0
        assert gpuconv.conv2d(x[:, : 3 if shape[1] == 3 else 1], w, out=out) is out
        np.testing.assert_array_equal(out, y)


def test_read_only_operands_are_fine():
    x = X.copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(gpuconv.conv2d(x, W), Y)


class TestTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    def test_in_and_out(self):
        y = gpuconv.conv2d(self.torch.from_numpy(X), self.torch.from_numpy(W))
        assert isinstance(y, self.torch.Tensor)
        np.testing.assert_array_equal(y.numpy(), Y)

    def test_memory_is_shared_both_ways(self):
        t = self.torch.from_numpy(X.copy())
        host = arrays.library_of("f", "x", t).to_host(t)
        assert np.shares_memory(host, t.numpy())
        back = arrays.library_of("f", "x", t).from_host(host, t)
        assert back.data_ptr() == t.data_ptr()

    def test_out_is_written_in_place(self):
        out = self.torch.zeros(Y.shape)
        y = gpuconv.conv2d(self.torch.from_numpy(X), self.torch.from_numpy(W), out=out)
        assert y is out
        np.testing.assert_array_equal(out.numpy(), Y)

    def test_bfloat16(self):
        pytest.importorskip("ml_dtypes")
        x, w = (self.torch.from_numpy(a).to(self.torch.bfloat16) for a in (X, W))
        out = self.torch.zeros(Y.shape, dtype=self.torch.bfloat16)
        y = gpuconv.conv2d(x, w, out=out)
        assert y.dtype is self.torch.bfloat16
        expected = self.torch.nn.functional.conv2d(x.double(), w.double())
        self.torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-3)

    def test_channels_last_memory_is_kept(self):
        x = self.torch.from_numpy(X).contiguous(memory_format=self.torch.channels_last)
        y = gpuconv.conv2d(x, self.torch.from_numpy(W))
        assert y.is_contiguous(memory_format=self.torch.channels_last)

    @pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 4, 5)])
    def test_one_channel_or_pixel_in_torchs_memory_formats(self, shape):
        torch = self.torch
        w = torch.ones(4, shape[1], 1, 1)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, memory_format=memory_format).fill_(1)
            theirs = torch.nn.functional.conv2d(x, w, padding=1)
            assert gpuconv.conv2d(x, w, padding=1).stride() == theirs.stride()

    def test_a_gradient_is_not_lost_silently(self):
        x = self.torch.from_numpy(X.copy()).requires_grad_()
        with pytest.raises(
            TypeError, match=r"conv2d: x: a torch tensor that requires grad.*detach"
        ):
            gpuconv.conv2d(x, self.torch.from_numpy(W))
        with self.torch.no_grad():
            np.testing.assert_array_equal(gpuconv.conv2d(x, self.torch.from_numpy(W)).numpy(), Y)

    def test_lazily_conjugated_tensors(self):
        x = self.torch.from_numpy(X * (1 + 2j)).conj()
        y = gpuconv.conv2d(x, self.torch.from_numpy(W))
        np.testing.assert_allclose(y.numpy(), Y * (1 - 2j), rtol=1e-4, atol=1e-4)


class TestJax:
    @pytest.fixture(autouse=True)
    def _jax(self):
        self.jnp = pytest.importorskip("jax.numpy")

    def test_in_and_out(self):
        y = gpuconv.conv2d(self.jnp.asarray(X), self.jnp.asarray(W))
        assert type(y) is type(self.jnp.asarray(X))
        np.testing.assert_array_equal(np.asarray(y), Y)

    def test_bfloat16(self):
        x, w = self.jnp.asarray(X, self.jnp.bfloat16), self.jnp.asarray(W, self.jnp.bfloat16)
        assert gpuconv.conv2d(x, w).dtype == self.jnp.bfloat16

    def test_same_padding_is_that_of_jax(self):
        lax = pytest.importorskip("jax.lax")
        for stride in (1, 2, 3):
            expected = lax.conv_general_dilated(X, W[:, :, :, :2], (stride, stride), "SAME")
            got = gpuconv.conv2d(X, W[:, :, :, :2], stride=stride, padding="same")
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)

    def test_a_result_that_jax_cannot_hold_is_refused(self):
        ints = self.jnp.ones((1, 1, 4, 4), "int32"), self.jnp.ones((1, 1, 3, 3), "int32")
        with pytest.raises(TypeError, match="conv2d: the result is int64, which JAX holds only"):
            gpuconv.conv2d(*ints)
        assert gpuconv.conv2d(*ints, dtype="int32").dtype == "int32"

    def test_tracers_are_sent_to_the_bridge(self):
        jax = pytest.importorskip("jax")
        w = self.jnp.asarray(W)
        with pytest.raises(TypeError, match=r"conv2d: x is a JAX tracer.*gpuconv\.jax"):
            jax.jit(lambda x: gpuconv.conv2d(x, w))(X)

    def test_out_cannot_be_written(self):
        out = self.jnp.zeros(Y.shape)
        with pytest.raises(ValueError, match="conv2d: out is a read-only jax array"):
            gpuconv.conv2d(self.jnp.asarray(X), self.jnp.asarray(W), out=out)


def test_array_api_strict():
    xp = pytest.importorskip("array_api_strict")
    x, w = xp.asarray(X), xp.asarray(W)
    y = gpuconv.conv2d(x, w)
    assert type(y) is type(x)
    np.testing.assert_array_equal(np.from_dlpack(y), Y)
    out = xp.zeros(Y.shape, dtype=xp.float32)
    assert gpuconv.conv2d(x, w, out=out) is out
    np.testing.assert_array_equal(np.from_dlpack(out), Y)
    host = arrays.library_of("f", "x", x).to_host(x)
    assert np.shares_memory(host, np.from_dlpack(x))


class Exporter:
    """What knows DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def test_dlpack_alone_is_enough():
    y = gpuconv.conv2d(Exporter(X), Exporter(W))
    np.testing.assert_array_equal(y, Y)
    out = np.zeros_like(Y)
    given = Exporter(out)
    assert gpuconv.conv2d(Exporter(X), Exporter(W), out=given) is given
    np.testing.assert_array_equal(out, Y)
    with pytest.raises(ValueError, match="conv2d: out has shape"):
        gpuconv.conv2d(Exporter(X), Exporter(W), out=Exporter(out[:1]))
    with pytest.raises(TypeError, match="x is of tests on cpu but w is of numpy"):
        gpuconv.conv2d(Exporter(X), W)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_out_whose_elements_are_one_place_is_refused(library):
    if library == "numpy":
        arrays_, one = (X, W), np.zeros(1, np.float32)
        out = np.lib.stride_tricks.as_strided(one, Y.shape, (0,) * 4)
        gpuconv.conv2d(X, W, out=np.zeros_like(Y))  # a call that is remembered, and is another
    else:
        torch = pytest.importorskip("torch")
        arrays_, one = (torch.from_numpy(X), torch.from_numpy(W)), torch.zeros(1)
        out = one.expand(Y.shape)
    with pytest.raises(ValueError, match=re.escape("conv2d: out has strides (0, 0, 0, 0), which")):
        gpuconv.conv2d(*arrays_, out=out)
    assert one[0] == 0


def test_mixed_libraries_are_refused_by_name():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError,
        match=re.escape(
            "conv2d: x is of numpy on cpu but w is of torch on cpu; bring them to one library"
        ),
    ):
        gpuconv.conv2d(X, torch.from_numpy(W))
    with pytest.raises(TypeError, match="conv2d: x is of torch on cpu but out is of numpy on cpu"):
        gpuconv.conv2d(torch.from_numpy(X), torch.from_numpy(W), out=np.zeros_like(Y))


def test_mixed_devices_are_refused_by_name():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="x is of torch on cpu but w is of torch on meta"):
        gpuconv.conv2d(torch.from_numpy(X), torch.from_numpy(W).to("meta"))


def test_devices_without_a_backend_are_refused_by_name():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="conv2d: x is of torch on meta, which no backend computes"):
        gpuconv.conv2d(torch.zeros(X.shape, device="meta"), torch.zeros(W.shape, device="meta"))


def test_what_a_library_cannot_hand_over_is_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"conv2d: w: .*Sparse"):
        gpuconv.conv2d(torch.from_numpy(X), torch.from_numpy(W).to_sparse())
    with pytest.raises(TypeError, match=r"conv2d: out: .*requires grad"):
        gpuconv.conv2d(
            torch.from_numpy(X), torch.from_numpy(W), out=torch.zeros(Y.shape, requires_grad=True)
        )


@pytest.mark.parametrize("value", [[[1.0]], 3.0, None, "x", object()])
def test_what_is_no_array_is_refused(value):
    name = re.escape(type(value).__name__)
    with pytest.raises(TypeError, match=rf"conv2d: x is a {name}; it takes an array \(NumPy"):
        gpuconv.conv2d(value, W)


def test_masked_arrays_are_refused():
    with pytest.raises(TypeError, match="conv2d: x is a masked array"):
        gpuconv.conv2d(np.ma.masked_array(X), W)


def test_unsupported_types_are_refused():
    with pytest.raises(TypeError, match=r"conv2d: x: dtype .* is not one that gpuconv computes"):
        gpuconv.conv2d(X.astype(object), W)
    with pytest.raises(TypeError, match=r"longdouble|float128"):
        gpuconv.conv2d(X, W.astype(np.longdouble))
