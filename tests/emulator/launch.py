"""Hands launches to compiled kernels: in this process, or in the sanitizers' own one."""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from .build import EmulatorError, runner

# ---- include/emu.h, in ctypes


class Parameter(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_int), ("kind", ctypes.c_int)]


class EntryStruct(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(Parameter)),
        ("parameter_count", ctypes.c_int),
        ("launch_bound", ctypes.c_int),
    ]


class Extent(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("origin", ctypes.c_uint64),
        ("granule", ctypes.c_int32),
        ("writable", ctypes.c_int32),
        ("argument", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("max_shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("thread_order", ctypes.c_int32),
        ("block_order", ctypes.c_int32),
        ("entry", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("time_limit", ctypes.c_double),
        ("arguments", ctypes.c_void_p),
        ("argument_bytes", ctypes.c_uint64),
        ("extents", ctypes.c_void_p),
        ("extent_count", ctypes.c_int64),
        ("stacks", ctypes.c_void_p),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        ("blocks_run", ctypes.c_uint64),
        ("threads_run", ctypes.c_uint64),
        ("static_shared_bytes", ctypes.c_uint64),
        ("message", ctypes.c_char * 8192),
    ]


class SiteStruct(ctypes.Structure):
    _fields_ = [
        ("pc", ctypes.c_uint64),
        ("shared", ctypes.c_int32),
        ("write", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("atomic", ctypes.c_int32),
        ("requests", ctypes.c_uint64),
        ("lanes", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
        ("ideal_wavefronts", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("ideal_sectors", ctypes.c_uint64),
        ("uninitialised", ctypes.c_uint64),
    ]


class RaceStruct(ctypes.Structure):
    _fields_ = [
        ("first_pc", ctypes.c_uint64),
        ("second_pc", ctypes.c_uint64),
        ("first_thread", ctypes.c_uint32),
        ("second_thread", ctypes.c_uint32),
        ("first_block", ctypes.c_uint32),
        ("second_block", ctypes.c_uint32),
        ("first_write", ctypes.c_int32),
        ("second_write", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("argument", ctypes.c_int32),
        ("offset", ctypes.c_uint64),
        ("variable", ctypes.c_char * 64),
        ("count", ctypes.c_uint64),
    ]


_Row = TypeVar("_Row", bound=ctypes.Structure)


@dataclass(frozen=True)
class Entry:
    """An entry point: its place in the library, and size and kind of every parameter."""

    index: int
    name: str
    launch_bound: int  # __launch_bounds__, 0 where there is none
    parameters: tuple[tuple[int, int], ...]
    static_shared: int  # bytes of what it declares __shared__, whether or not a launch gets there


@dataclass(frozen=True)
class Relocation:
    """Where among the arguments a pointer lies, and to which byte of which extent it points."""

    at: int
    extent: int
    offset: int


@functools.cache
def source_line(library: Path, pc: int, own: str) -> str:
    """`file:line` of an instruction in the kernels' folder `own`.

    Of code that was inlined: the line in the .cu, and behind it the one in the .cuh.
    """
    command = ["addr2line", "-i", "-e", str(library), hex(pc)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"{library.name}+{pc:#x}"
    lines = re.findall(rf"(?:^|/)({re.escape(own)}/(?:\./)?\S+:\d+)", found.stdout, re.MULTILINE)
    if not lines:
        return f"{library.name}+{pc:#x}"
    outer = next((line for line in lines if ".cu:" in line), lines[0])
    return outer if outer == lines[0] else f"{outer} ({lines[0].rpartition('/')[2]})"


_SHARED_SYMBOL = re.compile(r"_ZZ(?P<function>\w+)E\d+emu_shared_(?P<variable>\w+)")


def static_shared(library: Path, names: Sequence[str]) -> dict[str, int]:
    """Bytes of static shared memory of each kernel of `names`, from the library's symbols.

    Every variable has its descriptor beside it (EMU_SHARED in shim.h). Those of a function that
    kernels call count for all kernels of the library.
    """
    command = ["nm", "-S", "--defined-only", str(library)]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise EmulatorError(
            "the emulator needs nm (of binutils), and there is none on the PATH"
        ) from error
    rows = [line.split() for line in listed.splitlines()]
    sizes = {row[3]: int(row[1], 16) for row in rows if len(row) == 4}
    found = dict.fromkeys(names, 0)
    for symbol in sizes:
        match = _SHARED_SYMBOL.match(symbol)
        if match is None:
            continue
        function, variable = match["function"], match["variable"]
        own = [name for name in names if function == f"{len(name)}{name}"]
        descriptor = f"{len('emu_shared_' + variable)}emu_shared_{variable}"
        for name in own or names:
            found[name] += sizes[symbol.replace(descriptor, f"{len(variable)}{variable}")]
    return found


# Kernels keep their state in static variables: one launch at a time.
_lock = threading.Lock()


class LocalLibrary:
    """A kernel that runs in this process (modes plain and watch)."""

    _stacks: ClassVar[int | None] = None  # of the fibers, one set for all kernels

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emu_entry.restype = ctypes.POINTER(EntryStruct)
        rows: list[EntryStruct] = []
        while found := self._library.emu_entry(len(rows)):
            rows.append(found.contents)
        shared = static_shared(path, [row.name.decode() for row in rows])
        self.entries: dict[str, Entry] = {}
        for e in rows:
            name = e.name.decode()
            parameters = tuple((p.bytes, p.kind) for p in e.parameters[: e.parameter_count])
            self.entries[name] = Entry(
                len(self.entries), name, e.launch_bound, parameters, shared[name]
            )

    def launch(
        self,
        launch: LaunchStruct,
        arguments: bytearray,
        extents: Sequence[Extent],
        relocations: Sequence[Relocation],
    ) -> tuple[Result, list[SiteStruct], list[RaceStruct], int]:
        for r in relocations:
            struct.pack_into("P", arguments, r.at, extents[r.extent].begin + r.offset)
        memory = (ctypes.c_char * max(1, len(arguments))).from_buffer(arguments or bytearray(1))
        table = (Extent * max(1, len(extents)))(*extents)
        launch.arguments = ctypes.addressof(memory)
        launch.extents = ctypes.addressof(table)
        result = Result()
        with _lock:
            if LocalLibrary._stacks is None:
                self._library.emu_make_stacks.restype = ctypes.c_void_p
                LocalLibrary._stacks = self._library.emu_make_stacks()
                if LocalLibrary._stacks is None:
                    raise EmulatorError("no memory for the stacks of a block's threads")
            launch.stacks = LocalLibrary._stacks
            self._library.emu_launch(ctypes.byref(launch), ctypes.byref(result))
            if not hasattr(self._library, "emu_sites"):
                return result, [], [], 0
            sites = self._rows("emu_sites", SiteStruct)
            races = self._rows("emu_races", RaceStruct)
            self._library.emu_uncounted.restype = ctypes.c_uint64
            return result, sites, races, self._library.emu_uncounted()

    def _rows(self, name: str, row: type[_Row]) -> list[_Row]:
        function = self._library[name]
        function.restype = ctypes.c_int64
        first = ctypes.POINTER(row)()
        count = function(ctypes.byref(first))
        return [row.from_buffer_copy(first[i]) for i in range(count)]


class Worker:
    """The process in which sanitized kernels run; a report ends it, the next launch starts anew."""

    def __init__(self, cache: Path) -> None:
        self._runner = runner(cache)
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - stop() closes it
            options = {
                "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1"
                ":detect_stack_use_after_return=0:handle_segv=1",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "PATH": "/usr/bin:/bin",
            }
            self._process = subprocess.Popen(
                [str(self._runner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=options,
                bufsize=0,
            )
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream:
                    stream.close()
            self._errors.close()
            self._process = None

    def ask(self, message: Sequence[bytes | memoryview]) -> None:
        stdin = self._running().stdin
        assert stdin is not None
        try:
            for part in message:
                view = memoryview(part)
                while view:
                    view = view[stdin.write(view) or 0 :]
        except BrokenPipeError:
            raise self._report() from None

    def receive(self, count: int) -> bytes:
        stdout = self._running().stdout
        assert stdout is not None
        data = bytearray()
        while len(data) < count:
            part = stdout.read(count - len(data))
            if not part:
                raise self._report()
            data += part
        return bytes(data)

    def _report(self) -> EmulatorError:
        process = self._process
        assert process is not None
        process.wait()
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        self.stop()
        return EmulatorError(summarise(text, process.returncode))


def summarise(report: str, returncode: int) -> str:
    """The lines of a sanitizer's report that say what, where and who."""
    lines = report.splitlines()
    position = [line[len("EMULATOR: ") :] for line in lines if line.startswith("EMULATOR: ")]
    what = [
        re.sub(r"^==\d+==ERROR: ", "", line).split(" on address")[0]
        for line in lines
        if "ERROR: AddressSanitizer" in line
    ]
    what += [line for line in lines if ": runtime error: " in line]
    access = [line for line in lines if re.match(r"(READ|WRITE) of size", line)]
    access += [line.strip() for line in lines if "located" in line or "overflows this" in line]
    frames = [line.strip() for line in lines if re.search(r"\.cuh?:\d+", line) and "#" in line][:4]
    if not what:
        return f"the sanitized kernel's process ended with {returncode}:\n{report}"
    return "\n  ".join([*position[:1], *what, *access, *position[1:], *frames])


@functools.cache
def worker(cache: Path) -> Worker:
    return Worker(cache)


class RemoteLibrary:
    """A kernel that runs in the sanitizers' process."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path = path
        self._worker = worker(cache)
        name = str(path).encode()
        self._name = struct.pack("I", len(name)) + name
        with _lock:
            self._worker.ask([struct.pack("I", 0), self._name])
            rows: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {}
            while True:
                length, count, bound = struct.unpack("iii", self._worker.receive(12))
                if length < 0:
                    break
                entry_name = self._worker.receive(length).decode()
                parameters = tuple(struct.iter_unpack("ii", self._worker.receive(8 * count)))
                rows[entry_name] = bound, parameters
        shared = static_shared(path, list(rows))
        self.entries = {
            name: Entry(index, name, bound, parameters, shared[name])
            for index, (name, (bound, parameters)) in enumerate(rows.items())
        }

    def launch(
        self,
        launch: LaunchStruct,
        arguments: bytearray,
        extents: Sequence[Extent],
        relocations: Sequence[Relocation],
    ) -> tuple[Result, list[SiteStruct], list[RaceStruct], int]:
        message: list[bytes | memoryview] = [struct.pack("I", 1), self._name]
        message += [bytes(launch), bytes(arguments)]
        for e in extents:
            message += [bytes(e), ctypes.string_at(e.begin, e.end - e.begin)]
        message.append(struct.pack("Q", len(relocations)))
        message += [struct.pack("QQQ", r.at, r.extent, r.offset) for r in relocations]
        with _lock:
            self._worker.ask(message)
            result = Result.from_buffer_copy(self._worker.receive(ctypes.sizeof(Result)))
            name = list(self.entries)[launch.entry]
            for e in extents:
                data = self._worker.receive(e.end - e.begin)
                if e.writable:
                    ctypes.memmove(e.begin, data, len(data))
                elif data != ctypes.string_at(e.begin, len(data)):
                    text = f"kernel {name}: write to argument {e.argument}, a read-only array"
                    result.message = result.message or text.encode()
            if result.message:  # abandoned fibers leave the sanitizer's state in disorder
                self._worker.stop()
        return result, [], [], 0
