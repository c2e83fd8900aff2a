"""From a kernel's source to a cubin for a named architecture, with NVRTC and without a device.

Why not ``cupy.RawModule(code=...)``: it appends an ``-arch`` of its own (wgmma needs sm_90a) and
``-ftz=true`` (float32 subnormals would differ from the CPU), and its cache does not see what a
source includes.

A cubin is kept in one file per (all source text, macros, options, architecture, NVRTC version), in
``$CUPY_CACHE_DIR/gpuconv`` or the user's cache folder. An entry says how long it is and what it
hashes to: what is truncated or damaged is compiled again, never trusted. Entries are written to a
temporary name and renamed, so any number of processes may share a folder.

    python -m gpuconv.cuda_backend.compiler --report [--sass] [--arch sm_90a] [STEM ...]
    python -m gpuconv.cuda_backend.compiler --summary [--sass] [--arch sm_90a] [STEM ...]

compile every variant that the algorithms can ask for. --report prints registers, shared memory,
spills, the blocks and warps that share a multiprocessor (``occupancy``; as many as without the
shared memory that only a launch asks for), and with --sass the counts of instructions (``sass``);
--summary prints the ranges of these over the variants of each kernel and architecture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuconv.errors import BackendError

if TYPE_CHECKING:
    from gpuconv.cuda_backend.occupancy import Occupancy

Macros = Mapping[str, "str | int"]

OPTIONS = ("-std=c++17", "-fmad=true", "--ptxas-options=-v", "--device-as-default-execution-space")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_MAGIC = b"gpuconv kernel 1\n"
_TEGRA = frozenset({53, 62, 72, 87, 101})
_HEADER = struct.Struct("<QQ32s")  # length of the report, length of the cubin, sha256 of both


# ---- sources ---------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def source_folder() -> Path:
    """kernels_cuda: the installed package's own, or else the checkout's."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels_cuda", package.parent / "kernels_cuda"):
        if (folder / "types.cuh").is_file():
            return folder
    raise BackendError(
        f"the kernels' sources are missing: there is no kernels_cuda in {package} nor beside it"
    )


def read_sources(stem: str, folder: Path | None = None) -> dict[str, str]:
    """``stem``.cu and every file it includes in quotes, however deep: name to text, .cu first."""
    folder = folder or source_folder()
    texts: dict[str, str] = {}
    waiting = [f"{stem}.cu"]
    while waiting:
        name = waiting.pop(0)
        if name in texts:
            continue
        texts[name] = (folder / name).read_text(encoding="utf-8")
        waiting.extend(_INCLUDE.findall(texts[name]))
    return texts


# ---- NVRTC -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What ptxas says of the (one) entry function of a kernel; bytes but for the registers."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    constant: int = 0

    @classmethod
    def parse(cls, log: str) -> Report:
        """From the log of ``--ptxas-options=-v``; the largest of each where it lists several."""

        def largest(pattern: str) -> int:
            return max(map(int, re.findall(pattern, log)), default=0)

        return cls(
            registers=largest(r"Used (\d+) registers"),
            shared=largest(r"(\d+)(?:\+\d+)? bytes smem"),
            stack=largest(r"(\d+) bytes stack frame"),
            spill_stores=largest(r"(\d+) bytes spill stores"),
            spill_loads=largest(r"(\d+) bytes spill loads"),
            constant=largest(r"(\d+) bytes cmem\[0\]"),
        )


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture."""

    cubin: bytes
    report: Report


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """CuPy's binding of NVRTC (imported without touching a device)."""
    return import_module("cupy_backends.cuda.libs.nvrtc")


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's version. Raises what CuPy raises where it cannot be loaded."""
    import_module("cupy")  # finds NVRTC in the wheels of CUDA
    major, minor = _nvrtc().getVersion()
    return int(major), int(minor)


@lru_cache(maxsize=1)
def include_folders() -> tuple[str, ...]:
    """Where cuda_fp16.h is: the first of the places that CuPy 13 and 14 know."""
    for folder in _include_candidates():
        if (folder / "cuda_fp16.h").is_file():
            beside = (folder, folder / "cccl")
            return tuple(str(f) for f in beside if f.is_dir())
    return ()


def _include_candidates() -> Iterator[Path]:
    with suppress(Exception):
        found = import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
        if found:
            yield Path(found)
    major = nvrtc_version()[0]
    with suppress(Exception):
        spec = find_spec("nvidia")
        for root in spec.submodule_search_locations or () if spec else ():
            yield Path(root) / f"cu{major}" / "include"
            yield Path(root) / "cuda_runtime" / "include"
    roots = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME")]
    with suppress(Exception):
        roots.append(import_module("cupy.cuda").get_cuda_path())
    roots.append("/usr/local/cuda")
    for path in roots:
        if path:
            yield Path(path) / "include"
            for target in ("x86_64-linux", "sbsa-linux", "aarch64-linux"):
                yield Path(path) / "targets" / target / "include"
    with suppress(Exception):  # CuPy 13 brings the headers of CUDA 11 and 12 along
        spec = find_spec("cupy")
        for root in spec.submodule_search_locations or () if spec else ():
            yield Path(root) / "_core" / "include" / "cupy" / "_cuda" / f"cuda-{major}"


