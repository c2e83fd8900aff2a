"""Blocks of work spread over threads, each calling a BLAS that keeps to one thread.

NumPy releases the interpreter's lock inside its loops and inside BLAS, so blocks that stay in a
core's cache run side by side. A BLAS with threads of its own would make them wait for each other;
threadpoolctl holds it to one thread meanwhile. Where threadpoolctl is not installed, blocks run one
after another and BLAS spreads each over its own threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache
from typing import Any, TypeVar

Block = TypeVar("Block")


def run_blocks(threads: int, blocks: Sequence[Block], work: Callable[[Block, int], None]) -> None:
    """Call ``work(block, worker)`` for every block, worker counting from 0 to below `threads`.

    No two blocks run at once under the same worker: scratch memory can be one piece per worker.
    Blocks are handed out in order, so the last may run on any worker; results must not depend on
    which. An exception of one is raised here after all workers have stopped.
    """
    workers = min(threads, len(blocks), usable_threads(threads))
    if workers <= 1:
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
        # The caller's context carries numpy.errstate into the workers.
        waits = [
            _pool(workers - 1).submit(copy_context().run, worker, index)
            for index in range(1, workers)
        ]
        worker(0)
        for wait in waits:
            wait.result()
    if failed:
        raise failed[0]


def usable_threads(threads: int) -> int:
    """How many workers run at once: 1 where nothing holds BLAS to one thread."""
    return threads if _controller() is not None else 1


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="gpuconv")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child starts its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


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
