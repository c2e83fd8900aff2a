"""The machine: what it is, how many threads everyone gets, and the fastest that it can go."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench import peers

PACKAGES = (
    "numpy", "scipy", "torch", "jax", "opencv-python-headless", "opencv-python", "cupy-cuda12x",
    "cupy-cuda13x", "cupy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "threadpoolctl", "ml_dtypes",
)  # fmt: skip


def fix_threads(threads: int | None) -> int:
    """Give every library `threads` threads, all that the process may use where None.

    To be called before the libraries are imported: some read it only once. Where the system can,
    the process is also bound to as many cores, so that nobody can help itself to more.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        threads = min(threads or len(cores), len(cores))
        os.sched_setaffinity(0, cores[:threads])
    else:
        threads = threads or os.cpu_count() or 1
    for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)
    os.environ["NPROC"] = str(threads)  # XLA's thread pool on the CPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the GPU to the others
    peers.set_threads(threads)
    return threads


def tell_libraries(threads: int, names: set[str]) -> None:
    """What can only be told to a library once it is imported; `names` of peers."""
    with suppress(ImportError):
        import_module("threadpoolctl").threadpool_limits(threads)
    if any(name.startswith("torch") for name in names):
        with suppress(ImportError):
            import_module("torch").set_num_threads(threads)
    if any(name.startswith("opencv") for name in names):
        with suppress(ImportError):
            import_module("cv2").setNumThreads(threads)


def describe(backend: str, threads: int) -> dict[str, Any]:
    """The machine, for the JSON."""
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if backend == "cuda":
        machine.update(describe_gpu())
    return machine


def describe_gpu() -> dict[str, Any]:
    """The GPU, its driver and CUDA; what cannot be read is left out."""
    found: dict[str, Any] = {}
    with suppress(Exception):
        runtime = import_module("cupy").cuda.runtime
        properties = runtime.getDeviceProperties(runtime.getDevice())
        name = properties["name"]
        found["gpu"] = name.decode() if isinstance(name, bytes) else str(name)
        found["compute_capability"] = f"{properties['major']}.{properties['minor']}"
        found["multiprocessors"] = int(properties["multiProcessorCount"])
        found["gpu_memory_gib"] = round(properties["totalGlobalMem"] / 2**30, 1)
        found["l2_mib"] = round(properties["l2CacheSize"] / 2**20, 1)
        found["cuda_driver"] = runtime.driverGetVersion()
        found["cuda_runtime"] = runtime.runtimeGetVersion()
    with suppress(Exception):
        nvrtc = import_module("cupy_backends.cuda.libs.nvrtc")
        found["nvrtc"] = ".".join(map(str, nvrtc.getVersion()))
    with suppress(Exception):
        if "torch" in sys.modules:  # importing it takes seconds, and memory on the device
            found["cudnn"] = sys.modules["torch"].backends.cudnn.version()
    with suppress(Exception):
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
             "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.splitlines()  # fmt: skip
        driver, clock, top, power = (part.strip() for part in answer[0].split(","))
        found.update(driver=driver, sm_clock=clock, sm_clock_max=top, power_limit=power)
    return found


def versions() -> dict[str, str]:
    """The installed versions, from their metadata."""
    import gpuconv

    found = {"gpuconv": gpuconv.__version__}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The checkout's commit, "+" behind it where files differ; None where there is no git."""
    folder = Path(__file__).parent.parent
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", str(folder), *args],
                capture_output=True, text=True, timeout=20, check=True,
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if status else "")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


class Others:
    """How many cores other processes used since this was made: what spoils a measurement."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """None where the system does not tell."""
        now = self._read()
        if self._start is None or now is None or now[2] <= self._start[2]:
            return None
        busy, own, elapsed = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, busy - own) / elapsed, 2)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: all cores' work (and what was stolen from them), our own, and the clock."""
        try:
            line = Path("/proc/stat").read_text().partition("\n")[0]
            user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        own = os.times()
        busy = (user + nice + system + irq + softirq + steal) / tick
        return busy, own.user + own.system, time.monotonic()


def available_bytes(backend: str) -> int:
    """Memory that a row may use: half of what is free."""
    if backend == "cuda":
        return int(import_module("cupy").cuda.runtime.memGetInfo()[0]) // 2
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024 // 2
    return 8 << 30


# ---- ceilings --------------------------------------------------------------------------------


def ceilings(backend: str, dtype: str, threads: int, precision: str = "ieee") -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a large copy, now."""
    if backend == "cuda":
        return {"flops": _cuda_gemm(dtype, precision), "bytes": _cuda_copy()}
    return {"flops": _cpu_gemm(dtype), "bytes": _cpu_copy(threads)}


def _best(run: Any, repeats: int) -> float:
    run()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _cpu_gemm(dtype: str, n: int = 2048) -> float:
    if dtype not in ("float32", "float64"):
        dtype = "float32"  # what NumPy multiplies 16-bit types in
    rng = np.random.default_rng(0)
    a, b = (rng.random((n, n)).astype(dtype) for _ in range(2))
    out = np.empty_like(a)
    return 2.0 * n**3 / _best(lambda: np.matmul(a, b, out=out), 4)


def _cpu_copy(threads: int) -> float:
    # Far larger than any cache, and touched, so that no page is mapped in the measurement.
    size = 512 << 20
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    pieces = [
        (target[part], source[part])
        for i in range(threads)
        for part in [slice(i * source.size // threads, (i + 1) * source.size // threads)]
    ]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces)), 4)
    return 2.0 * source.size / seconds


def _cuda_events(run: Any, repeats: int = 5) -> float:
    cuda = import_module("cupy").cuda
    run()
    times = []
    for _ in range(repeats):
        start, end = cuda.Event(), cuda.Event()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(cuda.get_elapsed_time(start, end) / 1e3)
    return float(min(times))


def _cuda_gemm(dtype: str, precision: str) -> float:
    """By torch where it is there: CuPy has no bfloat16 product and no switch for TF32."""
    with suppress(Exception):
        import torch

        if torch.cuda.is_available():
            n = 8192 if dtype in ("float16", "bfloat16") or precision != "ieee" else 4096
            torch.backends.cuda.matmul.allow_tf32 = precision != "ieee"
            kind = getattr(torch, dtype, torch.float32)
            a, b = (torch.rand((n, n), device="cuda").to(kind) for _ in range(2))
            out = torch.empty_like(a)
            return 2.0 * n**3 / _cuda_events(lambda: torch.matmul(a, b, out=out))
    cupy = import_module("cupy")
    n, kind = 4096, dtype if dtype in ("float16", "float32", "float64") else "float32"
    a, b = (cupy.random.random((n, n), dtype=cupy.float32).astype(kind) for _ in range(2))
    out = cupy.empty_like(a)
    return 2.0 * n**3 / _cuda_events(lambda: cupy.matmul(a, b, out=out))


def _cuda_copy() -> float:
    cupy = import_module("cupy")
    size = min(2 << 30, int(cupy.cuda.runtime.memGetInfo()[0]) // 8)
    source, target = cupy.ones(size // 4, cupy.float32), cupy.empty(size // 4, cupy.float32)
    return 2.0 * float(source.nbytes) / _cuda_events(lambda: cupy.copyto(target, source))