def architecture(capability: tuple[int, int], supported: Sequence[int] | None = None) -> str:
    """What to compile for, to run on a device of this compute capability.

    sm_90a on a 9.0, whose own instructions need the "a". Where NVRTC is older than the device:
    the newest architecture of the same generation, whose code the device runs too, and with none
    such the newest PTX, which the driver compiles for the device.
    """
    if supported is None:
        supported = tuple(_nvrtc().getSupportedArchs())
    number = 10 * capability[0] + capability[1]
    if number == 90 and 90 in supported:
        return "sm_90a"
    # Tegra's chips are no ancestors of the others: what is compiled for one runs on it alone.
    older = [n for n in supported if n <= number and (n == number or n not in _TEGRA)]
    if not older:
        raise BackendError(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} no longer compiles for compute "
            f"capability {capability[0]}.{capability[1]}; the oldest it knows is {min(supported)}"
        )
    newest = max(older)
    return f"{'sm' if newest // 10 == capability[0] else 'compute'}_{newest}"


def _run_nvrtc(
    stem: str, sources: Mapping[str, str], options: Sequence[str], ptx: bool
) -> Compiled:
    nvrtc = _nvrtc()
    main, *headers = sources
    program = nvrtc.createProgram(
        sources[main],
        main,
        [sources[name].encode() for name in headers],
        [name.encode() for name in headers],
    )
    try:
        try:
            nvrtc.compileProgram(program, tuple(options))
        except Exception as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(f"{stem}.cu with {' '.join(options)}:\n{log}") from error
        log = nvrtc.getProgramLog(program)
        # CuPy strips the last byte of both, as if a cubin were text. It is a zero, the end of the
        # last section header: without it the ELF file is short, and tools refuse it.
        code = nvrtc.getPTX(program) if ptx else nvrtc.getCUBIN(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)
    return Compiled(bytes(code), Report.parse(log))


# ---- the cache -------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled kernels are kept between processes."""
    if chosen := os.environ.get("CUPY_CACHE_DIR"):
        return Path(chosen).expanduser() / "gpuconv"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gpuconv"


def _read_entry(path: Path) -> Compiled | None:
    """A cache file's kernel; None where there is none, or not all of it is there, unharmed."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + _HEADER.size:
        return None
    report_bytes, cubin_bytes, digest = _HEADER.unpack_from(data, len(_MAGIC))
    payload = data[len(_MAGIC) + _HEADER.size :]
    if len(payload) != report_bytes + cubin_bytes or hashlib.sha256(payload).digest() != digest:
        return None
    return Compiled(payload[report_bytes:], Report(**json.loads(payload[:report_bytes])))


def _write_entry(path: Path, compiled: Compiled) -> None:
    report = json.dumps(asdict(compiled.report)).encode()
    payload = report + compiled.cubin
    header = _HEADER.pack(len(report), len(compiled.cubin), hashlib.sha256(payload).digest())
    write_whole(path, _MAGIC + header + payload, lambda: _read_entry(path) is not None)


def write_whole(path: Path, data: bytes, is_whole: Callable[[], bool]) -> None:
    """Write a file of the cache so that nobody ever reads a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        try:
            os.replace(temporary, path)
        except PermissionError:  # Windows: another process has the same entry open
            if not is_whole():
                raise
            os.unlink(temporary)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


_warned = False


def _warn_once(folder: str, error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"gpuconv cannot keep compiled kernels in {folder} ({error}): every process compiles "
            f"them anew; set CUPY_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


# ---- the way in ------------------------------------------------------------------------------


def compile_kernel(
    stem: str, macros: Macros, arch: str, *, folder: Path | None = None, cache: bool = True
) -> Compiled:
    """``kernels_cuda/<stem>.cu`` with `macros`, for `arch` ("sm_90a"): from the cache, or NVRTC."""
    sources = read_sources(stem, folder)
    defines = tuple(f"-D{name}={value}" for name, value in sorted(macros.items()))
    options = (*OPTIONS, f"--gpu-architecture={arch}", *defines)
    key = json.dumps([nvrtc_version(), options, list(sources.items())])
    name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()}.bin"
    path = None
    if cache:
        try:
            path = cache_folder() / name
        except RuntimeError as error:  # no home folder
            _warn_once("the user's cache folder", error)
    if path is not None and (compiled := _read_entry(path)) is not None:
        return compiled
    includes = tuple(f"-I{folder}" for folder in include_folders())
    compiled = _run_nvrtc(stem, sources, (*options, *includes), ptx=arch.startswith("compute"))
    if path is not None:
        try:
            _write_entry(path, compiled)
        except OSError as error:
            _warn_once(str(path.parent), error)
    return compiled


