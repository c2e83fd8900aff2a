"""Blocks of work spread over threads, each calling a BLAS that keeps to one thread.

NumPy releases the interpreter's lock inside its loops and inside BLAS, so blocks that stay in a
core's cache run side by side. A BLAS with threads of its own would make them wait for each other;
threadpoolctl holds it to one thread meanwhile. Where threadpoolctl is not installed, blocks run one
after another and BLAS spreads each over its own threads.

A helper thread that wakes on its caller's core would wait there for the caller's blocks, and some
schedulers take milliseconds to move it. So where the system can, helpers keep off that core.

NumPy (2.3 and later) adds rows that do not follow each other in memory through buffers, which it
fills with as many rows as they hold: two to three times as long as adding each where it lies, which
it does with rows that are longer than a buffer. So blocks run with small buffers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

Block = TypeVar("Block")

_BUFFER = 512  # elements: shorter rows gain from being added together, and so do conversions


def run_blocks(threads: int, blocks: Sequence[Block], work: Callable[[Block, int], None]) -> None:
    """Call ``work(block, worker)`` for every block, worker counting from 0 to below `threads`.

    No two blocks run at once under the same worker: scratch memory can be one piece per worker.
    Blocks are handed out in order, so the last may run on any worker; results must not depend on
    which. An exception of one is raised here after all workers have stopped.
    """
    buffer = np.setbufsize(_BUFFER)
    try:
        _run_blocks(threads, blocks, work)
    finally:
        np.setbufsize(buffer)


def _run_blocks(threads: int, blocks: Sequence[Block], work: Callable[[Block, int], None]) -> None:
    count = min(threads, len(blocks), usable_threads(threads))
    helpers = _borrow(count - 1) if count > 1 else []
    if not helpers:
        # A lone block keeps to one thread too: BLAS's bits may depend on how many it uses.
        with one_blas_thread():
            for block in blocks:
                work(block, 0)
        return
    remaining = iter(blocks)
    lock = threading.Lock()
    failed: list[BaseException] = []

    def worker(index: int) -> None:
        try:
            while not failed:
                with lock:
                    block = next(remaining)
                work(block, index)
        except StopIteration:
            return
        except BaseException as error:
            failed.append(error)

    with one_blas_thread():
        core = _core()
        for index, helper in enumerate(helpers, start=1):
            helper.avoid(core)
            # The caller's context carries numpy.errstate and the buffers into the helpers.
            helper.begin(copy_context().run, worker, index)
        worker(0)
        for helper in helpers:
            helper.finish()
            _idle.append(helper)
    if failed:
        raise failed[0]


class _Helper:
    """A thread that waits for work."""

    def __init__(self) -> None:
        self._avoided: int | None = None
        self._lock = threading.Lock()  # of the next two
        self._job: tuple[Any, ...] | None = None  # that has not begun
        self._called = False  # and has not woken
        self._ready, self._done = threading.Lock(), threading.Lock()
        self._ready.acquire()
        self._done.acquire()
        self._thread = threading.Thread(target=self._serve, name="gpuconv", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            self._ready.acquire()
            with self._lock:
                self._called = False
                job, self._job = self._job, None
            if job is not None:
                run, *arguments = job
                run(*arguments)
                del job, run, arguments
                self._done.release()

    def avoid(self, core: int | None) -> None:
        """Keep off `core`, among the cores that the caller may use."""
        if core == self._avoided:
            return
        self._avoided = core
        others = os.sched_getaffinity(0) - {core}
        if others and self._thread.native_id is not None:
            with suppress(OSError):  # a sandbox may forbid it
                os.sched_setaffinity(self._thread.native_id, others)

    def begin(self, run: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._job = (run, *arguments)
            if not self._called:
                self._called = True
                self._ready.release()

    def finish(self) -> None:
        """Wait for the end of the work, or take back what has not begun: waking takes long."""
        with self._lock:
            began = self._job is None
            self._job = None
        if began:
            self._done.acquire()


_idle: list[_Helper] = []
_helpers = 0
_helpers_lock = threading.Lock()


def _borrow(count: int) -> list[_Helper]:
    """Up to `count` helpers that nobody else uses: several callers at once share what there is."""
    global _helpers
    found: list[_Helper] = []
    with _helpers_lock:
        while len(found) < count and _idle:
            found.append(_idle.pop())
        while len(found) < count and _helpers < count:
            found.append(_Helper())
            _helpers += 1
    return found


def _forget_threads() -> None:
    """Threads do not survive a fork, nor what they were doing: the child starts its own."""
    global _helpers, _helpers_lock, _depth, _depth_lock
    _idle.clear()
    _helpers, _helpers_lock = 0, threading.Lock()
    _depth, _depth_lock = 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


@lru_cache(maxsize=1)
def _libc() -> Any:
    """The C library, where it and the system know of cores."""
    import ctypes

    if not hasattr(os, "sched_setaffinity"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "sched_getcpu") else None


def _core() -> int | None:
    """The core that the caller runs on, or None where nobody can tell."""
    libc = _libc()
    return None if libc is None else libc.sched_getcpu()


def usable_threads(threads: int) -> int:
    """How many workers run at once: 1 where nothing holds BLAS to one thread."""
    return threads if _controller() is not None else 1


@lru_cache(maxsize=1)
def _controller() -> Any:
    """threadpoolctl's view of the loaded BLAS libraries; finding them takes milliseconds, once."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    import numpy.linalg  # noqa: F401  (loads the BLAS that is to be found)

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


_depth = 0
_depth_lock = threading.Lock()
# Each BLAS held to one thread, and how many it had: what a child forked meanwhile must restore.
_before: list[tuple[Any, int]] = []


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread, where threadpoolctl is installed.

    Calls from several of the caller's threads share one limit.
    """
    global _depth, _before
    if _controller() is None:
        yield
        return
    with _depth_lock:
        if _depth == 0:
            # Its own context manager does the same, in ten times the time.
            if not _before:
                _before = [(blas, blas.num_threads) for blas in _controller().lib_controllers]
            for blas, _ in _before:
                blas.set_num_threads(1)
        _depth += 1
    try:
        yield
    finally:
        with _depth_lock:
            _depth -= 1
            if _depth == 0:
                for blas, threads in _before:
                    blas.set_num_threads(threads)
                _before = []
