"""``python -m bench.on_gpu --out DIR``: everything that only a real GPU can show, in one command.

1. every kernel compiled, on all cores, so that no other part waits for that,
2. random problems on every algorithm against the float64 reference (needs nothing but CuPy),
3. the algorithms beside each other on a few rows: which one wins where, and what was predicted,
4. the tests marked ``gpu``, where pytest is installed,
5. compute-sanitizer's memcheck and racecheck on small problems, where the tool is,
6. the sample suite, forward and backward, beside torch with cuDNN and cupyx.scipy.

Each part is a process of its own with a hard limit on its time: one that runs over is cut and
reported as cut, one that crashes takes nothing else with it. From a bare checkout::

    PYTHONPATH=. python3 -m bench.on_gpu --out results

Exit status: 0 all well, 1 a wrong result, a failed test or a sanitizer's finding, 2 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.peers import CUDA_PEERS

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_STATUS = 86  # what compute-sanitizer exits with when it found something

# Instead of hypothesis where it is not installed: its tests skip, all others run.
HYPOTHESIS = """
from unittest.mock import MagicMock

import pytest


class settings:
    def __init__(self, *args, **options):
        pass

    def __call__(self, test):
        return test

    register_profile = load_profile = get_profile = lambda *args, **options: None


def given(*args, **options):
    return pytest.mark.skip(reason="hypothesis is not installed")


def example(*args, **options):
    return lambda test: test


class _Names(type):
    def __getattr__(cls, name):
        return name


class HealthCheck(metaclass=_Names):
    pass


