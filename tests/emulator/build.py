"""Stages a kernel's sources, compiles them with g++ behind the shim, and caches the result."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Mode = Literal["plain", "sanitize", "watch"]
MODES: tuple[Mode, ...] = ("plain", "sanitize", "watch")

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"

_COMMON = [
    "-std=c++17",
    "-fPIC",
    "-march=native",
    "-w",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    # Static variables of templates would otherwise be one for all loaded kernels.
    "-fno-gnu-unique",
    # g++ guards static arrays of class types in templates, though nothing initialises them.
    "-fno-threadsafe-statics",
    # addr2line misreads the file names of DWARF 5.
    "-gdwarf-4",
]
_DEFINES: dict[Mode, list[str]] = {
    "plain": [],
    "sanitize": ["-DEMU_SANITIZE"],
    "watch": ["-DEMU_WATCH"],
}
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_FLAGS: dict[Mode, list[str]] = {
    "plain": ["-O2", "-g1"],
    "sanitize": ["-O1", "-g", "-fno-omit-frame-pointer", *_SANITIZERS],
    # Without -fno-tree-sra a float4 would be loaded as four floats.
    "watch": ["-O1", "-g", "-fno-tree-sra", "-fsanitize=thread"],
}
_SOURCES: dict[Mode, list[str]] = {
    "plain": ["runtime.cpp"],
    "sanitize": ["runtime.cpp"],
    "watch": ["runtime.cpp", "watch.cpp"],
}


class EmulatorError(Exception):
    """A kernel does not compile, cannot be launched as asked, or did something wrong."""


@functools.cache
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        raise EmulatorError("the emulator needs g++ (12 or newer), and there is none on the PATH")
    return found


@functools.cache
def _machine() -> str:
    """What -march=native and the compiler's name stand for here."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    native = subprocess.run(
        [compiler(), "-march=native", "-Q", "--help=target"], capture_output=True, text=True
    )
    return version.stdout + native.stdout


@functools.cache
def default_cache() -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "gpuconv-emulator"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # read-only, or no home at all
        return Path(tempfile.mkdtemp(prefix="gpuconv-emulator-"))


def _run_compiler(arguments: list[str], folder: Path, what: str) -> None:
    done = subprocess.run([compiler(), *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line][:5]
        summary = "\n".join(lines)
        raise EmulatorError(f"{what} does not compile:\n{summary}\n\n{done.stderr}")


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]


@functools.cache
def _own_text(*names: str) -> str:
    files = [*sorted(INCLUDE.iterdir()), *(HERE / name for name in names)]
    return "".join(f"{file.name}\n{file.read_text()}" for file in files)


@functools.cache
def _runtime(mode: Mode, cache: Path) -> list[Path]:
    objects = []
    # The runtime is not watched or checked itself.
    flags = [*_COMMON, *_DEFINES[mode], "-O2", "-g1", f"-I{INCLUDE}"]
    for name in _SOURCES[mode]:
        key = _digest(_own_text(name), str(flags), _machine())
        target = cache / f"{Path(name).stem}-{mode}-{key}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _run_compiler([*flags, "-c", str(HERE / name), "-o", "it.o"], Path(folder), name)
                os.replace(Path(folder) / "it.o", target)
        objects.append(target)
    return objects


@functools.cache
def runner(cache: Path) -> Path:
    """The executable that loads and runs sanitized kernels."""
    key = _digest(_own_text("runner.cpp"), str(_COMMON), _machine())
    target = cache / f"runner-{key}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            flags = ["-std=c++17", "-O1", "-g", *_SANITIZERS, f"-I{INCLUDE}"]
            source = str(HERE / "runner.cpp")
            _run_compiler([*flags, source, "-o", "it", "-ldl"], Path(folder), "runner.cpp")
            os.replace(Path(folder) / "it", target)
    return target


# ---- staging: the few things that no macro can do

