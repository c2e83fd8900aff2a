"""What only a real device has: streams, graphs, memory pools, several devices, torch's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.testing import random_array

pytestmark = pytest.mark.gpu


@pytest.fixture(name="cupy")
def _cupy() -> Any:
    return pytest.importorskip("cupy")


def rand(cupy: Any, *shape: int, seed: int = 0) -> Any:
    return cupy.asarray(random_array(np.random.default_rng(seed), shape, "float32"))


def served(plan: gpuconv.Plan) -> list[str]:
    return [c.algorithm for c in plan.candidates if c.rejected is None]


def test_the_default_backend_is_cuda_and_arrays_stay_there(cupy: Any) -> None:
    assert gpuconv.default_backend() == "cuda"
    y = gpuconv.conv2d(rand(cupy, 2, 3, 9, 9), rand(cupy, 4, 3, 3, 3))
    assert isinstance(y, cupy.ndarray)
    assert isinstance(gpuconv.asarray([1.0]), cupy.ndarray)
    host = gpuconv.conv2d(np.ones((1, 1, 5, 5)), np.ones((1, 1, 3, 3)))
    assert type(host) is np.ndarray


def test_work_goes_to_the_current_stream(cupy: Any) -> None:
    x, w = rand(cupy, 8, 32, 64, 64), rand(cupy, 32, 32, 3, 3, seed=1)
    expected = gpuconv.conv2d(x, w)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        later = x * 2  # written on the same stream: only its order makes the result right
        y = gpuconv.conv2d(later, w)
    stream.synchronize()
    cupy.testing.assert_allclose(y, 2 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 8, 20, 20), (1, 1, 64, 64), (2, 16, 14, 14)])
def test_a_warm_call_can_be_captured_in_a_graph(cupy: Any, shape: tuple[int, ...]) -> None:
    groups = 16 if shape[1] == 16 else 1
    x, w = rand(cupy, *shape), rand(cupy, shape[1], shape[1] // groups, 3, 3, seed=1)
    for algorithm in served(gpuconv.plan_conv2d(shape, w.shape, groups=groups, padding=1)):
        plan = gpuconv.plan_conv2d(shape, w.shape, groups=groups, padding=1, algorithm=algorithm)
        out = cupy.empty(shape, "float32")
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            expected = plan(x, w).copy()
            stream.synchronize()
            stream.begin_capture()
            plan(x, w, out=out)
            graph = stream.end_capture()
            out[...] = 0
            graph.launch(stream)
        stream.synchronize()
        cupy.testing.assert_array_equal(out, expected)


def test_a_full_memory_is_cupys_own_error(cupy: Any) -> None:
    x, w = rand(cupy, 1, 1, 512, 512), rand(cupy, 64, 1, 3, 3, seed=1)
    pool = cupy.get_default_memory_pool()
    before = pool.get_limit()
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            gpuconv.conv2d(x, w)
    finally:
        pool.set_limit(size=before)
    assert gpuconv.conv2d(x, w).shape == (1, 64, 510, 510)


def test_every_device_computes_its_own_arrays(cupy: Any) -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    results = []
    for ordinal in range(2):
        with cupy.cuda.Device(ordinal):
            x, w = rand(cupy, 2, 3, 16, 16), rand(cupy, 4, 3, 3, 3, seed=1)
        y = gpuconv.conv2d(x, w)
        assert y.device.id == ordinal
        results.append(y.get())
    np.testing.assert_array_equal(*results)
    with pytest.raises(TypeError, match="x is of cupy on cuda:0 but w is of cupy on cuda:1"):
        gpuconv.conv2d(_on(cupy, 0, x), w)


def _on(cupy: Any, ordinal: int, array: Any) -> Any:
    with cupy.cuda.Device(ordinal):
        return cupy.asarray(array.get())


def test_host_and_device_arrays_do_not_mix(cupy: Any) -> None:
    with pytest.raises(TypeError, match="x is of cupy on cuda:0 but w is of numpy on cpu"):
        gpuconv.conv2d(rand(cupy, 1, 1, 5, 5), np.ones((1, 1, 3, 3), np.float32))


def test_use_backend_moves_arrays_both_ways(cupy: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.random((1, 2, 9, 9)), rng.random((3, 2, 3, 3))
    with gpuconv.use_backend("cuda"):
        y = gpuconv.conv2d(x, w)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, gpuconv.conv2d(x, w), rtol=1e-12)
    with gpuconv.use_backend("numpy"):
        z = gpuconv.conv2d(cupy.asarray(x), cupy.asarray(w))
    assert isinstance(z, cupy.ndarray)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_go_in_and_out(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 3, 16, 16, device="cuda").to(getattr(torch, dtype))
    w = torch.randn(4, 3, 3, 3, device="cuda").to(getattr(torch, dtype))
    y = gpuconv.conv2d(x, w, padding=1)
    assert y.is_cuda
    assert y.dtype is x.dtype
    expected = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    tolerance = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    out = torch.zeros_like(y)
    assert gpuconv.conv2d(x, w, padding=1, out=out) is out
    assert torch.equal(out, y)