def __getattr__(name):  # assume, note, ...
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""
STRATEGIES = """
from unittest.mock import MagicMock


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    status: int | None  # None: cut
    seconds: float

    @property
    def cut(self) -> bool:
        return self.status is None


def run_processes(
    commands: Sequence[Sequence[str]], seconds: float, log: Path, extra_path: str = ""
) -> list[Finished]:
    """Run the commands side by side, all output to `log`; those not done in time are cut.

    First with an interrupt, so that they can still say what they know, then for good.
    """
    path = os.pathsep.join(p for p in (extra_path, str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX would take the device from the others
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    grace = min(8.0, seconds / 4)
    with log.open("ab") as output:
        running = []
        for command in commands:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            running.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        finished = [_wait(process, began + seconds - grace) for process in running]
        for sign in (signal.SIGINT, signal.SIGKILL):
            for process, done in zip(running, finished, strict=True):
                if not done and process.poll() is None:
                    os.killpg(process.pid, sign)
            for process, done in zip(running, finished, strict=True):
                if not done:
                    _wait(process, began + seconds)
    took = time.monotonic() - began
    return [
        Finished(process.returncode if done else None, round(took, 1))
        for process, done in zip(running, finished, strict=True)
    ]


def _wait(process: subprocess.Popen[bytes], until: float) -> bool:
    try:
        process.wait(max(0.01, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


# ---- the parts -------------------------------------------------------------------------------

Part = dict[str, Any]


def kernels(seconds: float, out: Path, temporary: Path) -> Part:
    """Every kernel compiled for this device, by a process for each core."""
    from gpuconv import backends

    arch, shares = backends.backend("cuda").device().arch, min(_cores(), 32)
    records = [temporary / f"kernels{i}.jsonl" for i in range(shares)]
    commands = [
        [
            sys.executable, "-m", "bench.kernels", "--arch", arch, "--share", f"{i}/{shares}",
            "--record", str(record),
        ]
        for i, record in enumerate(records)
    ]  # fmt: skip
    finished = run_processes(commands, seconds, out / "kernels.log")
    lines = [line for record in records for line in read_lines(record)]
    part = _counted(lines, finished)
    if spilled := [line["kernel"] for line in lines if line.get("spilled")]:
        more = " ..." if len(spilled) > 3 else ""
        part["note"] = f"{len(spilled)} spill registers: {'; '.join(spilled[:3])}{more}"
    if statuses := {f.status for f in finished} - {0, None}:
        part["state"], part["why"] = "failed", f"a process died: status {statuses}"
    return part


def problems(seconds: float, out: Path, temporary: Path) -> Part:
    """Random problems, every algorithm."""
    record = temporary / "problems.jsonl"
    command = [sys.executable, "-m", "bench.gpu_problems", "--record", str(record)]
    command += ["--seconds", str(max(1, seconds - 15))]
    (done,) = run_processes([command], seconds, out / "problems.log")
    lines = read_lines(record)
    part = _counted(lines, [done])
    part["algorithms"] = _tally(line.get("algorithm", "") for line in lines)
    if done.status not in (0, 1, None):
        part["state"], part["why"] = "failed", f"the process died: status {done.status}"
    return part


def tests(seconds: float, out: Path, temporary: Path) -> Part:
    """The tests marked gpu, in a few processes."""
    if not _has("pytest"):
        return {"state": "not run", "why": "pytest is not installed"}
    extra = ""
    if not _has("hypothesis"):
        folder = temporary / "stand_in" / "hypothesis"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(HYPOTHESIS)
        (folder / "strategies.py").write_text(STRATEGIES)
        extra = str(folder.parent)
    shares = max(1, min(8, _cores() // 2))
    commands = [
        [
            sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--maxfail=40",
            "-p", "no:cacheprovider", "-p", "bench.pytest_record",
            "--continue-on-collection-errors",
            "--record", str(temporary / f"tests{i}.jsonl"), "--share", f"{i}/{shares}", "tests",
        ]
        for i in range(shares)
    ]  # fmt: skip
    finished = run_processes(commands, seconds, out / "tests.log", extra)
    lines = [line for i in range(shares) for line in read_lines(temporary / f"tests{i}.jsonl")]
    # Every process collects all modules: what one could not import is said once.
    once = {(line["test"], line["outcome"]): line for line in lines}
    part = _counted(list(once.values()), finished)
    if extra:
        part["note"] = "hypothesis is not installed: its tests were skipped"
    for line in once.values():
        missing = "ModuleNotFoundError" in line["text"] and "gpuconv" not in line["text"][-200:]
        if line["outcome"] == "not collected" and not missing:
            part["state"] = "failed"
    part["skips"] = _tally(
        line["text"].splitlines()[0] if line["text"] else ""
        for line in once.values()
        if line["outcome"] == "skipped"
    )
    slowest = sorted(once.values(), key=lambda line: -float(line["seconds"]))[:5]
    part["slowest"] = [{"test": s["test"], "seconds": s["seconds"]} for s in slowest]
    if not any(part["counts"].get(name) for name in ("passed", "failed", "skipped")) and any(
        f.status not in (0, 5, None) for f in finished
    ):
        part["state"], part["why"] = "failed", "pytest ran no test; see tests.log"
    return part


def sanitizer(tool: str) -> Callable[[float, Path, Path], Part]:
    """The part that runs small problems under one of compute-sanitizer's tools."""

    def part(seconds: float, out: Path, temporary: Path) -> Part:
        program = find_sanitizer()
        if program is None:
            return {"state": "not run", "why": "compute-sanitizer is not on this machine"}
        record = temporary / f"{tool}.jsonl"
        command = [
            program, "--tool", tool, "--error-exitcode", str(SANITIZER_STATUS),
            "--report-api-errors", "no", "--target-processes", "all", "--print-limit", "20",
            sys.executable, "-m", "bench.gpu_problems", "--record", str(record), "--no-pool",
            "--seconds", str(max(2, seconds * 0.6 - 10)),
        ]  # fmt: skip
        log = out / f"{tool}.log"
        (done,) = run_processes([command], seconds, log)
        text = log.read_text(errors="replace")
        found = _counted(read_lines(record), [done])
        summary = [line for line in text.splitlines() if "SUMMARY" in line]
        found["summary"] = summary[-1].strip("= ") if summary else None
        if done.status == SANITIZER_STATUS:
            found["state"] = "failed"
            marks = [line for line in text.splitlines() if line.startswith("=========")]
            found["findings"] = marks[:40]
        elif not summary and not done.cut and not found["counts"]:
            lines = [line for line in text.splitlines() if line.strip()][-3:]
            found |= {
                "state": "not run",
                "why": "the tool does not work here: " + " | ".join(lines),
            }
        return found

    return part


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or where CUDA installs it."""
    folders = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join(
        [os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)]
    )
    return shutil.which("compute-sanitizer", path=path)


# Not JAX: its convolutions are cuDNN's, as torch's are, and compiling each takes seconds.
_PEERS = tuple(name for name in CUDA_PEERS if name != "jax")


def benchmark(name: str, *options: str) -> Callable[[float, Path, Path], Part]:
    """The part that times the sample suite as the options of ``python -m bench`` say."""

    def part(seconds: float, out: Path, temporary: Path) -> Part:
        from bench import report
        from bench.run import read

        result, log = out / f"{name}.json", out / f"{name}.log"
        command = [
            sys.executable, "-m", "bench", "--backend", "cuda", "--suite", "sample", "--batch",
            "32", "--budget", "0.15", "--out", str(result), "--peers", *_PEERS, *options,
        ]  # fmt: skip
        done, took = _resumed(command, seconds, result, log)
        found: Part = {"state": "cut" if done.cut else "done", "seconds": took}
        if not result.exists():
            tail = log.read_text(errors="replace").splitlines()[-8:]
            return found | {"state": "failed", "why": " | ".join(tail)}
        document = read(result)
        found["rows"] = sum("cells" in row for row in document["rows"])
        ratios = [r for row in document["rows"] if (r := report.best_ratio(row)) is not None]
        mean = report.geomean(ratios)
        found["geomean"] = None if mean is None else round(mean, 3)
        if "cut" in document:
            found |= {"state": "cut", "why": document["cut"]}
        if done.status not in (0, 1, None):
            found |= {"state": "failed", "why": f"the process died: status {done.status}"}
        found["fastest"] = _fastest(document)
        if troubles := report.troubles(document):
            found |= {"state": "failed", "failures": troubles[:20]}
        return found

    return part


def _resumed(command: list[str], seconds: float, result: Path, log: Path) -> tuple[Finished, float]:
    """Run the benchmark; where a row's kernel takes the device or the process with it, go on after
    that row in another process."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        deadline = str(max(5.0, left - min(25.0, left / 3)))
        tried = _rows_tried(result)
        (done,) = run_processes([[*command, "--resume", "--deadline", deadline]], left, log)
        left = end - time.monotonic()
        died = done.status not in (0, 1, None) or _lost(result)
        if not died or _rows_tried(result) == tried or left < 20:
            return done, round(seconds - left, 1)


