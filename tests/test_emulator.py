"""The emulator itself: kernels that are right must pass in every mode, broken ones be caught."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import compiler
from gpuconv.cuda_backend.device import overriding
from gpuconv.problem import PRECISIONS
from tests.emulator import (
    BLOCK_ORDERS,
    MODES,
    THREAD_ORDERS,
    EmulatedDevice,
    EmulatorError,
    emulated_device,
    figures,
    fuzz,
)
from tests.emulator.build import stage
from tests.emulator.launch import static_shared

KERNELS = Path(__file__).parent / "emulator" / "kernels"

i32, f32 = np.int32, np.float32

mode = pytest.mark.parametrize("mode", MODES)
# Also on a real device: the emulator has to agree with it.
mode_or_gpu = pytest.mark.parametrize("mode", [*MODES, pytest.param("gpu", marks=pytest.mark.gpu)])


class RealDevice:
    """A GPU behind the calls of an EmulatedDevice, its memory hidden behind NumPy arrays."""

    arch = "sm_90a"

    def __init__(self) -> None:
        self.cupy = pytest.importorskip("cupy")

    def empty(self, shape, dtype) -> np.ndarray:
        return EmulatedDevice().empty(shape, dtype)

    def load(self, source: str, macros: dict, kernel: str | None = None):
        major, minor = divmod(int(self.cupy.cuda.Device().compute_capability), 10)
        arch = compiler.architecture((major, minor))
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / f"{source}.cubin"
            cubin.write_bytes(compile_for_real(source, macros, arch, Path(folder)))
            return self.cupy.RawModule(path=str(cubin)).get_function(kernel or source)

    def launch(self, kernel, grid, block, args, shared_bytes=0) -> None:
        def is_array(a) -> bool:
            return isinstance(a, np.ndarray) and a.dtype.names is None

        sent = [self.cupy.asarray(a.view(np.uint8)) if is_array(a) else a for a in args]
        if shared_bytes > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        values = [np.uint64(0) if a is None else a for a in sent]
        kernel(grid, block, tuple(values), shared_mem=shared_bytes)
        for a, b in zip(args, sent, strict=True):
            if is_array(a):
                a.view(np.uint8)[...] = b.get()


def compile_for_real(source: str, macros: dict, arch: str, folder: Path) -> bytes:
    """The cubin (or PTX) that NVRTC makes of a test kernel and the ptx.cuh of the kernels."""
    for file in (*KERNELS.iterdir(), KERNELS.parents[2] / "kernels_cuda" / "ptx.cuh"):
        shutil.copy(file, folder)
    return compiler.compile_kernel(source, macros, arch, folder=folder, cache=False).cubin


def device(mode: str = "plain", **options):
    return RealDevice() if mode == "gpu" else EmulatedDevice(mode, folder=KERNELS, **options)


def run(d: EmulatedDevice, source: str, grid, block, args, *, kernel=None, macros=None, shared=0):
    loaded = d.load(source, macros or {}, kernel)
    three = [(g, 1, 1) if isinstance(g, int) else g for g in (grid, block)]
    d.launch(loaded, *three, args, shared)


def random(*shape: int, dtype=f32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---------------------------------------------------------------- kernels that are right


@mode_or_gpu
def test_vector_add(mode):
    d = device(mode)
    x, y, out = random(1000), random(1000, seed=1), d.empty(1000, f32)
    run(d, "vector_add", 8, 128, (x, y, out, i32(1000), f32(2)))
    np.testing.assert_array_equal(out, 2 * x + y)


@mode_or_gpu
@pytest.mark.parametrize("dynamic", [0, 1])
def test_gemm_with_tails(mode, dynamic):
    d = device(mode)
    m, n, k = 70, 90, 50
    a, b, c = random(m, k), random(k, n, seed=1), d.empty((m, n), f32)
    shared = dynamic * 16 * (64 + 4 + 64) * 4
    macros = {"DYNAMIC_SHARED": dynamic}
    run(d, "gemm", (2, 2, 1), 256, (a, b, c, i32(m), i32(n), i32(k)), macros=macros, shared=shared)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-4)


@mode_or_gpu
@pytest.mark.parametrize("order", THREAD_ORDERS)
@pytest.mark.parametrize("block_order", BLOCK_ORDERS)
def test_reduction(mode, order, block_order):
    d = device(mode, order=order, block_order=block_order, seed=3)
    x = np.random.default_rng(0).integers(-9, 9, 500).astype(f32)
    total, positive = np.zeros(1, f32), d.empty(4, i32)
    run(d, "reduce", 4, 128, (x, total, positive, i32(500)))
    assert total[0] == x.sum()
    padded = np.concatenate([x, np.zeros(12, f32)]).reshape(4, 128)
    np.testing.assert_array_equal(positive, (padded > 0).sum(1))


@mode_or_gpu
@pytest.mark.parametrize("pad", [0, 1])
def test_transpose(mode, pad):
    d = device(mode)
    x, out = random(40, 70), d.empty((70, 40), f32)
    run(d, "transpose", (3, 2, 1), (32, 8, 1), (x, out, i32(40), i32(70)), macros={"PAD": pad})
    np.testing.assert_array_equal(out, x.T)


@mode_or_gpu
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bit_arithmetic_rounds_as_numpy_does(mode, name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype, cuda_type = {
        "float16": (np.dtype(np.float16), "__half"),
        "bfloat16": (np.dtype(ml_dtypes.bfloat16), "__nv_bfloat16"),
    }[name]
    d = device(mode)
    count = 3000
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-10, 6, (2, count))
    a, b = (rng.standard_normal((2, count)) * scale).astype(f32).astype(dtype)
    f = (rng.standard_normal(count) * scale[0]).astype(f32)
    f[:8] = [0.0, -0.0, np.inf, -np.inf, 1e-8, 65519.9, 1.00048828125, 1.00390625]
    out = d.empty((count, 10), dtype)
    macros = {"DATA_T": cuda_type}
    run(d, "float16", 24, 128, (a, b, f, out, i32(count)), macros=macros)
    with np.errstate(all="ignore"):
        largest = np.where(a > b, a, np.where(a < b, a, b))
        want = [a + b, a - b, a * b, a / b, -a, f.astype(dtype)]
        want += [(a.astype(f32) + 1).astype(dtype), a * b, b * b, largest]
    for column, expected in enumerate(want):
        got = out[:, column]
        np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16), str(column))


@mode_or_gpu
@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_warp_collectives(mode, order):
    d = device(mode, order=order)
    x = np.random.default_rng(0).integers(-100, 100, 32).astype(i32)
    lane = np.arange(32)
    out = d.empty((15, 32), i32)
    run(d, "collectives", 1, 32, (x, out))
    ballot = int(np.sum((x > 0) * (1 << lane)))
    match = [int(np.sum(((x & 3) == (v & 3)) * (1 << lane))) for v in x]
    want = [
        np.full(32, x[5]),
        x[lane // 8 * 8 + (lane + 3) % 8],
        x[np.where(lane >= 3, lane - 3, lane)],
        x[np.where(lane % 16 >= 3, lane - 3, lane)],
        x[np.where(lane + 3 < 32, lane + 3, lane)],
        x[np.where(lane % 4 + 3 < 4, lane + 3, lane)],
        x[lane ^ 9],
        np.full(32, ballot),
        np.zeros(32),
        np.ones(32),
        np.full(32, x.sum()),
        np.full(32, x.max()),
        match,
        np.where(lane < 16, x[lane ^ 1], x[16:].min()),
        np.trunc(2.5 * x[lane ^ 1]),
    ]
    np.testing.assert_array_equal(out, np.array(want).astype(np.int64).astype(np.uint32).view(i32))


@mode_or_gpu
def test_atomics(mode):
    d = device(mode, order="random", block_order="shuffled")
    i, u = np.zeros(4, i32), np.zeros(2, np.uint32)
    wide, f, g = np.zeros(1, np.uint64), np.zeros(1, f32), np.zeros(1)
    run(d, "atomics", 3, 40, (i, u, wide, f, g))
    assert i.tolist() == [119 * 60, 119, -119, 120]
    assert u.tolist() == [0xFFFFFFFF, 240]
    assert (wide[0], f[0], g[0]) == (120 << 32, 60.0, 30.0)


@mode_or_gpu
def test_last_block_adds_what_the_others_left(mode):
    d = device(mode, block_order="shuffled")
    x, total = np.arange(500, dtype=f32), d.empty(1, f32)
    args = (x, d.empty(4, f32), np.zeros(1, np.uint32), total, i32(500))
    run(d, "last_block", 4, 128, args)
    assert total[0] == x.sum()


@mode_or_gpu
@pytest.mark.parametrize(
    ("size", "stages", "cached"), [(4, 2, 0), (8, 3, 0), (16, 3, 0), (16, 4, 0), (16, 3, 1)]
)
@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_async_copy_pipeline(mode, size, stages, cached, arch):
    d = device(mode, arch=arch, order="random")
    x = random(1003 // 4 * 4)
    out = d.empty(x.shape, f32)
    macros = {"BYTES": size, "STAGES": stages, "CACHED": cached}
    args = (x, out, i32(x.size))
    run(d, "async_copy", 1, 64, args, macros=macros, shared=stages * 64 * 16)
    np.testing.assert_array_equal(out, 2 * x)


def _integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape)


@mode_or_gpu
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("f16", (16, 8, 16), "float16"),
        ("bf16", (16, 8, 16), "bfloat16"),
        ("tf32", (16, 8, 8), "float32"),
        ("f64", (8, 8, 4), "float64"),
    ],
)
def test_matrix_products(mode, name, shape, dtype):
    dtype = getattr(pytest.importorskip("ml_dtypes"), dtype, dtype)
    d = device(mode)
    m, n, k = shape
    a, b, c = _integers(m, k), _integers(k, n, seed=1), _integers(m, n, seed=2)
    wide = np.float64 if name == "f64" else f32
    out = d.empty((m, n), wide)
    args = (a.astype(dtype), b.astype(dtype), c.astype(wide), out)
    run(d, "matrix", 1, 32, args, kernel=f"matrix_{name}")
    np.testing.assert_array_equal(out, a @ b + c)


@pytest.mark.parametrize("mode", ["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_tf32_rounds_to_nearest_and_ties_away_from_zero(mode):
    d = device(mode)
    a = np.zeros((16, 8), f32)
    a[0, :3] = [1 + 2**-11, -(1 + 2**-11), 1 + 2**-12]
    a[1] = 3.4028235e38
    out = d.empty((16, 8), f32)
    args = (a, np.eye(8, dtype=f32), np.zeros((16, 8), f32), out)
    run(d, "matrix", 1, 32, args, kernel="matrix_tf32")
    assert out[0, :3].tolist() == [1 + 2**-10, -(1 + 2**-10), 1.0]
    assert not np.isfinite(out[1]).any()


@mode_or_gpu
def test_matrix_loads(mode):
    d = device(mode)
    x = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = d.empty((32, 14), np.uint32)
    run(d, "matrix", 1, 32, (x, out), kernel="matrix_load")
    lane = np.arange(32)
    g, t = lane // 4, lane % 4

    def fragment(i: int, trans: bool) -> np.ndarray:
        matrix = (x[i].T if trans else x[i]).astype(np.uint32)
        return matrix[g, 2 * t] | matrix[g, 2 * t + 1] << 16

    parts = [(i, trans) for count in (1, 2, 4) for trans in (False, True) for i in range(count)]
    want = np.stack([fragment(i, trans) for i, trans in parts], axis=1)
    np.testing.assert_array_equal(out, want)


_PROBLEM = np.dtype(
    [
        ("extent", i32, 3),
        ("flag", np.bool_),
        ("stride", np.int64),
        ("scale", f32),
        ("offset", np.float64),
    ],
    align=True,
)


@mode
def test_arguments_of_every_kind(mode):
    d = device(mode)
    problem = np.zeros((), _PROBLEM)
    problem[()] = ((3, 4, 5), True, 1 << 40, 0.5, 0.25)
    backwards = np.array([1.0, 2.0, 4.0])[::-1][:2]
    out = d.empty((2, 3, 2, 16), np.float64)
    args = (problem, np.complex64(6 - 7j), None, np.bool_(True), np.int8(-8), np.uint16(65535))
    args += (np.int64(-(1 << 40)), np.float64(1.5), backwards[:2], out)
    before = [3, 5, 1, 2.0**40, 0.5, 0.25, 6, -7, 1, 1, -8, 65535, -(2.0**40), 1.5]
    # backwards[0] is the array's last element: one before it is within bounds.
    run(d, "parameters", (2, 3, 2), (2, 2, 2), args, kernel="parameters")
    for z, y, x in np.ndindex(2, 3, 2):
        assert out[z, y, x].tolist() == [*before, 2.0, x + 10 * y + 100 * z + 2000]
    run(d, "parameters", 1, 1, (problem[()], *args[1:]))


@pytest.mark.parametrize("mode", ["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_integer_intrinsics(mode):
    d = device(mode)
    a, b = -123456789, 987654320
    out = d.empty(20, np.int64)
    run(d, "intrinsics", 1, 1, (i32(a), i32(b), out))
    unsigned = a & 0xFFFFFFFF
    want = [unsigned * b >> 32, a * b >> 32, 5, bin(unsigned).count("1"), 2, 32, 0x80000000]
    want += [0x77553311, 0x3F800000, 2, -2, -3, 0x7FFFFFFF, a, b, 500, 1, 0x88112233, 15]
    assert out.tolist() == [*want, 8 + 8 + 16 + 8 + 16]


@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_exited_threads_are_not_waited_for(order):
    out = np.zeros(96, f32)
    run(device(order=order), "broken", 1, 96, (out,), kernel="early_exit")
    present = [sum(t % 3 != 0 for t in range(w, w + 32)) for w in (0, 32, 64)]
    want = [0 if t % 3 == 0 else present[t // 32] for t in range(96)]
    assert out.tolist() == want


@mode
def test_views_and_shared_memory_between_arguments(mode):
    d = device(mode)
    base = random(300)
    x, y = base[20:120], base[::-1][:100].copy()
    run(d, "vector_add", 1, 128, (x, y, base[100:200], i32(20), f32(1)))
    run(d, "vector_add", 1, 128, (x, y, x, i32(100), f32(0)))
    np.testing.assert_array_equal(x, y)


@mode
def test_nothing_to_read_is_no_argument_of_size_zero(mode):
    d = device(mode)
    nothing = np.zeros((0, 3), f32)
    run(d, "vector_add", 1, 32, (nothing, nothing, nothing, i32(0), f32(1)))


def test_memory_beyond_4_gib_is_only_touched_where_the_kernel_goes():
    d = device()
    far = np.lib.stride_tricks.as_strided(np.empty(1 << 33, np.uint8), (2,), (1 << 32,))
    offset = np.int64(1 << 30)
    run(d, "broken", 1, 1, (far.view(np.uint8)[:1].view(np.uint8), offset), kernel="wild_pointer")


# ---------------------------------------------------------------- kernels that are broken


def caught(d: EmulatedDevice, kernel: str, grid, block, args, *texts: str, source="broken", **more):
    with pytest.raises(EmulatorError) as error:
        run(d, source, grid, block, args, kernel=kernel, **more)
    message = str(error.value)
    for text in (kernel, *texts):
        assert text in message, message
    return message


def line_of(text: str, source: str = "broken") -> str:
    lines = (KERNELS / f"{source}.cu").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if text in line)
    return f"kernels/{source}.cu:{number}"


def test_missing_barrier_is_a_race():
    write, read = line_of("tile[threadIdx.x] = x[threadIdx.x];"), line_of("// line of the read")
    args = (random(64), np.zeros(64, f32))
    caught(device("watch"), "missing_barrier", 1, 64, args, "race", "shared `tile`", write, read)


@pytest.mark.parametrize("order", THREAD_ORDERS)
def test_missing_barrier_shows_in_the_result(order):
    d = device(order=order)
    out = d.empty(64, f32)
    run(d, "broken", 1, 64, (random(64), out), kernel="missing_barrier")
    assert np.isnan(out).any()


def test_missing_second_barrier_is_a_race():
    args = (random(128), np.zeros(128, f32))
    caught(device("watch"), "missing_second_barrier", 1, 64, args, "race", "reads it", "writes it")


def test_warp_barrier_orders_its_lanes():
    args = (random(32), np.zeros(32, f32))
    run(device("watch"), "broken", 1, 32, (*args, i32(1)), kernel="missing_warp_barrier")
    caught(device("watch"), "missing_warp_barrier", 1, 32, (*args, i32(0)), "race")


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
@pytest.mark.parametrize("dtype", [f32])
@pytest.mark.parametrize(
    ("kernel", "texts"),
    [
        ("reads_past_end", ("past", "argument 0", "x[i + 1]")),
        ("reads_before_start", ("before", "argument 0", "x[i - 1]")),
        ("writes_past_end", ("past", "argument 1", "out[i] = x[0]")),
    ],
)
def test_out_of_bounds_by_one(mode, dtype, kernel, texts):
    # Views too: only their own extent is theirs.
    for x, out in [
        (random(30), np.zeros(30, f32)),
        (random(64)[16:46], np.zeros(64, f32)[32:62]),
    ]:
        args = (x, out, i32(30))
        caught(device(mode), kernel, 1, 32, args, *texts[:2], line_of(texts[2]))


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_out_of_bounds_in_dynamic_shared_memory(mode):
    args = (random(32), np.zeros(32, f32))
    place = line_of("dynamic[threadIdx.x + 1] = ")
    caught(device(mode), "dynamic_shared_past_end", 1, 32, args, place, shared=128)


@pytest.mark.parametrize("kernel", ["shared_past_end", "registers_past_end"])
def test_out_of_bounds_in_static_shared_memory_and_registers(kernel):
    args = (random(32), np.zeros(32, f32), i32(4))[: 3 if kernel[0] == "r" else 2]
    texts = {"shared_past_end": "tile[threadIdx.x + 1]", "registers_past_end": "values[i] = x[i]"}
    place = line_of(texts[kernel])
    caught(device("sanitize"), kernel, 1, 32 if kernel[0] == "s" else 1, args, place)


@mode
def test_unwritten_tail_stays_poisoned(mode):
    d = device(mode)
    out, whole = d.empty(100, f32), d.empty(100, i32)
    run(d, "broken", 4, 32, (random(100), out, i32(100)), kernel="unwritten_tail")
    np.testing.assert_array_equal(np.isnan(out), np.arange(100) >= 96)
    assert (whole.view(np.uint32) == 0xA5A5A5A5).all()


def test_uninitialised_shared_memory_is_nan():
    for mode in MODES:
        d = device(mode)
        out = np.zeros(64, f32)
        for _ in range(2):  # the second launch must not find what the first one left
            run(d, "broken", 1, 32, (out,), kernel="uninitialised_shared")
            assert np.isnan(out[:32]).all()
    assert d.report.total("uninitialised") == 64


def test_two_blocks_that_write_one_element():
    out = np.zeros(2, f32)
    message = caught(device("watch"), "two_blocks_one_element", 4, 32, (out,), "race", "argument 0")
    for text in ("block (0, 0, 0)", "block (1, 0, 0)", line_of("out[blockIdx.x / 2]")):
        assert text in message


def test_reading_another_blocks_result_needs_a_fence():
    args = (random(500), np.zeros(4, f32), np.zeros(1, np.uint32), np.zeros(1, f32), i32(500))
    d = device("watch")
    caught(d, "last_block", 4, 128, args, "race", source="last_block", macros={"FENCE": 0})


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_misaligned_vector(mode):
    args = (random(32), np.zeros(1, f32))
    place = line_of("const float4*>(x + 1)")
    caught(device(mode), "misaligned_vector", 1, 1, args, "misaligned", place)


@mode
def test_barrier_in_divergent_code_is_no_hang(mode):
    out = np.zeros(32, f32)
    barrier, warp = line_of("// one half here"), line_of("// the other here")
    texts = ("deadlock", "threads 0-15: at __syncthreads", barrier, "threads 16-31", warp)
    caught(device(mode), "divergent_barrier", 1, 32, (out,), *texts)


@mode
def test_two_different_barriers_do_not_meet(mode):
    texts = ("divergent", "threads 0-15: at __syncthreads", "threads 16-31: at __syncthreads")
    caught(device(mode), "two_barriers", 1, 32, (np.zeros(32, f32),), *texts)


def test_warp_collectives_check_who_is_there():
    args = (np.zeros(32, i32),)
    caught(device(), "not_in_mask", 1, 32, args, "0x0000ffff", "lane 16")
    args = (np.zeros(32, f32),)
    caught(device(), "incomplete_warp", 1, 24, args, "ldmatrix needs all 32 lanes")


@mode
def test_missing_wait_for_async_copies(mode):
    d = device(mode)
    x, out = random(1000), d.empty(1000, f32)
    macros = {"WAIT": 0}
    run(d, "async_copy", 1, 64, (x, out, i32(1000)), macros=macros, shared=3 * 64 * 16)
    assert np.isnan(out).all()


def test_misaligned_async_copy():
    args = (random(32), np.zeros(32, f32))
    caught(device(), "misaligned_async", 1, 32, args, "misaligned", line_of("cp_async_16(tile"))


@mode
def test_launches_that_no_device_accepts(mode):
    d = device(mode)
    out = (np.zeros(4096, f32),)
    caught(d, "bounded", 1, 1025, out, "at most 1024 threads")
    caught(d, "bounded", 1, (1, 1, 65), out, "64 in z")
    caught(d, "bounded", (1, 65536, 1), 1, out, "65535 in y and z")
    caught(d, "bounded", (1 << 31, 1, 1), 1, out, "2^31")
    caught(d, "bounded", 0, 32, out, "at least 1")
    caught(d, "bounded", 1, 65, out, "__launch_bounds__ allow 64")
    caught(d, "bounded", 1, 32, out, "at most 232448", shared=(227 << 10) + 1)
    caught(d, "bounded", 1, 32, out, "not negative", shared=-1)
    caught(d, "too_much_static_shared", 1, 32, out, "52000 bytes are static")
    run(d, "broken", 1, 64, out, kernel="bounded", shared=227 << 10)
    assert out[0].sum() == 64


@mode
def test_static_and_dynamic_shared_memory_are_one_block_s(mode):
    """128 bytes are static: a block has 227 KiB on a 9.0, 64 KiB on a 7.5, in all."""
    for arch, most in (("sm_90a", 227 << 10), ("sm_75", 64 << 10)):
        d = device(mode, arch=arch)
        assert d.max_shared_bytes == most
        args = (np.zeros(32, f32),)
        run(d, "broken", 1, 32, args, kernel="uninitialised_shared", shared=most - 128)
        text = f"128 bytes of static and {most - 127} of dynamic shared memory"
        caught(d, "uninitialised_shared", 1, 32, args, text, shared=most - 127)


@mode
def test_more_than_48_kib_of_shared_memory_are_asked_for(mode):
    d = device(mode, opt_in=False)
    args, free = (np.zeros(32, f32),), (48 << 10) - 128
    run(d, "broken", 1, 32, args, kernel="uninitialised_shared", shared=free)
    caught(d, "uninitialised_shared", 1, 32, args, "were not allowed", shared=free + 1)
    caught(d, "uninitialised_shared", 1, 32, args, "were not allowed", shared=48 << 10)
    kernel = d.load("broken", {}, "uninitialised_shared")
    d.allow_shared(kernel, 60 << 10)
    run(d, "broken", 1, 32, args, kernel="uninitialised_shared", shared=60 << 10)
    caught(d, "uninitialised_shared", 1, 32, args, "were not allowed", shared=(60 << 10) + 1)
    caught(d, "bounded", 1, 32, args, "were not allowed", shared=60 << 10)  # each kernel for itself
    with pytest.raises(EmulatorError, match="a block has at most 232448"):
        d.allow_shared(kernel, 227 << 10)


def test_static_shared_memory_is_what_ptxas_counts():
    pytest.importorskip("cupy")
    for stem, macros in (
        ("winograd_multiply", {}), ("winograd", {}), ("wgrad_depthwise", {}), ("depthwise", {}),
        ("direct_wgrad", {}), ("filter2d", {}),
    ):  # fmt: skip
        report = compiler.compile_kernel(stem, macros, "sm_90a").report
        for some in MODES:
            entry = EmulatedDevice(some).load(stem, macros).entry
            assert 0 <= report.shared - entry.static_shared < 16, stem  # between variables


def test_arguments_that_do_not_fit():
    d = device()
    x, y, out = random(4), random(4), np.zeros(4, f32)
    for args, text in [
        ((x, y, out, i32(4)), "takes 5 arguments, 4 were given"),
        ((x, y, out, 4, f32(1)), "argument 3 is the int 4"),
        ((x, y, out, np.int64(4), f32(1)), "argument 3 is int64 of 8 bytes"),
        ((x, y, out, f32(4), f32(1)), "argument 3 is float32 of 4 bytes"),
        ((x, y, out, i32(4), i32(1)), "argument 4 is int32 of 4 bytes"),
        ((x, i32(3), out, i32(4), f32(1)), "argument 1 is int32"),
        ((x, y, out, x, f32(1)), "argument 3 is an array of float32"),
        ((x, y, out, None, f32(1)), "argument 3 is None"),
    ]:
        caught(d, "vector_add", 1, 32, args, text, source="vector_add")


def test_a_kernel_stays_in_the_mode_it_was_loaded_in():
    kernel = device("plain").load("vector_add", {})
    with pytest.raises(EmulatorError, match="loaded in mode plain"):
        device("watch").launch(kernel, (1, 1, 1), (1, 1, 1), ())
    with pytest.raises(EmulatorError, match=r"no kernel typo in vector_add\.cu .*: vector_add"):
        device().load("vector_add", {}, "typo")


def test_undefined_arithmetic():
    args = (np.array([1 << 20, 1 << 20], i32), np.zeros(1, np.int64))
    caught(device("sanitize"), "signed_overflow", 1, 1, args, "signed integer overflow")


def test_crashes_are_errors():
    where = line_of("out[offset] = 1.0f")
    args = (np.zeros(4, f32), np.int64(1 << 44))
    caught(device(), "wild_pointer", 1, 1, args, "unmapped memory", where)
    caught(device("sanitize"), "wild_pointer", 1, 1, args, where)
    caught(device("watch"), "wild_pointer", 1, 1, args, "out-of-bounds write", where)
    args = (np.zeros(2, i32),)
    caught(device(), "divides_by_zero", 1, 1, args, "division by zero")
    caught(device("sanitize"), "divides_by_zero", 1, 1, args, "division by zero")
    run(device(), "broken", 1, 32, (np.zeros(32, f32),), kernel="bounded")  # all is well again


@mode
def test_endless_loops_end(mode):
    d = device(mode, time_limit=0.2)
    caught(d, "endless", 1, 1, (np.zeros(1, i32),), "ran longer than")


@mode
def test_assertions(mode):
    caught(
        device(mode), "false_assertion", 1, 1, (np.zeros(1, i32),), "assertion `out[0] == 1`",
        line_of("assert(out[0] == 1)"),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_read_only_arrays_stay_as_they_are(mode):
    x = random(32)
    before = x.copy()
    x.flags.writeable = False
    caught(device(mode), "writes_input", 1, 32, (x,), "read-only array", "argument 0")
    np.testing.assert_array_equal(x, before)


# ---------------------------------------------------------------- what watch mode counts


def site(d: EmulatedDevice, text: str, space: str, operation: str, source: str = "accesses"):
    place = line_of(text, source)
    found = [
        s for s in d.report.sites
        if (s.line, s.space, s.operation) == (place, space, operation)
    ]  # fmt: skip
    assert len(found) == 1, str(d.report)
    return found[0]


def test_bank_conflicts_of_a_transpose():
    for pad, wavefronts in ((0, 32), (1, 1)):
        d = device("watch")
        x, out = random(32, 32), d.empty((32, 32), f32)
        args = (x, out, i32(32), i32(32))
        run(d, "transpose", 1, (32, 8, 1), args, macros={"PAD": pad})
        load = site(d, "= tile[threadIdx.x][c]", "shared", "load", "transpose")
        assert (load.requests, load.lanes) == (32, 1024)
        assert (load.wavefronts, load.ideal_wavefronts) == (32 * wavefronts, 32)
        store = site(d, "= x[(r0 + r)", "shared", "store", "transpose")
        assert store.wavefronts == store.ideal_wavefronts == 32
        assert ("32.00" in str(d.report)) == (pad == 0)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_accesses_are_counted_by_width(stride, wavefronts):
    d = device("watch")
    x, out = d.empty(256, f32), d.empty(128, f32)
    x[...] = 0
    run(d, "accesses", 1, 32, (x, out, i32(stride)))
    for text, width, sectors, ideal in [
        ("16 sectors", 16, 16, 16),
        ("8 sectors", 8, 8, 8),
        ("32 sectors", 4, 32, 4),
        ("1 sector", 4, 1, 1),
    ]:
        load = site(d, f"// {text}", "global", "load")
        assert (load.bytes, load.requests) == (width, 1)
        assert (load.sectors, load.ideal_sectors) == (sectors, ideal)
    load = site(d, "// 4 wavefronts", "shared", "load")
    assert (load.bytes, load.wavefronts, load.ideal_wavefronts) == (16, 4, 4)
    load = site(d, "// stride: 1", "shared", "load")
    assert (load.wavefronts, load.ideal_wavefronts) == (wavefronts, 1)
    store = site(d, "= sum;", "global", "store")
    assert (store.bytes, store.sectors) == (16, 16)
    assert d.report.total("requests", "global") == 5


# ---------------------------------------------------------------- every algorithm, by command


@pytest.mark.parametrize("operation", ["fprop", "dgrad", "wgrad"])
def test_random_problems_until_the_time_is_up(capsys, operation):
    options = ["--algorithm", "direct", "--operation", operation, "--dtypes", "float32"]
    assert fuzz.main([*options, "--seconds", "2", "--seed", "7"]) == 0
    row, total = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["direct", operation]
    assert row.endswith("ok")
    assert int(row.split()[2]) == int(total.split()[0]) > 0
    assert int(row.split()[4]) > 0  # in watch mode


def test_a_problem_that_fails_can_be_repeated(capsys, monkeypatch):
    seen = []

    def off(problem, *arrays):
        on = overriding()
        seen.append((on.mode, on.arch, on.order, on.seed, on.launches, on.sm_count, problem))
        if on.seed == 14:  # neither the first problem nor the first order of threads
            raise AssertionError("3 of 4 elements are off")

    monkeypatch.setattr(fuzz.testing, "assert_close", off)
    options = ["--algorithm", "direct", "--operation", "fprop", "--dtypes", "float32"]
    assert fuzz.main([*options, "--seed", "7", "--arch", "sm_80"]) == 1
    first = capsys.readouterr().out
    assert "FAILED" in first
    assert "3 of 4 elements are off" in first
    failed = seen[-1]
    assert failed[:6] == ("sanitize", "sm_80", "random", 14, 1, 1)
    command = next(line for line in first.splitlines() if "--once" in line)
    assert fuzz.main(command.partition("fuzz ")[2].split()) == 1
    assert command in capsys.readouterr().out
    assert seen[-1] == failed
    monkeypatch.undo()
    assert fuzz.main(command.partition("fuzz ")[2].split()) == 0


def test_a_plan_that_fails_is_a_failure_and_names_its_seed(capsys, monkeypatch):
    def broken(*args):
        raise ValueError("no such plan")

    monkeypatch.setattr(fuzz, "choose", broken)
    options = ["--algorithm", "direct", "--operation", "fprop", "--dtypes", "float32"]
    assert fuzz.main([*options, "--seed", "7"]) == 1
    shown = capsys.readouterr().out
    assert "seed 7\nValueError: no such plan" in shown
    assert "--once --seed 7 " in shown


def test_random_problems_that_nothing_serves(capsys):
    options = ["--algorithm", "winograd", "--operation", "fprop", "--dtypes", "uint8"]
    assert fuzz.main([*options, "--once"]) == 2
    assert "serves no more" in capsys.readouterr().out
    began = time.monotonic()
    assert fuzz.main([*options, "--seconds", "0.3"]) == 0
    assert time.monotonic() - began < 3
    assert capsys.readouterr().out.splitlines()[0].endswith("not reached")


def test_random_problems_vary_precision_workspace_and_device():
    cases = [fuzz.case_of(seed, ("float32", "float16")) for seed in range(60)]
    drawn = {case.x_dtype: {c.kwargs.get("precision") for c in cases if c.x_dtype == case.x_dtype}
             for case in cases}  # fmt: skip
    assert drawn["float32"] >= set(PRECISIONS)
    assert drawn["float16"] == {None}
    assert {case.kwargs["workspace_limit"] for case in cases} == set(fuzz.LIMITS)
    assert [device.sm_count for device in fuzz.devices("watch", "sm_90a")] == [132, 1]


def test_figures_of_a_kernel():
    found = figures.sites(
        "separable", "fprop", (1, 1, 40, 128), (1, 1, 3, 3), "float32", {"padding": "same"}
    )
    (line,) = figures.lines(found)
    assert line.split()[:3] == ["separable", "1.00", "1.00"]
    assert figures.ratio([]).strip() == "-"


def test_figures_of_an_algorithm_that_has_none(capsys):
    with pytest.raises(SystemExit) as ended:
        figures.main(["winograd", "winogard"])
    assert ended.value.code == 2
    assert "no problem of winogard" in capsys.readouterr().err


def test_figures_of_pixels_that_are_copied_as_they_lie():
    (row,) = [problem for problem in figures.PROBLEMS if problem[3][2:] == (1, 1)]
    found = figures.sites(*row)
    loads = [s for s in found if (s.space, s.operation) == ("global", "load")]
    assert {s.bytes for s in loads} == {16}


# ---------------------------------------------------------------- staging, compiling, caching


@pytest.mark.parametrize(
    ("source", "staged"),
    [
        ("__shared__ float a[4][5];", "static   float a[4][5]; EMU_SHARED(a);"),
        ("static __shared__ T a[N], b;", "static    T a[N], b; EMU_SHARED(a); EMU_SHARED(b);"),
        (
            "__shared__ alignas(16) Tile<int, 4> t;",
            "static   __align__(16) Tile<int, 4> t; EMU_SHARED(t);",
        ),
        ("extern __shared__ float4 s[];", "EMU_DYNAMIC_SHARED(s, float4);"),
        (
            "extern __shared__ __align__(16) unsigned char s[];",
            "EMU_DYNAMIC_SHARED(s, unsigned char);",
        ),
        ("__align__(8) extern __shared__ half\n s[];", "EMU_DYNAMIC_SHARED(s, half)\n;"),
        ("// tells of __shared__ memory\nint a;", "// tells of __shared__ memory\nint a;"),
        ("/* extern __shared__ */ int a;", "/* extern __shared__ */ int a;"),
        ("__device__ inline __forceinline__ int f();", "__device__  __forceinline__ int f();"),
    ],
)
def test_staging(source: str, staged: str):
    assert stage(source).split() == staged.split()
    assert stage(source).count("\n") == source.count("\n")


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text)


_CONSTANT = '#include "value.cuh"\nextern "C" __global__ void constant(int* p) { *p = VALUE; }\n'


def _constant(d: EmulatedDevice, **macros: int) -> int:
    out = np.zeros(1, i32)
    run(d, "constant", 1, 1, (out,), macros=macros)
    return int(out[0])


@pytest.mark.parametrize("mode", ["plain"])
def test_what_recompiles_and_what_does_not(mode, tmp_path):
    folder, cache = tmp_path / "kernels_cuda", tmp_path / "cache"
    folder.mkdir()
    _write(folder, constant_cu=_CONSTANT, value_cuh='#include "deep.cuh"\n', unused_cuh="//")
    deep = "#ifndef VALUE\n#define VALUE {}\n#endif\n"

    def fresh() -> EmulatedDevice:
        return EmulatedDevice(mode, folder=folder, cache=cache)

    def compiled() -> int:
        return len(list(cache.glob("constant-*.so")))

    _write(folder, deep_cuh=deep.format(1))
    assert (_constant(fresh()), compiled()) == (1, 1)
    assert (_constant(fresh()), compiled()) == (1, 1)
    assert (_constant(fresh(), VALUE=7), compiled()) == (7, 2)
    _write(folder, unused_cuh="// changed")
    assert (_constant(fresh()), compiled()) == (1, 2)
    _write(folder, deep_cuh=deep.format(2))
    assert (_constant(fresh()), compiled()) == (2, 3)


def test_the_emulators_ptx_header_comes_first(tmp_path):
    folder = tmp_path / "kernels_cuda"
    folder.mkdir()
    text = '#include "ptx.cuh"\nextern "C" __global__ void constant(int* p) { *p = PTX_HAS_SM80; }'
    _write(folder, constant_cu=text, ptx_cuh="#error the wrong one\n")
    assert _constant(EmulatedDevice(folder=folder)) == 1
    assert _constant(EmulatedDevice(folder=folder, arch="sm_75")) == 0


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize(
    ("source", "macros"),
    [
        ("matrix", {}),
        ("async_copy", {}),
        ("async_copy", {"CACHED": 1}),
        ("async_copy", {"BYTES": 8}),
        ("async_copy", {"BYTES": 4}),
    ],
)
def test_the_real_ptx_header_compiles(arch, source, macros, tmp_path):
    pytest.importorskip("cupy")
    assert compile_for_real(source, macros, arch, tmp_path)


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulatorError, match="needs nm"):
        static_shared(tmp_path / "library.so", ["kernel"])


def test_errors_of_the_compiler(tmp_path):
    _write(tmp_path, constant_cu='extern "C" __global__ void constant(int* p) {\n*p = what; }\n')
    with pytest.raises(EmulatorError, match=r"constant\.cu:2:.*what"):
        _constant(EmulatedDevice(folder=tmp_path))
    with pytest.raises(EmulatorError, match=r"there is no missing\.cu"):
        EmulatedDevice(folder=tmp_path).load("missing", {})


def test_many_processes_compile_the_same_kernel(tmp_path):
    code = (
        "import numpy, sys\n"
        "from tests.emulator import EmulatedDevice\n"
        f"d = EmulatedDevice(folder={str(KERNELS)!r}, cache={str(tmp_path)!r})\n"
        "d.launch(d.load('broken', {}, 'bounded'), (1, 1, 1), (64, 1, 1), (d.empty(64, 'f4'),))\n"
    )
    root = Path(__file__).resolve().parents[1]
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=root) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]


def test_emulated_device_stands_in_for_the_gpu():
    x, w = random(1, 3, 9, 9), random(4, 3, 3, 3, seed=1)
    with emulated_device(order="random", seed=2) as d:
        assert d.order == "random"
        with gpuconv.use_backend("cuda"):
            y = gpuconv.conv2d(x, w, padding=1)
    assert d.launches > 0
    with gpuconv.use_backend("numpy"):
        np.testing.assert_allclose(y, gpuconv.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-5)


def test_options_are_checked():
    for options in ({"mode": "fast"}, {"order": "up"}, {"block_order": "random"}):
        with pytest.raises(ValueError, match="one of"):
            EmulatedDevice(**options)