def all_variants(stems: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str | int]]]:
    """(stem, macros) of every kernel that the registered algorithms can ask for, each once."""
    from gpuconv.cuda_backend import algorithms
    from gpuconv.cuda_backend.launch import freeze

    seen = set()  # several algorithms launch split_sum
    for algorithm in algorithms():
        for stem, macros in algorithm.variants():
            key = stem, freeze(macros)
            if key not in seen and (not stems or stem in stems):
                seen.add(key)
                yield stem, macros


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m gpuconv.cuda_backend.compiler``: see the module's docstring."""
    import argparse

    from gpuconv.cuda_backend import sass

    parser = argparse.ArgumentParser(
        prog="python -m gpuconv.cuda_backend.compiler",
        description="Compile every kernel variant and report registers, shared memory and spills.",
    )
    parser.add_argument("stems", nargs="*", help="kernels to compile (all)")
    parser.add_argument("--report", action="store_true", help="print one line per variant")
    parser.add_argument("--summary", action="store_true", help="print one line per kernel")
    parser.add_argument("--arch", action="append", help="one of several; all of them if left out")
    parser.add_argument("--sass", action="store_true", help="count instructions (with nvdisasm)")
    parser.add_argument("--no-cache", action="store_true")
    options = parser.parse_args(arguments)
    spilled = local = count = 0
    start = time.perf_counter()
    for arch in options.arch or ARCHITECTURES:
        ranges: dict[str, _Ranges] = {}
        for stem, macros in all_variants(options.stems):
            compiled = compile_kernel(stem, macros, arch, cache=not options.no_cache)
            report = compiled.report
            spills = report.spill_stores + report.spill_loads
            count, spilled = count + 1, spilled + bool(spills)
            found = sass.counts(compiled.cubin) if options.sass else Counter[str]()
            in_local = any(found[name] for name in sass.LOCAL)
            local += in_local
            ranges.setdefault(stem, _Ranges()).add(arch, compiled, in_local)
            if options.report or spills or in_local:
                text = " ".join(f"{name}={value}" for name, value in macros.items())
                counted = "".join(f"{found[n]:5} {n}" for n in sass.COLUMNS if options.sass)
                print(
                    f"{arch:8} {stem:16} {report.registers:4} registers {report.shared:6} B shared "
                    f"{report.stack:5} B stack {spills:5} B spilled {_resident(arch, compiled)}"
                    f"{counted}  {text}"
                )
        if options.summary:
            for stem, those in ranges.items():
                print(f"{arch:8} {stem:24} {those}")
    seconds = time.perf_counter() - start
    print(f"{count} kernels in {seconds:.1f} s, {spilled} of them spill registers")
    if options.sass:
        print(f"{local} of them load from or store to local memory")
    return 1 if spilled or local else 0


def _occupancy(arch: str, compiled: Compiled) -> Occupancy | None:
    """Of blocks as large as the kernel allows; None where it does not say, or is PTX."""
    from gpuconv.cuda_backend import occupancy

    threads = occupancy.max_threads(compiled.cubin)
    if threads is None:
        return None
    report = compiled.report
    return occupancy.occupancy(arch, threads, report.registers, report.shared)


def _resident(arch: str, compiled: Compiled) -> str:
    """Blocks and warps of a multiprocessor, and what limits them."""
    found = _occupancy(arch, compiled)
    if found is None:
        return "  - blocks   - warps"
    return f"{found.blocks:3} blocks {found.warps:3} warps by {found.limit:13}"


@dataclass
class _Ranges:
    """Of all variants of one kernel for one architecture."""

    variants: int = 0
    registers: tuple[int, int] = (1 << 16, 0)
    shared: tuple[int, int] = (1 << 20, 0)
    spilled: int = 0  # bytes, stored and loaded
    local: int = 0  # variants that keep arrays in local memory
    least: Occupancy | None = None

    def add(self, arch: str, compiled: Compiled, in_local: bool) -> None:
        report = compiled.report
        self.variants += 1
        self.registers = _widened(self.registers, report.registers)
        self.shared = _widened(self.shared, report.shared)
        self.spilled += report.spill_stores + report.spill_loads
        self.local += in_local or report.stack > 0
        found = _occupancy(arch, compiled)
        if found and (self.least is None or found.share < self.least.share):
            self.least = found

    def __str__(self) -> str:
        least = "" if self.least is None else (
            f"; at least {self.least.blocks} blocks, {self.least.warps} warps "
            f"({self.least.share:.0%}, by {self.least.limit})"
        )  # fmt: skip
        return (
            f"{self.variants:3} variants {_written(self.registers):>8} registers "
            f"{_written(self.shared):>12} B shared {self.spilled} B spilled "
            f"{self.local} local{least}"
        )


def _widened(extent: tuple[int, int], value: int) -> tuple[int, int]:
    return min(extent[0], value), max(extent[1], value)


def _written(extent: tuple[int, int]) -> str:
    low, high = extent
    return str(low) if low == high else f"{low}-{high}"


if __name__ == "__main__":
    raise SystemExit(main())