def _rows_tried(result: Path) -> int:
    from bench.run import read

    if not result.exists():
        return 0
    document = read(result)
    return len(document["rows"]) + ("measuring" in document)


def _lost(result: Path) -> bool:
    from bench.run import read

    return result.exists() and "device was lost" in read(result).get("cut", "")


def _fastest(document: dict[str, Any]) -> dict[str, int]:
    """How many rows each algorithm is the fastest of, where they were timed beside each other."""
    from bench import report

    return _tally(f"{choice.best} ({choice.group})" for choice in report.choices(document))


# Where the choice of an algorithm is least certain: 3x3, strided, depthwise, one picture.
_CONTESTED = (
    "resnet50/layer1.0.conv2", "mobilenetv2/block2.depthwise", "filters/4096x4096 7x7",
    "resnet50/conv1", "resnet50/layer3.1.conv2", "replknet31b/stage2.0.large", "unet/up2.upconv",
)  # fmt: skip


def _algorithms(dtype: str) -> Callable[[float, Path, Path], Part]:
    """No model of a cost is trusted here: every algorithm that can serve is timed."""
    return benchmark(
        f"algorithms_{dtype}", "--dtype", dtype, "--operation", "fprop", "dgrad", "wgrad",
        "--algorithms", "1e9", "--row-limit", "0.2", "--peers", "--filter", *_CONTESTED,
    )  # fmt: skip


PARTS: dict[str, tuple[float, Callable[[float, Path, Path], Part]]] = {
    # name: (share of the time that is left, relative to the parts after it; what it does)
    "kernels": (60, kernels),
    "problems": (50, problems),
    "algorithms_float32": (40, _algorithms("float32")),
    "algorithms_float16": (30, _algorithms("float16")),
    "tests": (110, tests),
    "memcheck": (40, sanitizer("memcheck")),
    "racecheck": (30, sanitizer("racecheck")),
    "bench_float32": (60, benchmark("bench_float32", "--dtype", "float32")),
    "bench_float16": (40, benchmark("bench_float16", "--dtype", "float16")),
    "gradients_float32": (
        50,
        benchmark("gradients_float32", "--dtype", "float32", "--operation", "dgrad", "wgrad"),
    ),
    "gradients_float16": (
        40,
        benchmark("gradients_float16", "--dtype", "float16", "--operation", "dgrad", "wgrad"),
    ),
}


