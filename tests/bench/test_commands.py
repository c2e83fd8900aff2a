"""The commands from end to end, in processes of their own as users start them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_problems, kernels, on_gpu
from gpuconv import backends

ROOT = Path(__file__).parent.parent.parent


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "small.json"
    done = python(
        "-m", "bench", "--suite", "small", "--peers", "ndimage", "--budget", "0.01", "--out",
        str(out), "--threads", "1", "--backend", "numpy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert "twice-dropped ball" in done.stdout
    document = json.loads(out.read_text())
    assert len(document["rows"]) == 4
    assert document["machine"]["threads"] == 1
    assert all("median" in row["cells"]["gpuconv"] for row in document["rows"])


def test_the_list_and_wrong_names() -> None:
    done = python("-m", "bench", "--list")
    assert "replknet31b" in done.stdout
    assert "arXiv" in done.stdout
    assert "--peers tensorflow" in python("-m", "bench", "--peers", "tensorflow").stderr
    assert "suite is one of" in python("-m", "bench", "--suite", "alexnet", "--peers").stderr


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path: Path) -> None:
    if backends.why_no_cuda() is None:
        pytest.skip("there is a GPU")
    done = python("-m", "bench.on_gpu", "--out", str(tmp_path / "results"))
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "no GPU" in done.stdout
    assert not (tmp_path / "results").exists()
    done = python("-m", "bench", "--backend", "cuda", "--suite", "small")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


# ---- the parts of on_gpu, with the NumPy backend in place of a device ----------------------------


def test_problems_of_every_kind_pass_on_the_numpy_backend() -> None:
    results: list[dict[str, str]] = []
    counts = gpu_problems.run("numpy", 60, 3 * len(gpu_problems.FIXED) + 15, results.append)
    assert counts["failed"] == 0, [r for r in results if r["outcome"] == "failed"]
    passed = {r["problem"].split()[0] for r in results if r["outcome"] == "passed"}
    assert passed == {"fprop", "dgrad", "wgrad"}
    assert counts["passed"] > 150


def test_a_wrong_algorithm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuconv.numpy_backend import direct

    right = direct.run

    def wrong(plan, x, w, bias, out):  # type: ignore[no-untyped-def]
        right(plan, x, w, bias, out)
        out[..., -1] = 0

    monkeypatch.setattr(direct, "run", wrong)
    # A problem of its own: of one that was called before, the call may be kept with what it runs.
    case = gpu_problems._case((2, 5, 13, 14), (7, 5, 3, 3), padding=1)
    results = list(gpu_problems.check(case, "numpy"))
    failed = {r["algorithm"] for r in results if r["outcome"] == "failed"}
    assert failed == {"direct"}
    # dgrad is made of fprop's algorithms: the same mistake shows.
    results = list(gpu_problems.check(case, "numpy", "dgrad"))
    assert "direct" in {r["algorithm"] for r in results if r["outcome"] == "failed"}


def test_processes_that_run_over_are_cut_and_others_are_not(tmp_path: Path) -> None:
    log = tmp_path / "log"
    began = time.monotonic()
    stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); print('on', flush=True);"
    finished = on_gpu.run_processes(
        [
            [sys.executable, "-c", f"{stubborn} time.sleep(60)"],
            [sys.executable, "-c", "import sys; print('done'); sys.exit(7)"],
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"],
        ],
        4.0,
        log,
    )
    assert time.monotonic() - began < 20
    assert finished[0].cut
    assert [f.status for f in finished[1:]] == [7, -9]
    assert "done" in log.read_text()


def test_kernels_are_compiled_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    whole = kernels.share(0, 1, ["pack_filter", "split_sum"])
    shares = [kernels.share(i, 3, ["pack_filter", "split_sum"]) for i in range(3)]
    assert sorted(str(kernel) for share in shares for kernel in share) == sorted(map(str, whole))
    record = tmp_path / "record"
    options = ["--arch", "sm_90a", "--share", "1/3", "--record", str(record)]
    assert kernels.main([*options, "pack_filter", "split_sum"]) == 0
    lines = on_gpu.read_lines(record)
    assert [line["outcome"] for line in lines] == ["compiled"] * len(shares[1])
    assert all(line["registers"] > 0 for line in lines)
    assert len(list((tmp_path / "cache" / "gpuconv").iterdir())) == len(shares[1])
    assert kernels.main(["--arch", "sm_1", "--record", str(record), "pack_filter"]) == 0
    failed = on_gpu.read_lines(record)[len(shares[1]) :]
    assert failed
    assert all("CompileError" in line["text"] for line in failed)


def test_every_core_compiles_a_share_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel has one process, and what does not compile is a failure."""
    statuses, cores = [0, 0, 0], 3
    seen: list[str] = []

    def instead(commands: list[list[str]], *args: object) -> list[on_gpu.Finished]:
        for command in commands:
            options = dict(zip(command[3::2], command[4::2], strict=True))
            seen.append(options["--share"])
            result = {"kernel": "a X=1", "outcome": "compiled", "spilled": 8}
            if options["--share"] == "2/3":
                result = {"kernel": "b", "outcome": "failed", "text": "CompileError: no"}
            Path(options["--record"]).write_text(json.dumps(result) + "\n")
        return [on_gpu.Finished(status, 1.0) for status in statuses]

    device = SimpleNamespace(arch="sm_90a")
    monkeypatch.setattr(backends, "backend", lambda name: SimpleNamespace(device=lambda: device))
    monkeypatch.setattr(
        on_gpu.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False
    )
    monkeypatch.setattr(on_gpu, "run_processes", instead)
    part = on_gpu.kernels(60, tmp_path, tmp_path)
    assert seen == ["0/3", "1/3", "2/3"]
    assert part["state"] == "failed"
    assert part["counts"] == {"compiled": 2, "failed": 1}
    assert part["failures"][0]["kernel"] == "b"
    assert part["note"] == "2 spill registers: a X=1; a X=1"
    assert "why" not in part
    statuses = [0, 1, 0]  # a Python exception
    assert "died: status {1}" in on_gpu.kernels(60, tmp_path, tmp_path)["why"]
    cores, statuses = 200, [0] * 32
    seen.clear()
    part = on_gpu.kernels(60, tmp_path, tmp_path)
    assert part["counts"] == {"compiled": 32}
    assert seen == [f"{i}/32" for i in range(32)]
    assert part["note"] == "32 spill registers: a X=1; a X=1; a X=1 ..."


