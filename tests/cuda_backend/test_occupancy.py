"""Occupancy by NVIDIA's own rules, and machine instructions off the disassembler's listing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpuconv.cuda_backend import compiler, occupancy, sass
from gpuconv.cuda_backend.occupancy import LIMITS, Occupancy

# By hand from the Programming Guide's table of limits.
KNOWN = {
    ("sm_90a", 256, 32, 0): Occupancy(8, 64, 1.0, "threads"),
    ("sm_90a", 256, 128, 16984): Occupancy(2, 16, 0.25, "registers"),  # 2 x 256 x 128 = 65536
    ("sm_90a", 256, 129, 0): Occupancy(1, 8, 0.125, "registers"),  # units of 8 registers: 136
    ("sm_90a", 32, 16, 0): Occupancy(32, 32, 0.5, "blocks"),
    ("sm_90a", 128, 32, 100 << 10): Occupancy(2, 8, 0.125, "shared memory"),
    ("sm_90a", 128, 32, 113 << 10): Occupancy(2, 8, 0.125, "shared memory"),
    ("sm_90a", 128, 32, 114 << 10): Occupancy(1, 4, 0.0625, "shared memory"),
    ("sm_90a", 128, 32, 228 << 10): Occupancy(0, 0, 0.0, "shared memory"),
    ("sm_80", 1024, 32, 0): Occupancy(2, 64, 1.0, "threads"),
    ("sm_80", 96, 255, 0): Occupancy(2, 6, 0.09375, "registers"),  # 8 warps in four partitions
    ("sm_86", 512, 40, 0): Occupancy(3, 48, 1.0, "threads"),
    ("sm_89", 64, 32, 0): Occupancy(24, 48, 1.0, "threads"),
    ("sm_75", 256, 64, 32 << 10): Occupancy(2, 16, 0.5, "shared memory"),
    ("sm_75", 1024, 64, 0): Occupancy(1, 32, 1.0, "threads"),
    ("sm_75", 1024, 65, 0): Occupancy(0, 0, 0.0, "registers"),
}


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_known_cases(case: tuple[str, int, int, int]) -> None:
    assert occupancy.occupancy(*case) == KNOWN[case]


def test_nvidias_header_counts_the_same_blocks(tmp_path: Path) -> None:
    """Random kernels, by cuda_occupancy.h compiled for the host."""
    pytest.importorskip("cupy")
    headers = [Path(folder) / "cuda_occupancy.h" for folder in compiler.include_folders()]
    header = next((h for h in headers if h.is_file()), None)
    if header is None or shutil.which("g++") is None:
        pytest.skip("there is no cuda_occupancy.h, or no g++")
    (tmp_path / "count.cpp").write_text(
        """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
    int capability, most, shared, reserved, threads, registers, bytes;
    while (scanf("%d %d %d %d %d %d %d", &capability, &most, &shared, &reserved, &threads,
                 &registers, &bytes) == 7) {
        cudaOccDeviceProp device;
        device.computeMajor = capability / 10, device.computeMinor = capability % 10;
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = most;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32, device.numSms = 1;
        device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared;
        device.sharedMemPerBlockOptin = shared - reserved;
        device.reservedSharedMemPerBlock = reserved;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
        kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = shared - reserved, kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        state.cacheConfig = CACHE_PREFER_SHARED;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                             threads, bytes);
        printf("%d\\n", status ? -status : result.activeBlocksPerMultiprocessor);
    }
}
"""
    )
    subprocess.run(
        ["g++", "-w", "-O1", f"-I{header.parent}", "count.cpp", "-o", "count"],
        cwd=tmp_path, check=True, timeout=100,
    )  # fmt: skip
    rnd = random.Random(0)
    cases = []
    for _ in range(2000):
        capability = rnd.choice([c for c in LIMITS if c != 103])  # 103: newer than some headers
        limits = LIMITS[capability]
        most = limits.shared - limits.shared_reserved
        threads = rnd.choice((32, 64, 96, 128, 200, 256, 384, 512, 768, 1024))
        shared = rnd.choice((0, rnd.randrange(most + 1), rnd.randrange(20000)))
        cases.append((capability, threads, rnd.randint(16, 255), shared))
    lines = "".join(
        f"{c} {LIMITS[c].threads} {LIMITS[c].shared} {LIMITS[c].shared_reserved} {t} {r} {s}\n"
        for c, t, r, s in cases
    )
    done = subprocess.run(
        [str(tmp_path / "count")], input=lines, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    counted = [int(line) for line in done.stdout.split()]
    ours = [occupancy.occupancy(f"sm_{c}", t, r, s).blocks for c, t, r, s in cases]
    wrong = [(case, a, b) for case, a, b in zip(cases, ours, counted, strict=True) if a != b]
    assert not wrong
    assert len(set(ours)) > 10


def test_the_threads_of_a_kernel_are_in_its_cubin() -> None:
    pytest.importorskip("cupy")
    seen = set()
    for stem, macros in compiler.all_variants(["direct", "implicit_gemm"]):
        if macros["X_T"] != "float32" or macros.get("INDEX_T") != "int32":
            continue
        compiled = compiler.compile_kernel(stem, macros, "sm_90a")
        threads = occupancy.max_threads(compiled.cubin)
        if stem == "direct":
            assert threads == macros["BLOCK"]
        else:
            tile = int(macros["TILE_M"]) * int(macros["TILE_N"])
            assert threads == tile // (int(macros["THREAD_M"]) * int(macros["THREAD_N"]))
        seen.add(threads)
    assert len(seen) > 1
    assert occupancy.max_threads(b"// PTX") is None


def test_every_architecture_that_is_compiled_for_has_limits() -> None:
    for arch in compiler.ARCHITECTURES:
        assert occupancy.occupancy(arch, 256, 64).blocks > 0


def test_an_architecture_that_is_not_listed_has_the_limits_of_the_next_lower_one() -> None:
    for arch, lower in (("sm_87", "sm_86"), ("sm_101", "sm_100"), ("compute_121", "sm_120")):
        for case in ((256, 32, 0), (1024, 32, 0), (32, 32, 40000)):
            assert occupancy.occupancy(arch, *case) == occupancy.occupancy(lower, *case)
    with pytest.raises(KeyError):
        occupancy.occupancy("sm_70", 256, 32)


# ---- instructions -------------------------------------------------------------------------------

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R9, R4, R5, R9.reuse ;
        /*0030*/             @!UP1 UIMAD UR4, UR4, UR5, URZ ;
        /*0040*/              @PT  FFMA R9, R4, R5, R9 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0070*/                   STL [R1], R4 ;
.L_x_1:
       /*10000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""


def test_instructions_are_counted() -> None:
    counted = sass.listed(LISTING)
    assert counted == {
        "LDC": 1, "LDG": 1, "FFMA": 2, "UIMAD": 1, "HMMA": 1, "LDGSTS": 1, "STL": 1, "BAR": 1
    }  # fmt: skip


def test_the_report_counts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(compiler, "all_variants", lambda stems: iter([("probe", {})]))
    tool = tmp_path / "nvdisasm"
    tool.write_text(f"#!{sys.executable}\nprint({LISTING!r})\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    sass.disassembler.cache_clear()
    try:
        # It has a store to local memory.
        assert compiler.main(["--report", "--sass", "--arch", "sm_90a"]) == 1
        shown = capsys.readouterr().out
        assert "2 FFMA" in shown
        assert "1 STL" in shown
        assert "1 of them load from or store to local memory" in shown
        tool.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
        with pytest.raises(RuntimeError, match="no such architecture"):
            sass.counts(b"")
    finally:
        sass.disassembler.cache_clear()


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "disassembler", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-nvdisasm"):
        sass.counts(b"")


def test_kernels_keep_out_of_local_memory() -> None:
    """Some of them. All: python -m gpuconv.cuda_backend.compiler --sass"""
    pytest.importorskip("cupy")
    if sass.disassembler() is None:
        pytest.skip("nvdisasm is not installed")
    firsts: dict[str, compiler.Macros] = {}
    for stem, macros in compiler.all_variants(["direct", "implicit_gemm", "depthwise", "filter2d"]):
        firsts.setdefault(stem, macros)
    assert len(firsts) == 4
    for stem, macros in firsts.items():
        compiled = compiler.compile_kernel(stem, macros, "sm_90a", cache=False)
        counted = sass.counts(compiled.cubin)
        assert sum(counted.values()) > 10
        assert not any(counted[name] for name in sass.LOCAL), (stem, macros)