def _counted(lines: list[dict[str, Any]], finished: list[Finished]) -> Part:
    """The outcomes of many lines, with the failures' texts."""
    failures = [line for line in lines if line["outcome"] in ("failed", "not collected")]
    failed = any(line["outcome"] == "failed" for line in failures)
    cut = any(done.cut for done in finished)
    return {
        "state": "failed" if failed else "cut" if cut else "done",
        "cut": cut,
        "seconds": max(done.seconds for done in finished),
        "statuses": [done.status for done in finished],
        "counts": _tally(line["outcome"] for line in lines),
        "failures": failures[:20],
    }


def _tally(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; the last one may be torn."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _cores() -> int:
    """That this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has(module: str) -> bool:
    return find_spec(module) is not None


# ---- all of it -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.on_gpu", description="Tests, sanitizer and benchmark on a real GPU."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything (470)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--commit", help="what the results name where there is no git")
    options = parser.parse_args(argv)
    began = time.monotonic()

    from gpuconv import backends

    if reason := backends.why_no_cuda():
        print(f"no GPU to run on: {reason}")
        return 2
    from bench import machine

    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts:  # what an earlier run left
        for kind in ("log", "json"):
            (options.out / f"{name}.{kind}").unlink(missing_ok=True)
    summary: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit(),
        "machine": machine.describe("cuda", os.cpu_count() or 1),
        "versions": machine.versions(),
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for i, name in enumerate(options.parts):
            left = options.seconds - (time.monotonic() - began)
            weights = [PARTS[other][0] for other in options.parts[i:]]
            seconds = left * weights[0] / sum(weights)
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            if seconds < 5:
                part: Part = {"state": "not run", "why": "no time left"}
            else:
                try:
                    part = PARTS[name][1](seconds, options.out, Path(temporary))
                except Exception as error:  # one part's trouble is not the others'
                    part = {"state": "failed", "why": f"{type(error).__name__}: {error}"}
            summary["parts"][name] = part
            summary["seconds"] = round(time.monotonic() - began, 1)
            _write(options.out / "on_gpu.json", summary)
    text = _table(summary, options.out)
    (options.out / "on_gpu.txt").write_text(text)
    print(text)
    return 1 if any(p["state"] == "failed" for p in summary["parts"].values()) else 0


def _write(path: Path, summary: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(temporary, path)


def _table(summary: dict[str, Any], out: Path) -> str:
    """Everything in short, the verdicts last."""
    from bench import report
    from bench.run import read

    texts = []
    for name in summary["parts"]:
        path = out / f"{name}.json"
        if not path.exists():
            continue
        document = read(path)
        texts.append(f"{name}: {report.heading(document)}")
        if choices := report.choice_table(document):
            texts += [report.race_table(document).plain(), choices.plain()]
        else:
            texts += [report.short_table(document).plain(), report.summary_table(document).plain()]
    parts = report.Table("on the GPU", ["part", "state", "seconds", "what"], left=4)
    for name, part in summary["parts"].items():
        counts = ", ".join(f"{n} {outcome}" for outcome, n in part.get("counts", {}).items())
        what = [counts, part.get("summary"), part.get("why"), part.get("note")]
        if "rows" in part:
            what.append(f"{part['rows']} rows")
        if part.get("geomean"):
            what.append(f"geomean {part['geomean']} of the best peer")
        if fastest := part.get("fastest"):
            what.append("fastest: " + ", ".join(f"{n} {count}" for n, count in fastest.items()))
        parts.rows.append(
            [name, part["state"], str(part.get("seconds", "")), "; ".join(filter(None, what))]
        )
        for failure in part.get("failures", [])[:6]:
            told = failure if isinstance(failure, str) else json.dumps(failure)
            parts.notes.append(f"{name}: {told[:400]}")
        parts.notes += [f"{name}: {line}" for line in part.get("findings", [])[:8]]
    machine = summary["machine"]
    texts.append(
        f"{machine.get('gpu')}, driver {machine.get('driver')}, CUDA {machine.get('cuda_runtime')},"
        f" NVRTC {machine.get('nvrtc')}; commit {summary['commit'] or 'unknown'}; "
        f"{summary['seconds']} s\n"
    )
    texts.append(parts.plain())
    return "\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
