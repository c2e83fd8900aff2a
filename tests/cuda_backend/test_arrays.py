"""Arrays of other libraries through the CUDA backend, and the caller's `out`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import arrays, cuda_backend, dtypes
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device

X = np.arange(2 * 3 * 5 * 6, dtype=np.float32).reshape(2, 3, 5, 6)
W = np.ones((4, 3, 3, 3), np.float32)


def expected(x: Any = X, w: Any = W) -> Any:
    with gpuconv.use_backend("numpy"):
        return gpuconv.conv2d(x, w)


def test_host_arrays_go_there_and_back(cuda_device: Any) -> None:
    y = gpuconv.conv2d(X, W)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, expected())


def test_host_out_is_written(cuda_device: Any) -> None:
    out = np.empty_like(expected())
    assert gpuconv.conv2d(X, W, out=out) is out
    np.testing.assert_array_equal(out, expected())


def test_device_out_is_written_in_place(cuda_device: Any) -> None:
    x, w = on_device(cuda_device, X), on_device(cuda_device, W)
    whole = on_device(cuda_device, np.zeros((2, 8, 3, 4), np.float32))
    out = whole[:, ::-2]
    assert gpuconv.conv2d(x, w, out=out) is out
    np.testing.assert_array_equal(on_host(whole)[:, ::-2], expected())
    np.testing.assert_array_equal(on_host(whole)[:, ::2], 0)


def test_out_may_overlap_x(cuda_device: Any) -> None:
    x = on_device(cuda_device, X.copy())
    w = on_device(cuda_device, np.ones((3, 3, 3, 3), np.float32))
    y = gpuconv.conv2d(x, w, padding=1, out=x)
    assert y is x
    with gpuconv.use_backend("numpy"):
        again = gpuconv.conv2d(X, np.ones((3, 3, 3, 3), np.float32), padding=1)
    np.testing.assert_array_equal(on_host(x), again)


def test_torch_on_the_host(cuda_device: Any) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        x, w = torch.from_numpy(X).to(dtype), torch.from_numpy(W).to(dtype)
        y = gpuconv.conv2d(x, w)
        assert isinstance(y, torch.Tensor)
        with gpuconv.use_backend("numpy"):
            assert torch.equal(y, gpuconv.conv2d(x, w))


def test_elements_at_odd_addresses_are_copied_first(cuda_device: Any) -> None:
    """Fields of packed structs: no kernel could load them."""
    if cuda_device.xp is not np:
        pytest.skip("CuPy has no such views; host arrays are copied anyway")
    packed = np.zeros(X.shape, np.dtype([("tag", "u1"), ("value", "<f4")]))
    packed["value"] = X
    np.testing.assert_array_equal(gpuconv.conv2d(packed["value"], W), expected())
    shifted = np.zeros(X.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(X.shape)
    shifted[...] = X
    np.testing.assert_array_equal(gpuconv.conv2d(shifted, W), expected())
    y = np.zeros(expected().nbytes + 1, np.uint8)[1:].view(np.float32).reshape(expected().shape)
    gpuconv.conv2d(X, W, out=y)
    np.testing.assert_array_equal(y, expected())


def test_foreign_byte_order_is_converted(cuda_device: Any) -> None:
    y = gpuconv.conv2d(X.astype(">f4"), W)
    np.testing.assert_array_equal(y, expected())
    out = np.zeros(y.shape, ">f4")
    gpuconv.conv2d(X, W, out=out)
    np.testing.assert_array_equal(out, y)


# ---- CUDA arrays of other libraries, at the seam ------------------------------------------------


class FakeCupyArray:
    """As much of a cupy.ndarray as entering and leaving looks at."""

    def __init__(self, dtype: Any = "float32", pointer: int = 512) -> None:
        self.dtype = np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self.strides = (self.itemsize,)
        self.data = SimpleNamespace(ptr=pointer)

    def view(self, dtype: Any) -> FakeCupyArray:
        return FakeCupyArray(dtype, self.data.ptr)

    def get(self) -> Any:
        return np.zeros(3, self.dtype)


class Foreign:
    """A DLPack library's array on cuda:0."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def __dlpack__(self, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda y: self.taken.append(y) or "theirs")


def cupy_device(**functions: Any) -> Any:
    cuda = SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0))
    return SimpleNamespace(xp=SimpleNamespace(cuda=cuda, **functions), ordinal=0)


def test_a_dlpack_array_is_taken_without_a_copy() -> None:
    mine, theirs = FakeCupyArray(), Foreign()
    library = arrays.library_of("test", "x", theirs)
    assert library.device(theirs) == "cuda:0"
    device = cupy_device(from_dlpack=lambda x: mine if x is theirs else None)
    assert cuda_backend.take(theirs, library, device) is mine
    assert cuda_backend.take_out(theirs, library, device) is mine
    assert cuda_backend.give(mine, library, theirs) == "theirs"
    # An `out` is theirs already, but their stream has to wait for ours: they take it in again.
    cuda_backend.give_out(mine, library, theirs)
    assert theirs.taken == [mine, mine]


def test_out_of_a_dlpack_library_on_a_device_is_not_shown_to_numpy() -> None:
    theirs = Foreign()
    theirs.shape = (2, 3)  # type: ignore[attr-defined]
    library = arrays.library_of("test", "out", theirs)
    assert library.writable(theirs)
    assert len(library.strides(theirs)) == 2


