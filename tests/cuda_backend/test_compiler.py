"""NVRTC, which needs no device, and the cache of what it compiled."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from gpuconv import cuda_backend
from gpuconv.cuda_backend import compiler
from gpuconv.cuda_backend.compiler import ARCHITECTURES, CompileError, compile_kernel
from gpuconv.cuda_backend.launch import freeze
from gpuconv.errors import BackendError

pytest.importorskip("cupy")

SMALL = {"X_T": "float32"}
ALL_ON = "sm_90a"  # every variant is compiled for this one, every fourteenth for the others


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, and no warning given so far."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_warned", False)
    return tmp_path / "gpuconv"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stems that NVRTC was called for."""
    stems: list[str] = []
    real = compiler._run_nvrtc

    def run(stem: str, *args: Any, **options: Any) -> Any:
        stems.append(stem)
        return real(stem, *args, **options)

    monkeypatch.setattr(compiler, "_run_nvrtc", run)
    return stems


# ---- every variant --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("algorithm", cuda_backend.algorithms(), ids=lambda a: a.__name__)
def test_every_variant_compiles_and_spills_nothing(algorithm: Any, arch: str) -> None:
    """`python -m gpuconv.cuda_backend.compiler --report` does all variants for all of them."""
    variants = list(algorithm.variants())
    assert len({(stem, str(sorted(macros.items()))) for stem, macros in variants}) == len(variants)
    step = 1 if arch == ALL_ON else 14
    first = ARCHITECTURES.index(arch) % step
    for stem, macros in variants[first::step]:
        report = compile_kernel(stem, macros, arch).report
        assert report.registers > 0
        assert report.spill_stores == report.spill_loads == 0, (stem, macros, report)