_COMMENT_OR_STRING = re.compile(
    r"""//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_ALIGNMENT = r"(?:__align__|alignas)\s*\((?:[^()]|\([^()]*\))*\)"


def _blank(match: re.Match[str]) -> str:
    text = match.group()
    return text if text[0] == "'" and len(text) < 3 else re.sub(r"[^\n]", " ", text)


def _declared_names(declaration: str) -> list[str]:
    """The variables of `T a[2][3], b`: per declarator the last word before its extents."""
    depth, parts = 0, [""]
    for character in declaration:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append("")
        elif depth == 0 and character not in ")]}>":
            parts[-1] += character
    return [re.findall(r"[A-Za-z_]\w*", part.split("=")[0])[-1] for part in parts]


def stage(text: str) -> str:
    """Rewrites the `__shared__` declarations of a source, keeping every line where it is."""
    masked = _COMMENT_OR_STRING.sub(_blank, text)
    edits = [
        (*match.span(), " ")
        for match in re.finditer(
            r"\binline\s+(?=__forceinline__)|(?<=__forceinline__)\s+inline\b", masked
        )
    ]
    for match in re.finditer(r"\b__shared__\b", masked):
        before = max(masked.rfind(c, 0, match.start()) for c in ";{}") + 1
        prefix = re.search(
            rf"(?:\b(?:extern|static)\b\s*|{_ALIGNMENT}\s*)*$", masked[before : match.start()]
        )
        start = before + (prefix.start() if prefix else match.start() - before)
        end = masked.find(";", match.end())
        if end < 0:
            continue
        statement = masked[start:end]
        lines = "\n" * statement.count("\n")
        if re.search(r"\bextern\b", statement):
            rest = re.sub(rf"\bextern\b|\b__shared__\b|{_ALIGNMENT}", " ", statement)
            found = re.fullmatch(r"\s*(.+?)\s*\b(\w+)\s*\[\s*\]\s*", rest, re.DOTALL)
            if not found:
                raise EmulatorError(f"cannot read this declaration of shared memory: {statement}")
            element, name = " ".join(found.group(1).split()), found.group(2)
            edits.append((start, end, f"EMU_DYNAMIC_SHARED({name}, {element}){lines}"))
        else:
            body = re.sub(r"\b(?:static|__shared__)\b", " ", statement)
            body = re.sub(r"\balignas\b", "__align__", body)
            names = _declared_names(re.sub(_ALIGNMENT, " ", body))
            registered = "".join(f"; EMU_SHARED({name})" for name in names)
            edits.append((start, end, f"static {body}{registered}"))
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _closure(folder: Path, source: str) -> dict[str, str]:
    """The .cu and the files of its folder that it includes, directly or not, by relative path."""
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        texts[name] = (folder / name).read_text()
        for included in _INCLUDE.findall(texts[name]):
            relative = os.path.normpath(Path(name).parent / included)
            # The emulator's own headers (ptx.cuh) come before the folder's.
            if not (INCLUDE / included).exists() and (folder / relative).exists():
                waiting.append(relative)
    return texts


_KERNEL = re.compile(
    r"(?:__launch_bounds__\s*\((?P<a>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*)?"
    r"\b__global__\s+(?:__attribute__\s*\(\(.*?\)\)\s*)?void\s+"
    r"(?:__launch_bounds__\s*\((?P<b>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*)?"
    r"(?P<name>\w+)\s*\(",
    re.DOTALL,
)


def _entries(preprocessed: str) -> str:
    """The C++ that lists every kernel of a source, with its __launch_bounds__."""
    # Of a kernel that is declared first and defined later, any one mention will do.
    bounds: dict[str, str] = {}
    for match in _KERNEL.finditer(preprocessed):
        bound = match["a"] or match["b"] or bounds.get(match["name"], "0")
        bounds[match["name"]] = bound
    rows = ", ".join(f"EMU_ENTRY({name}, EMU_FIRST({b}, 0))" for name, b in bounds.items())
    return (
        "#define EMU_FIRST(first, ...) (first)\n"
        f'extern "C" const emu::Entry emu_entries[] = {{{rows}}};\n'
        f'extern "C" const int emu_entry_count = {len(bounds)};\n'
    )


def compile_kernel(
    folder: Path,
    source: str,
    macros: Mapping[str, str | int],
    arch: str,
    mode: Mode,
    cache: Path,
) -> Path:
    """The shared library of a source's kernels, compiled unless it is in the cache."""
    file = f"{source}.cu"
    if not (folder / file).exists():
        raise EmulatorError(f"there is no {file} in {folder}")
    texts = _closure(folder, file)
    digits = re.fullmatch(r"sm_(\d+)([af]?)", arch)
    if not digits:
        raise EmulatorError(f"not an architecture: {arch!r} (sm_90a, for example)")
    defines = {"__CUDA_ARCH__": int(digits.group(1)) * 10, **macros}
    if digits.group(2):
        defines[f"__CUDA_ARCH_FEAT_SM{digits.group(1)}_ALL"] = 1
    flags = [*_COMMON, *_FLAGS[mode], *_DEFINES[mode]]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    objects = _runtime(mode, cache)
    parts = [name + texts[name] for name in sorted(texts)]
    own = "".join(str(path) for path in objects)
    key = _digest(*parts, source, folder.name, str(flags), own, _own_text(), _machine())
    target = cache / f"{source}-{mode}-{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        build = Path(temporary)
        for name, text in texts.items():
            staged = build / folder.name / name
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(stage(text))
        include = f'#include "{folder.name}/{file}"\n'
        entry = build / "entry.cpp"
        entry.write_text(include)
        arguments = [*flags, f"-I{INCLUDE}", "-include", "shim.h", f"-ffile-prefix-map={build}=."]
        what = f"{folder.name}/{file} ({mode})"
        listing = ["-DEMU_LIST_KERNELS", "-E", "-P", "entry.cpp", "-o", "listing"]
        _run_compiler([*arguments, *listing], build, what)
        entry.write_text(include + _entries((build / "listing").read_text()))
        _run_compiler([*arguments, "-c", "entry.cpp", "-o", "entry.o"], build, what)
        link = ["-shared", "-Wl,-Bsymbolic", "-pthread"]
        if mode == "sanitize":
            link += _SANITIZERS
        _run_compiler([*link, "entry.o", *map(str, objects), "-o", "it.so"], build, what)
        os.replace(build / "it.so", target)
    return target
