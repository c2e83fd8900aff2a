"""Repeated calls: the same bits as first ones, and what reaches the driver, to the byte."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import execute
from gpuconv.cuda_backend import prepared
from gpuconv.cuda_backend.launch import Launch, Layout
from gpuconv.plan import Plan, choose
from gpuconv.testing import random_case
from tests.cuda_backend.conftest import on_device, on_host


def served(problem: Any, device: Any) -> list[Plan]:
    """A plan for every algorithm that can serve."""
    plan = choose("test", problem, "cuda", device)
    names = [c.algorithm for c in plan.candidates if c.rejected is None]
    return [choose("test", problem, "cuda", device, name) for name in names]


@pytest.mark.parametrize("block", range(4))
def test_repeated_calls_of_every_algorithm(cuda_device: Any, block: int) -> None:
    repeated = set()
    for seed in range(25 * block, 25 * (block + 1)):
        case = random_case(seed, channels=9)
        for plan in served(case.problem(), cuda_device):
            plan._calls.clear()
            arrays = [on_device(cuda_device, a) for a in case.arrays()]
            first = plan(*arrays)
            # The same values in memory of their own: only addresses differ.
            others = [on_device(cuda_device, a) for a in case.arrays()]
            again = plan(*others)
            assert len(plan._calls) <= 1
            if plan._calls:
                repeated.add(plan.algorithm)
            assert again.strides == first.strides
            np.testing.assert_array_equal(on_host(again), on_host(first))
            for _ in range(2):
                out = cuda_device.empty(first.shape, first.dtype)
                assert plan(*others, out=out) is out
                np.testing.assert_array_equal(on_host(out), on_host(first))
    assert repeated >= {"direct", "implicit_gemm"}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("channels", "extent"), [(64, 5), (64, 12)], ids=["a split sum", "one sum"]
)
def test_sums_in_passes_and_packed_filters(
    cuda_device: Any, layout: str, channels: int, extent: int
) -> None:
    rng = np.random.default_rng(0)
    shape = (channels, extent, extent)
    shape = shape if layout == "NCHW" else (*shape[1:], shape[0])
    w = on_device(cuda_device, rng.standard_normal((8, channels, 3, 3)).astype("float32"))
    plan = gpuconv.plan_conv2d(
        (3, *shape), w.shape, layout=layout, algorithm="implicit_gemm", backend="cuda"
    )
    plan._calls.clear()
    for batch in (3, 1, 5, 3, 1, 5):
        x = on_device(cuda_device, rng.standard_normal((batch, *shape)).astype("float32"))
        y = on_host(plan(x, w))
        kept = dict(plan._calls)
        plan._calls.clear()
        np.testing.assert_array_equal(y, on_host(plan(x, w)))
        plan._calls.update(kept)


def test_unaligned_arrays_are_told_apart(cuda_device: Any) -> None:
    plan = gpuconv.plan_conv2d((1, 4, 9, 9), (8, 4, 3, 3), backend="cuda")
    plan._calls.clear()
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(p).astype("float32") for p in ((1, 4, 9, 9), (8, 4, 3, 3)))
    w = on_device(cuda_device, w)
    expected = on_host(plan(on_device(cuda_device, x), w))
    for offset in (0, 1, 2, 3, 1):
        memory = on_device(cuda_device, np.zeros(x.size + 4, "float32"))
        moved = memory[offset : offset + x.size].reshape(x.shape)
        moved[...] = on_device(cuda_device, x)
        np.testing.assert_array_equal(on_host(plan(moved, w)), expected)
    if cuda_device.xp is not np:  # elsewhere memory begins where the host's allocator says
        assert len(plan._calls) == 4


# ---- what reaches the driver --------------------------------------------------------------------


@pytest.fixture
def null() -> Iterator[Any]:
    """A device whose driver only writes down what it is given."""
    pytest.importorskip("cupy")
    from bench.null_device import null_device

    with null_device() as device:
        yield device


def some_on(device: Any, *shape: int, dtype: str = "float32") -> Any:
    return device.xp.empty(shape, dtype)


def test_a_repeated_call_reaches_the_driver_without_a_question(
    null: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, bias = some_on(null, 2, 8, 9, 9), some_on(null, 8, 8, 3, 3), some_on(null, 8)
    out = some_on(null, 2, 8, 9, 9)
    plan = gpuconv.plan_conv2d(x.shape, w.shape, padding=1, bias=True, backend="cuda")

    def calls() -> None:
        plan(x, w, bias)
        plan(x, w, bias, out)
        gpuconv.conv2d(x, w, bias, padding=1)
        gpuconv.conv2d(x, w, bias, padding=1, out=out)

    calls()
    before = null.launched

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr(execute.Operands, "__init__", refuse)
    monkeypatch.setattr(Layout, "__init__", refuse)
    calls()
    assert null.launched == before + 4
    with pytest.raises(AssertionError, match="looked at again"):
        plan(x[:, :, ::-1], w, bias)


def test_the_arguments_are_what_the_kernel_takes(null: Any) -> None:
    """As the driver reads them: a table of addresses, each of a pointer or of a value."""
    read: list[Any] = []
    stream = SimpleNamespace(ptr=7)
    struct = np.array((1, 2.5, 3), np.dtype([("a", "i4"), ("b", "f8"), ("c", "i2")], align=True))

    def driver(function: int, *given: int) -> None:
        *shape, on, table, extra = given
        assert extra == 0
        entries = (ctypes.c_void_p * 5).from_address(table)
        sizes = (8, 8, 8, struct.nbytes, 4)
        read.append(
            (function, shape, on, [ctypes.string_at(*p) for p in zip(entries, sizes, strict=True)])
        )

    null._driver.launchKernel = driver
    null._cupy.cuda.get_current_stream = lambda ordinal: stream
    launch = Launch(
        null.load("any", {}), (5, 2, 1), (64, 1, 1), (struct, np.int32(-9)), shared_bytes=1000
    )
    x, y = some_on(null, 3), some_on(null, 4)
    launch(null, x, None, y)  # CuPy's own launch: the first one of the thread
    assert not read
    for a, b, current in ((x, y, 7), (y, x, 8), (x, x, 7)):
        stream.ptr = current
        launch(null, a, None, b)
        function, shape, on, values = read.pop()
        assert (function, shape, on) == (1, [5, 2, 1, 64, 1, 1, 1000], current)
        pointers = [int.from_bytes(value, "little") for value in values[:3]]
        assert pointers == [a.data.ptr, 0, b.data.ptr]
        assert values[3] == struct.tobytes()
        assert values[4] == np.int32(-9).tobytes()


def test_threads_do_not_write_each_others_arguments(null: Any) -> None:
    """The driver lets other threads run before it has read its arguments."""
    barrier = threading.Barrier(4)
    seen: dict[int, list[int]] = {}

    def driver(function: int, *given: int) -> None:
        barrier.wait()  # every thread is inside of its launch
        entries = (ctypes.c_void_p * 1).from_address(given[-2])
        seen.setdefault(threading.get_ident(), []).append(
            ctypes.c_uint64.from_address(entries[0] or 0).value
        )

    null._driver.launchKernel = driver
    launch = Launch(null.load("any", {}), (1, 1, 1), (32, 1, 1), ())
    arrays = [some_on(null, 3) for _ in range(4)]
    expected: dict[int, int] = {}

    def work(array: Any) -> None:
        expected[threading.get_ident()] = array.data.ptr
        for _ in range(20):
            launch(null, array)
        barrier.wait()  # a thread's identity is not given to the next one before this

    workers = [threading.Thread(target=work, args=(a,)) for a in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # The first of each thread was CuPy's.
    assert seen == {thread: [pointer] * 19 for thread, pointer in expected.items()}


def test_a_driver_that_refuses_is_heard_and_the_next_call_works(null: Any) -> None:
    answers = iter([_refuse, null._driver.launchKernel])
    null._driver.launchKernel = lambda *given: next(answers)(*given)
    launch = Launch(null.load("any", {}), (1, 1, 1), (32, 1, 1), ())
    x = some_on(null, 3)
    launch(null, x)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        launch(null, x)
    assert null.launched == 0
    launch(null, x)
    assert null.launched == 1


def _refuse(*arguments: Any) -> None:
    raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")


def test_a_call_makes_its_device_the_current_one(null: Any) -> None:
    current = [0]

    class Device:
        def __init__(self, ordinal: int) -> None:
            self.ordinal = ordinal

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.ordinal

        def __exit__(self, *error: Any) -> None:
            current[0] = self.before

    null._runtime.getDevice = lambda: current[0]
    null.xp.cuda.Device = Device
    null.ordinal = 1
    where: list[int] = []
    plan = gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), backend="cuda")
    call = prepared(
        lambda *arrays: where.append(current[0]), null, (1, 1, 3, 3), None,
        plan.problem.y_dtype, lambda x, w, bias, out: None,
    )  # fmt: skip
    x, w = some_on(null, 1, 1, 5, 5), some_on(null, 1, 1, 3, 3)
    assert call(x, w, None, None).shape == (1, 1, 3, 3)
    assert (where, current) == ([1], [0])


def test_an_unaligned_result_is_computed_with_care(null: Any) -> None:
    """What the user's own allocator may give."""
    x, w = some_on(null, 1, 1, 5, 5), some_on(null, 1, 1, 3, 3)
    plan = gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), backend="cuda")
    memory = some_on(null, 100)
    asked: list[Any] = []
    null.xp.empty = lambda shape, dtype: memory[1:10].reshape(shape)
    call = prepared(
        _refuse, null, (1, 1, 3, 3), None, plan.problem.y_dtype,
        lambda x, w, bias, out: asked.append(out) or out,
    )  # fmt: skip
    y = call(x, w, None, None)
    assert asked[0] is y
    assert y.data.ptr == memory.data.ptr + 4