def test_the_report_is_one_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = [("probe", {}), ("direct", SMALL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "all_variants", lambda stems: iter(variants))
        assert compiler.main(["--report", "--arch", "sm_80", "--arch", "sm_90a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "sm_80" in lines[0]
    assert "registers" in lines[0]
    assert "4 kernels" in lines[-1]


def test_the_summary_is_a_line_for_each_kernel_and_architecture(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [("probe", {}), ("direct", SMALL), ("direct", {**SMALL, "K_TILE": 8})]
    reports = [compile_kernel(stem, macros, "sm_90a").report for stem, macros in variants]
    low, high = sorted(report.registers for report in reports[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "all_variants", lambda stems: iter(variants))
        assert compiler.main(["--summary", "--arch", "sm_90a"]) == 0
    probe, direct, total = capsys.readouterr().out.splitlines()
    assert f"1 variants {reports[0].registers:8} registers" in probe
    assert f"2 variants {f'{low}-{high}':>8} registers" in direct
    assert "0 B spilled 0 local; at least " in direct
    assert total.startswith("3 kernels")


def test_every_variant_is_listed_once() -> None:
    """Several algorithms launch split_sum."""
    listed = [(stem, freeze(macros)) for stem, macros in compiler.all_variants()]
    assert len(listed) == len(set(listed))
    assert "split_sum" in {stem for stem, _ in listed}


def test_reports_are_read_off_the_log() -> None:
    log = """
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 496 bytes cmem[0]
ptxas         .     32 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads"""
    report = compiler.Report.parse(log)
    assert report == compiler.Report(40, 1024, 32, 36, 40, 496)


def test_an_error_shows_the_log_and_the_options() -> None:
    with pytest.raises(CompileError, match=r"(?s)direct\.cu with .*sm_90a.*K_TILE: 1 to 8"):
        compile_kernel("direct", {"K_TILE": 9}, "sm_90a")
    with pytest.raises(CompileError, match="a type that sums are made in"):
        compile_kernel("direct", {"ACC_T": "float16"}, "sm_90a")


def test_subnormals_are_kept(tmp_path: Path) -> None:
    """PTX says .ftz where a compiler may flush them."""
    from cupy_backends.cuda.libs import nvrtc

    source = 'extern "C" __global__ void k(float* x) { x[0] = fmaf(x[0], x[1], x[2]); }'
    program = nvrtc.createProgram(source, "k.cu", (), ())
    nvrtc.compileProgram(program, (*compiler.OPTIONS, "--gpu-architecture=compute_80"))
    assert b".ftz" not in nvrtc.getPTX(program)


# ---- sources ---------------------------------------------------------------------------------


def folder_with(tmp_path: Path, value: str) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir(exist_ok=True)
    (folder / "k.cu").write_text(
        '#include "outer.cuh"\nextern "C" __global__ void k(float* x) { x[0] = VALUE; }\n'
    )
    (folder / "outer.cuh").write_text('#pragma once\n#  include "inner.cuh"\n')
    (folder / "inner.cuh").write_text(f"#pragma once\n#define VALUE {value}\n")
    return folder


def test_sources_are_all_that_is_included(tmp_path: Path) -> None:
    assert list(compiler.read_sources("k", folder_with(tmp_path, "1"))) == [
        "k.cu", "outer.cuh", "inner.cuh",
    ]  # fmt: skip
    direct = compiler.read_sources("direct")
    assert {"types.cuh", "problem.cuh", "boundary.cuh"} <= set(direct)


def test_the_installed_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "site" / "gpuconv" / "cuda_backend" / "compiler.py"
    monkeypatch.setattr(compiler, "__file__", str(module))
    find = compiler.source_folder.__wrapped__
    with pytest.raises(BackendError, match="the kernels' sources are missing"):
        find()
    checkout = tmp_path / "site" / "kernels_cuda"
    installed = tmp_path / "site" / "gpuconv" / "kernels_cuda"
    for folder in (checkout, installed):
        folder.mkdir(parents=True)
        (folder / "types.cuh").touch()
        assert find() == folder


# ---- the cache -------------------------------------------------------------------------------


def test_a_second_process_compiles_nothing(cache: Path, counted: list[str]) -> None:
    first = compile_kernel("direct", SMALL, "sm_90a")
    second = compile_kernel("direct", SMALL, "sm_90a")
    assert counted == ["direct"]
    assert first == second
    assert [path.suffix for path in cache.iterdir()] == [".bin"]


def test_macros_architecture_and_version_have_entries_of_their_own(
    cache: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernel("probe", {}, "sm_90a")
    compile_kernel("probe", {}, "sm_80")
    compile_kernel("probe", {"VALUE": 1}, "sm_80")
    compile_kernel("probe", {"VALUE": 2}, "sm_80")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    compile_kernel("probe", {"VALUE": 2}, "sm_80")
    assert len(counted) == 5


def test_a_changed_header_compiles_anew(cache: Path, tmp_path: Path, counted: list[str]) -> None:
    one = compile_kernel("k", {}, "sm_90a", folder=folder_with(tmp_path, "1"))
    two = compile_kernel("k", {}, "sm_90a", folder=folder_with(tmp_path, "2"))
    again = compile_kernel("k", {}, "sm_90a", folder=folder_with(tmp_path, "1"))
    assert counted == ["k", "k"]
    assert one == again != two


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-100] + bytes(100),
        lambda data: b"some other file",
        lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    ],
)
def test_a_damaged_entry_is_rebuilt(cache: Path, counted: list[str], harm: Any) -> None:
    good = compile_kernel("probe", {}, "sm_90a")
    (entry,) = cache.iterdir()
    data = entry.read_bytes()
    entry.write_bytes(harm(data))
    assert compile_kernel("probe", {}, "sm_90a") == good
    assert counted == ["probe", "probe"]
    assert entry.read_bytes() == data


def test_a_folder_that_cannot_be_written_is_said_once(
    cache: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, read-only or no folder at all: the same to the cache."""
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels in .*CUPY_CACHE_DIR"):
        first = compile_kernel("probe", {}, "sm_90a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_kernel("probe", {}, "sm_90a") == first
        compile_kernel("probe", {"VALUE": 1}, "sm_90a")


def test_a_full_disk_leaves_no_torn_entry(
    cache: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        compile_kernel("probe", {}, "sm_90a")
    assert list(cache.iterdir()) == []


def test_no_home_folder_is_no_error(monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler, "_warned", False)
    monkeypatch.setattr(compiler, "cache_folder", homeless)
    with pytest.warns(RuntimeWarning, match="the user's cache folder"):
        compile_kernel("probe", {}, "sm_90a")


def test_eight_processes_share_a_folder(cache: Path) -> None:
    code = (
        "from gpuconv.cuda_backend.compiler import compile_kernel;"
        "import hashlib;"
        "print(hashlib.sha256(compile_kernel('direct', {'K_TILE': 2}, 'sm_90a').cubin).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    digests = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(digests) == 1
    assert [path.suffix for path in cache.iterdir()] == [".bin"]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"CUPY_CACHE_DIR": "/c", "XDG_CACHE_HOME": "/x"}, "/c/gpuconv"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/gpuconv"),
        ("linux", {"HOME": "/h"}, "/h/.cache/gpuconv"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/gpuconv"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/gpuconv"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("CUPY_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiler.sys, "platform", platform)
    assert compiler.cache_folder() == Path(expected)


# ---- architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "supported", "expected"),
    [
        ((9, 0), (75, 80, 90, 100, 120), "sm_90a"),
        ((7, 5), (75, 80, 90), "sm_75"),
        ((8, 9), (75, 80, 86, 89, 90), "sm_89"),
        ((8, 9), (75, 80, 86), "sm_86"),
        ((12, 1), (90, 100, 120), "sm_120"),
        ((10, 3), (90, 100, 120), "sm_100"),
        ((10, 3), (90, 100, 101, 120), "sm_100"),  # 10.1 and 8.7 are Tegra's
        ((8, 9), (75, 80, 86, 87, 90), "sm_86"),
        ((8, 7), (80, 86, 87), "sm_87"),
        ((12, 0), (75, 80, 90), "compute_90"),
        ((9, 0), (75, 80), "compute_80"),
    ],
)
def test_architectures(capability: Any, supported: Any, expected: str) -> None:
    assert compiler.architecture(capability, supported) == expected


def test_devices_older_than_nvrtc_are_named() -> None:
    with pytest.raises(BackendError, match=r"no longer compiles for compute capability 7\.0"):
        compiler.architecture((7, 0), (75, 80))


def test_ptx_where_nvrtc_is_older_than_the_device() -> None:
    code = compile_kernel("probe", {}, "compute_90", cache=False).cubin
    assert b".target sm_90" in code


def test_a_cubin_is_a_whole_elf_file() -> None:
    cubin = compile_kernel("probe", {}, "sm_90a").cubin
    assert cubin[:4] == b"\x7fELF"
    header_offset = int.from_bytes(cubin[40:48], "little")
    header_size = int.from_bytes(cubin[58:60], "little")
    headers = int.from_bytes(cubin[60:62], "little")
    program_offset = int.from_bytes(cubin[32:40], "little")
    program_end = program_offset + 56 * int.from_bytes(cubin[56:58], "little")
    assert len(cubin) >= max(header_offset + header_size * headers, program_end)
