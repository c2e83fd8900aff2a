"""The structs that kernels are launched with, and a real device's launches, at CuPy's seam."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuconv.cuda_backend import compiler, launch
from gpuconv.cuda_backend.device import CudaDevice
from gpuconv.problem import ConvProblem, describe
from tests.cuda_backend.fake_cupy import FakeCupy


def divide(n: int, d: Any) -> int:
    """As indexing.cuh does it, in 32 bits."""
    high = (n * int(d["magic"])) >> 32
    assert high + n < 2**32
    return (high + n) >> int(d["shift"])


def test_divisors_divide() -> None:
    rnd = random.Random(0)
    values = [1, 2, 3, 5, 7, 10, 641, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**31 - 2, 2**31 - 1]
    values += [rnd.randint(1, 2**31 - 1) for _ in range(500)]
    values += [rnd.randint(1, 1000) for _ in range(500)]
    for value in values:
        d = launch.divisor(value)
        top = 2**31 - 1
        numbers = {0, 1, value - 1, value, value + 1, top, top - 1, top // value * value}
        numbers |= {top // value * value - 1} | {rnd.randint(0, top) for _ in range(20)}
        for n in numbers:
            if 0 <= n <= top:
                assert divide(n, d) == n // value, (n, value)


def test_the_problem_struct_is_the_same_on_both_sides() -> None:
    """Field by field: name, type and count, in order; the compiler lays both out alike."""
    folder = compiler.source_folder()
    for name, dtype, file in (
        ("Problem", launch.PROBLEM, "problem.cuh"),
        ("Divisor", launch.DIVISOR, "indexing.cuh"),
    ):
        text = re.sub(r"//.*", "", (folder / file).read_text())
        body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)
        assert body
        fields = []
        for declaration in body[1].split(";"):
            words = declaration.replace(",", " ").split()
            for word in words[1:]:
                field, _, count = word.partition("[")
                fields.append((field, words[0], int(count.rstrip("]")) if count else 1))
        ours = []
        for field in dtype.names or ():
            kind = dtype[field]
            base, shape = kind.subdtype or (kind, ())
            ours.append((field, "Divisor" if base.names else base.name, int(np.prod(shape))))
        assert fields == ours
        assert f"sizeof({name}) == {dtype.itemsize}" in text


def problem(**changes: Any) -> ConvProblem:
    options = {"stride": 1, "padding": 1} | changes
    return describe("conv2d", 2, (2, 4, 9, 8), (6, 4, 3, 3), "float32", "float32", **options)


def layout(p: ConvProblem, **strides: Any) -> launch.Layout:
    x, w, y = np.empty(p.x_shape, "f4"), np.empty(p.w_shape, "f4"), np.empty(p.y_shape, "f4")
    arrays = {"x": x, "w": w, "y": y}
    for name, value in strides.items():
        array = arrays[name]
        arrays[name] = np.lib.stride_tricks.as_strided(
            array, array.shape, [4 * s for s in value], writeable=False
        )
    return launch.Layout(arrays["x"], arrays["w"], None, arrays["y"])


def test_pack() -> None:
    p = problem(stride=(2, 1), dilation=(1, 2), padding=((1, 0), (2, 3)), padding_mode="reflect")
    struct = launch.pack(p, layout(p))
    assert struct.shape == ()
    assert struct["x_strides"].tolist() == [4 * 72, 72, 0, 8, 1]
    assert struct["w_strides"].tolist() == [36, 9, 0, 3, 1]
    assert struct["input"].tolist() == [1, 9, 8]
    assert struct["filter"].tolist() == [1, 3, 3]
    assert struct["output"].tolist() == [1, *p.output]
    assert struct["stride"].tolist() == [1, 2, 1]
    assert struct["dilation"].tolist() == [1, 1, 2]
    assert struct["pad_lo"].tolist() == [0, 1, 2]
    assert struct["boundary"] == 1
    assert struct["output_divisor"]["value"].tolist() == [1, *p.output]
    assert struct["channels_last"] == 0


def test_a_flipped_filter_is_read_backwards() -> None:
    p = problem(flip=True)
    struct = launch.pack(p, layout(p))
    assert struct["w_strides"].tolist() == [36, 9, 0, -3, -1]
    assert struct["w_offset"] == 8


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ({}, "int32"),
        ({"x": (2**31 - 2**27, 72, 8, 1)}, "int32"),
        ({"x": (2**31, 72, 8, 1)}, "int64"),
        ({"x": (-(2**31), 72, 8, 1)}, "int64"),
        ({"w": (2**29, 9, 3, 1)}, "int64"),
        ({"y": (100, 2**29, 8, 1)}, "int64"),
    ],
)
def test_the_index_type_follows_the_spans(strides: Any, expected: str) -> None:
    p = problem()
    assert launch.index_type(p, layout(p, **strides)) == expected


def test_the_index_type_follows_pads_and_dilations() -> None:
    assert launch.index_type(problem(padding=2**30), layout(problem())) == "int64"
    far = problem(padding=2**29, dilation=2**29)
    assert launch.index_type(far, layout(problem())) == "int64"
    assert launch.index_type(problem(), layout(problem()), items=2**31) == "int64"


def test_layouts_know_their_alignment() -> None:
    p = problem()
    memory = np.empty(10000, "f4")
    start = -memory.__array_interface__["data"][0] // 4 % 4  # the first at a multiple of 16
    w, y = memory[start : start + 216].reshape(p.w_shape), memory[start + 400 :][: 2 * 6 * 72]
    y = y.reshape(p.y_shape)
    for offset, alignment in ((0, 16), (1, 4), (2, 8), (3, 4)):
        x = memory[start + 4000 + offset :][:576].reshape(p.x_shape)
        assert launch.Layout(x, w, None, y).alignment == alignment


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_layout_that_a_plan_expects(channels_last: bool) -> None:
    p = dataclasses.replace(problem(bias=True), channels_last=channels_last)
    arrays = []
    for shape in (p.x_shape, p.y_shape):
        if channels_last:
            arrays.append(np.moveaxis(np.empty((shape[0], *shape[2:], shape[1]), "f4"), -1, 1))
        else:
            arrays.append(np.empty(shape, "f4"))
    given = launch.Layout(arrays[0], np.empty(p.w_shape, "f4"), np.empty(6, "f4"), arrays[1])
    expected = launch.contiguous(p)
    for name in ("batch", "x", "w", "y", "bias_stride"):
        assert getattr(given, name) == getattr(expected, name)
    assert expected.alignment == 16


# ---- CudaDevice, over a CuPy that only writes down what it is asked -----------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    cupy = FakeCupy()
    driver = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        funcSetAttribute=lambda *a: cupy.log.append(("attribute", *a)),
    )
    modules = {"cupy": cupy, "cupy_backends.cuda.api.driver": driver}
    # The package's attribute `device` is its function, not this module.
    module = sys.modules["gpuconv.cuda_backend.device"]
    monkeypatch.setattr(module, "import_module", modules.__getitem__)
    monkeypatch.setattr(compiler, "architecture", lambda capability: "sm_90a")
    monkeypatch.setattr(
        compiler, "compile_kernel", lambda *a: compiler.Compiled(b"cubin", compiler.Report())
    )
    return cupy


def test_a_device_describes_itself(fake: FakeCupy) -> None:
    device = CudaDevice(1)
    assert str(device) == "cuda:1, NVIDIA H200"
    assert (device.arch, device.sm_count, device.max_shared_bytes) == ("sm_90a", 132, 232448)
    assert 4.9e12 < device.bandwidth < 5e12
    assert device.clock_hz == 1.98e9


def test_a_device_without_clocks_still_has_rates(fake: FakeCupy) -> None:
    tell = fake.cuda.runtime.deviceGetAttribute
    clocks = 13, 36
    fake.cuda.runtime.deviceGetAttribute = lambda number, i: (
        0 if number in clocks else tell(number, i)
    )
    device = CudaDevice(0)
    assert device.bandwidth > 0
    assert device.clock_hz > 0


def test_a_driver_that_refuses_to_tell_its_clocks(fake: FakeCupy) -> None:
    tell = fake.cuda.runtime.deviceGetAttribute

    def refuse(number: int, ordinal: int) -> int:
        if number in (13, 36):
            raise RuntimeError("cudaErrorInvalidValue: invalid argument")
        return tell(number, ordinal)  # type: ignore[no-any-return]

    fake.cuda.runtime.deviceGetAttribute = refuse
    device = CudaDevice(0)
    assert device.sm_count == 132
    assert device.bandwidth > 0
    assert device.clock_hz > 0


def test_a_kernel_is_loaded_once_and_launched_where_its_device_is(fake: FakeCupy) -> None:
    device = CudaDevice(1)
    kernel = device.load("direct", {"K_TILE": 4})
    assert device.load("direct", {"K_TILE": 4}) is kernel
    assert device.load("direct", {"K_TILE": 1}) is not kernel
    assert fake.log[:2] == [("load", 1, bytes), ("function", "direct")]
    fake.log.clear()
    device.launch(kernel, (5, 1, 1), (256, 1, 1), ("x", None, np.int32(3)))
    kind, where, grid, block, args, shared = fake.log.pop()
    assert (kind, where, grid, block, shared) == ("launch", 1, (5, 1, 1), (256, 1, 1), 0)
    # CuPy 13 would pass None as no argument at all.
    assert args[0] == "x"
    assert type(args[1]) is np.uint64
    assert args[1] == 0
    assert fake.current == 0
    device.empty((2, 3), np.float16)
    assert fake.log.pop() == ("empty", 1, (2, 3), "float16")


def test_shared_memory_is_asked_for_once(fake: FakeCupy) -> None:
    """Below 48 KiB as well: what a kernel declares itself is not among what is asked for."""
    device = CudaDevice(0)
    kernel = device.load("direct", {})
    fake.log.clear()
    for shared in (0, 48 << 10, 1000, 100_000, 90_000, 100_000, 120_000):
        device.launch(kernel, (1, 1, 1), (32, 1, 1), (), shared)
    asked = [entry for entry in fake.log if entry[0] == "attribute"]
    assert asked == [("attribute", 4242, 8, size) for size in (48 << 10, 100_000, 120_000)]


def test_nothing_waits_for_the_device(fake: FakeCupy) -> None:
    device = CudaDevice(0)
    device.launch(device.load("direct", {}), (1, 1, 1), (32, 1, 1), ())
    assert "synchronize" not in fake.log
    device.synchronize()
    assert "synchronize" in fake.log
