"""Workers: every block once, errors raised, BLAS held to one thread meanwhile and freed after."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time

import numpy as np
import pytest

import gpuconv
from gpuconv.numpy_backend import scratch, workers

threadpoolctl = pytest.importorskip("threadpoolctl")


def blas_threads() -> list[int]:
    """Of the libraries that were there first: NumPy's, not one that SciPy's import brings later."""
    return [blas.num_threads for blas in workers._controller().lib_controllers]


def test_every_block_is_worked_once_by_a_worker_of_its_own():
    seen, active = [], set()
    lock = threading.Lock()

    def work(block, worker):
        with lock:
            assert worker not in active
            active.add(worker)
        time.sleep(0.001)
        with lock:
            active.discard(worker)
            seen.append(block)

    workers.run_blocks(3, range(40), work)
    assert sorted(seen) == list(range(40))


def test_an_error_stops_the_rest_and_is_raised():
    done = []

    def work(block, worker):
        if block == 3:
            raise ValueError("block 3")
        time.sleep(0.002)
        done.append(block)

    with pytest.raises(ValueError, match="block 3"):
        workers.run_blocks(2, range(1000), work)
    assert len(done) < 900


def test_blas_keeps_to_one_thread_only_meanwhile():
    before = blas_threads()
    during = []
    workers.run_blocks(2, range(4), lambda block, worker: during.append(blas_threads()))
    assert all(threads == [1] * len(before) for threads in during)
    assert blas_threads() == before


def test_the_callers_errstate_reaches_the_workers():
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        workers.run_blocks(2, range(4), lambda block, worker: np.float32(1) / np.zeros(3, "f4"))


def test_calls_from_many_threads_at_once():
    totals = []

    def call():
        seen = []
        workers.run_blocks(2, range(50), lambda block, worker: seen.append(block))
        totals.append(sorted(seen))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [list(range(50))] * 8
    assert workers._depth == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinities")
def test_helpers_keep_off_the_callers_core():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    helper = workers._Helper()
    core = min(cores)
    helper.avoid(core)
    assert os.sched_getaffinity(helper._thread.native_id) == cores - {core}
    assert os.sched_getaffinity(0) == cores


def test_work_that_has_not_begun_is_taken_back(monkeypatch):
    monkeypatch.setattr(workers._Helper, "_serve", lambda helper: None)  # it never wakes
    helper, seen = workers._Helper(), []
    for _ in range(2):
        helper.begin(seen.append, 1)
        helper.finish()
        assert helper._job is None
    assert seen == []


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    workers.run_blocks(2, range(4), lambda block, worker: None)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == 4
    child.join()


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_fork_in_the_middle_of_another_thread_s_call_leaves_nothing_behind():
    before = blas_threads()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_convolve_in_child, args=(queue,))
    with workers.one_blas_thread(), workers._depth_lock, workers._helpers_lock, scratch._lock:
        child.start()
    try:
        assert queue.get(timeout=30) == before
    finally:
        child.kill()
        child.join()


def _convolve_in_child(queue):
    gpuconv.conv2d(np.ones((1, 8, 30, 30), "f4"), np.ones((8, 8, 3, 3), "f4"), algorithm="im2col")
    queue.put(blas_threads())


def _in_child(queue):
    seen = []
    workers.run_blocks(2, range(4), lambda block, worker: seen.append(block))
    queue.put(len(seen))
