"""The devices' peaks, against the figures that their data sheets give for whole GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gpuconv import dtypes
from gpuconv.cuda_backend import compiler, rates

# Architecture, multiprocessors; the boost clock in GHz, and that of 16-bit and TF32 tensor cores;
# TFLOPS of float32, float64, dense 16-bit, TF32 and float64 tensor cores (None: it gives none).
DATA_SHEETS = {
    "T4": ("sm_75", 40, 1.59, 1.59, 8.1, None, 65, 0, 0),
    "A100 SXM": ("sm_80", 108, 1.41, 1.41, 19.5, 9.7, 312, 156, 19.5),
    "RTX A6000": ("sm_86", 84, 1.8, 1.8, 38.7, None, 154.8, 77.4, None),
    "L40S": ("sm_89", 142, 2.52, 2.52, 91.6, None, 362, 183, None),
    "H100 SXM": ("sm_90a", 132, 1.98, 1.83, 67, 34, 989, 494, 67),
    "B200": ("sm_100", 148, 1.97, 1.85, 75, 37, 2250, 1125, 37),
}


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_peaks(name: str) -> None:
    arch, sm_count, clock, tensor_clock, *expected = DATA_SHEETS[name]
    device = SimpleNamespace(arch=arch, sm_count=sm_count, clock_hz=clock * 1e9)

    def tensor(kind: str, clock: float) -> float:
        return 2 * rates.tensor_per_cycle(device, kind) * sm_count * clock * 1e9

    found = [2 * rates.multiply_adds(device, dtype) for dtype in ("float32", "float64")]
    found += [tensor("half", tensor_clock), tensor("tf32", tensor_clock), tensor("float64", clock)]
    for peak, teraflops in zip(found, expected, strict=True):
        if teraflops is not None:
            assert peak == pytest.approx(1e12 * teraflops, rel=0.03)


def test_every_architecture_and_type_has_rates() -> None:
    for arch in compiler.ARCHITECTURES:
        device = SimpleNamespace(arch=arch, sm_count=1, clock_hz=1.0)
        for dtype in dtypes.ALL:
            accumulator = dtypes.accumulator(dtypes.natural_result(dtype, dtype))
            assert 1 <= rates.multiply_adds(device, accumulator) <= 128


def test_a_later_capability_has_the_rate_of_the_one_before() -> None:
    device = SimpleNamespace(arch="sm_87")
    assert rates.per_cycle(device, "float64") == 2
    assert rates.per_cycle(device, "complex64") == 128
    assert rates.tensor_per_cycle(SimpleNamespace(arch="sm_75"), "tf32") == 0


def test_mma_sync_reaches_all_of_a_rate_before_hopper_and_always_in_float64() -> None:
    for arch in compiler.ARCHITECTURES:
        device = SimpleNamespace(arch=arch)
        for kind in rates.TENSOR_MULTIPLY_ADDS:
            reached, whole = (
                f(device, kind) for f in (rates.mma_sync_per_cycle, rates.tensor_per_cycle)
            )
            assert (reached < whole) == (kind != "float64" and arch in ("sm_90a", "sm_100"))