def test_jax_is_given_a_result_once_its_operands_have_been_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JAX reuses the memory of what is dropped, whatever CuPy's stream has still to read of it."""
    log: list[Any] = []
    stream = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    cupy = SimpleNamespace(
        ascontiguousarray=lambda y: y, cuda=SimpleNamespace(get_current_stream=lambda: stream)
    )
    jax = SimpleNamespace(numpy=SimpleNamespace(from_dlpack=log.append))
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "jax", jax)  # type: ignore[arg-type]
    arrays._Jax().from_cuda("y", None)
    assert log == ["synchronize", "y"]


class HeldByCupy(np.ndarray):
    """A host array that passes for CuPy's: ``asarray`` copies in C order, ``get`` copies back."""

    def get(self) -> Any:
        return np.array(self, order="C", subok=False)


def test_memory_orders_survive_the_way_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cupy_device(asarray=lambda x: np.array(x, order="C").view(HeldByCupy))
    monkeypatch.setattr(cuda_backend, "_addressable", lambda array: True)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(X, 1, -1)), -1, 1)
    for host in (X, last, X.transpose(0, 3, 1, 2), X[:, ::-1, ::2], X[0, 0], X[:1, :, :1]):
        taken = cuda_backend.take(host, arrays.NUMPY, device)
        np.testing.assert_array_equal(taken, host)
    assert cuda_backend.take(last, arrays.NUMPY, device).strides == last.strides


def test_memory_orders_survive_the_way_back() -> None:
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(X, 1, -1)), -1, 1)
    order, back = cuda_backend._memory_order(last)
    given = last.view(HeldByCupy).transpose(order).get().transpose(back)
    np.testing.assert_array_equal(given, last)
    assert given.strides == last.strides


def test_an_unaligned_array_on_the_device_is_copied_by_bytes() -> None:
    odd = np.random.default_rng(0).integers(0, 256, 41, np.uint8)[1:].view(np.float32).reshape(2, 5)
    device = cupy_device(from_dlpack=lambda x: odd, ndarray=np.ndarray, array=np.array)
    library = arrays.library_of("test", "x", Foreign())
    taken = cuda_backend.take(Foreign(), library, device)
    assert cuda_backend._addressable(taken)
    assert taken.dtype == odd.dtype
    assert taken.tobytes() == odd.tobytes()
    with pytest.raises(ValueError, match="no kernel can write"):
        cuda_backend.take_out(Foreign(), library, device)


def test_bfloat16_of_torch_travels_as_int16() -> None:
    torch = pytest.importorskip("torch")
    seen = []

    def from_dlpack(tensor: Any) -> Any:
        seen.append(tensor.dtype)
        return FakeCupyArray("int16")

    library = arrays.library_of("test", "x", torch.ones(3))
    taken = library.to_cuda(
        torch.ones(3, dtype=torch.bfloat16), SimpleNamespace(from_dlpack=from_dlpack)
    )
    assert seen == [torch.int16]
    assert taken.dtype == dtypes.BFLOAT16.numpy


def test_a_tensor_that_requires_grad_is_refused_there_too() -> None:
    torch = pytest.importorskip("torch")
    library = arrays.library_of("test", "x", torch.ones(3))
    with pytest.raises(TypeError, match="requires grad"):
        library.to_cuda(torch.ones(3, requires_grad=True), None)


def test_a_lazily_conjugated_out_is_refused() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 1, 4, dtype=torch.complex64)
    out = torch.empty(1, 1, 4, dtype=torch.complex64).conj()
    with pytest.raises(ValueError, match="out is a read-only torch array"):
        gpuconv.conv1d(x, torch.ones(1, 1, 1, dtype=torch.complex64), out=out)


def test_a_call_runs_on_its_arrays_device() -> None:
    log = []

    class Current:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            log.append(self.ordinal)

        def __exit__(self, *error: Any) -> None: ...

    device = cupy_device()
    device.xp.cuda.Device = Current
    with cuda_backend.active(device):
        assert log == []
    device.ordinal = 1
    with cuda_backend.active(device):
        assert log == [1]


def test_a_plan_launches_on_the_device_of_the_arrays() -> None:
    """Planned for one GPU, called with arrays of another."""
    with emulated_device() as planned, gpuconv.use_backend("cuda"):
        plan = gpuconv.plan_conv2d(X.shape, W.shape)
        with emulated_device() as other:
            np.testing.assert_array_equal(plan(X, W), expected())
        assert (planned.launches, other.launches) == (0, 1)


def test_warmup_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_device() as device, gpuconv.use_backend("cuda"):
        plans = [
            gpuconv.plan_conv2d(X.shape, W.shape, bias=True),
            gpuconv.plan_conv2d((2, 5, 6, 3), W.shape, layout="NHWC", dtype="float16"),
            gpuconv.plan_conv2d((0, 3, 5, 6), W.shape),
        ]
        gpuconv.warmup(*plans)
        monkeypatch.setattr(device, "load", None)
        for plan in plans[:2]:
            x, w, bias = (
                np.ones(shape, dtype.numpy)
                for shape, dtype in (
                    (plan.problem.x_shape, plan.problem.x_dtype),
                    (plan.problem.w_shape, plan.problem.w_dtype),
                    ((4,), plan.problem.y_dtype),
                )
            )
            if plan.problem.channels_last:
                x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
            plan(x, w, bias if plan.problem.bias else None)
        assert device.launches == 2
    gpuconv.warmup(gpuconv.plan_conv1d((1, 1, 4), (1, 1, 2), backend="numpy"))