def test_jax_leaves_the_device_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first of several processes takes three quarters of its memory."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    code = "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    on_gpu.run_processes([[sys.executable, "-c", code]], 30, tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[-1] == "false"


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert on_gpu.read_lines(path) == [{"a": 1}, {"a": 2}]
    assert on_gpu.read_lines(tmp_path / "none") == []


def test_the_plugin_records_outcomes_and_shares_tests(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('i', range(5))\n"
        "def test_a(i): assert i != 3\n"
        "def test_b(): pytest.skip('no reason')\n"
    )
    (tmp_path / "test_broken.py").write_text("import not_installed_anywhere\n")
    lines = []
    for share in ("0/2", "1/2"):
        record = tmp_path / f"record{share[0]}"
        python(
            "-m", "pytest", "-m", "gpu", "-p", "bench.pytest_record", "-p", "no:cacheprovider",
            "--continue-on-collection-errors", "--record", str(record), "--share", share,
            "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path),
        )  # fmt: skip
        lines += on_gpu.read_lines(record)
    outcomes = sorted(line["outcome"] for line in lines)
    assert outcomes == [*["failed"], *["not collected"] * 2, *["passed"] * 4, "skipped"]
    part = on_gpu._counted(lines, [on_gpu.Finished(1, 2.0)])
    assert part["state"] == "failed"
    assert part["counts"]["passed"] == 4
    assert "assert 3 != 3" in next(f for f in part["failures"] if f["outcome"] == "failed")["text"]


def test_the_stand_in_for_hypothesis_skips_its_tests_only(tmp_path: Path) -> None:
    (tmp_path / "hypothesis").mkdir()
    (tmp_path / "hypothesis" / "__init__.py").write_text(on_gpu.HYPOTHESIS)
    (tmp_path / "hypothesis" / "strategies.py").write_text(on_gpu.STRATEGIES)
    (tmp_path / "test_it.py").write_text(
        "import hypothesis\n"
        "from hypothesis import HealthCheck, example, given, settings\n"
        "from hypothesis import strategies as st\n"
        "hypothesis.settings.register_profile('a', deadline=None,\n"
        "    suppress_health_check=[hypothesis.HealthCheck.too_slow])\n"
        "hypothesis.settings.load_profile('a')\n"
        "@st.composite\n"
        "def shapes(draw): return draw(st.integers(0, 3).map(str))\n"
        "@given(x=shapes() | st.none())\n"
        "@settings(max_examples=3)\n"
        "@example(x=1)\n"
        "def test_a(x): assert False\n"
        "def test_b(): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p",
         "no:hypothesispytest", "-c", "/dev/null", "--rootdir", str(tmp_path), "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr


def test_the_parts_make_a_summary_and_one_that_raises_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fine(seconds: float, out: Path, temporary: Path) -> on_gpu.Part:
        return {"state": "done", "seconds": 1.0, "counts": {"passed": 3}}

    def broken(seconds: float, out: Path, temporary: Path) -> on_gpu.Part:
        raise OSError("disk full")

    monkeypatch.setattr(backends, "why_no_cuda", lambda: None)
    monkeypatch.setattr(on_gpu, "PARTS", {"a": (1, fine), "b": (1, broken), "c": (2, fine)})
    out = tmp_path / "results"
    assert on_gpu.main(["--out", str(out), "--commit", "abc"]) == 1
    summary = json.loads((out / "on_gpu.json").read_text())
    assert [part["state"] for part in summary["parts"].values()] == ["done", "failed", "done"]
    assert summary["commit"] == "abc"
    printed = capsys.readouterr().out
    assert "OSError: disk full" in printed
    assert "3 passed" in printed
    monkeypatch.setattr(on_gpu, "PARTS", {"a": (1, fine)})
    assert on_gpu.main(["--out", str(out)]) == 0
    assert on_gpu.main(["--out", str(out), "--seconds", "1"]) == 0
    assert "no time left" in capsys.readouterr().out
    assert len(list(out.iterdir())) <= 8


# A stand-in for ``python -m bench`` that loses the device in its second row and dies in its third.
CRASHING = """
import json, os, sys
from pathlib import Path

import bench.run as running
from bench.suites import Row

out = Path(sys.argv[sys.argv.index("--out") + 1])
assert "--resume" in sys.argv
running.machine.ceilings = lambda *args: {"flops": 1e11, "bytes": 1e10}
measure = running.measure_row

def measure_row(row, *args):
    if row.name == "b":
        illegal = {"failed": "CUDARuntimeError: cudaErrorIllegalAddress"}
        return running._entry(row) | {"cells": {"gpuconv": illegal}}
    if row.name == "c":
        os.abort()
    return measure(row, *args)

running.measure_row = measure_row
rows = [Row("small", name, (1, 1, 8, 8), (1, 1, 3, 3)) for name in "abcd"]
running.run(running.Settings("numpy", {"small": rows}, out=out, resume=True))
"""


def test_a_benchmark_goes_on_after_a_row_that_takes_the_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "crashing.py"
    stand_in.write_text(CRASHING)
    real = on_gpu.run_processes

    def instead(commands: list[list[str]], *args: object) -> list[on_gpu.Finished]:
        ((program, _, _, *rest),) = commands  # python -m bench ...
        return real([[program, str(stand_in), *rest]], *args)  # type: ignore[arg-type]

    monkeypatch.setattr(on_gpu, "run_processes", instead)
    part = on_gpu.benchmark("bench_float32")(60, tmp_path, tmp_path)
    rows = json.loads((tmp_path / "bench_float32.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"]
    assert part["state"] == "failed"
    assert part["rows"] == 3
    assert [failure.split()[0] for failure in part["failures"]] == ["small/c", "small/b"]
    assert (tmp_path / "bench_float32.log").exists()


def test_a_benchmark_that_cannot_begin_is_not_tried_again(tmp_path: Path) -> None:
    part = on_gpu.benchmark("bench_float32", "--dtype", "float31")(40, tmp_path, tmp_path)
    assert part["state"] == "failed"
    assert (tmp_path / "bench_float32.log").read_text().count("$ ") == 1


def test_algorithms_are_put_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def race(seconds: float, out: Path, temporary: Path) -> on_gpu.Part:
        options = "--backend numpy --operation fprop wgrad --filter 8 --algorithms 1e9"
        return on_gpu.benchmark("race", "--suite", "small", "--peers", *options.split())(
            seconds, out, temporary
        )

    monkeypatch.setattr(backends, "why_no_cuda", lambda: None)
    monkeypatch.setattr(on_gpu, "PARTS", {"race": (1, race)})
    assert on_gpu.main(["--out", str(tmp_path), "--seconds", "60"]) == 0
    printed = capsys.readouterr().out
    assert "fastest first: time, predicted" in printed
    assert "of 3 rows" in printed
    part = json.loads((tmp_path / "on_gpu.json").read_text())["parts"]["race"]
    assert part["rows"] == 3
    assert sum(part["fastest"].values()) == 3


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", "done"),
        ("echo '========= Invalid __global__ write'; echo '========= ERROR SUMMARY: 1 error';"
         " exit 86", "failed"),
        ("echo 'Device not supported'; exit 1", "not run"),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: str
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: str(tool))
    part = on_gpu.sanitizer("memcheck")(20, tmp_path, tmp_path)
    assert part["state"] == state
    if state == "failed":
        assert "Invalid __global__ write" in part["findings"][0]


def test_the_sanitizer_is_found_where_cuda_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda"))
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert on_gpu.find_sanitizer() == str(tool)
