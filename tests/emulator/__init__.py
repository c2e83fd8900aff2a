"""Runs the CUDA kernels of kernels_cuda/ on the CPU, and watches them while they run.

g++ compiles the same .cu files behind a header (include/shim.h); ptx.cuh, where all inline PTX
lives, is swapped for a twin in C++. The threads of a block are fibers that switch at barriers and
warp collectives, blocks run one after another, all on one processor. What it finds, per mode:

- always: an output or shared memory that was read or left unwritten (both begin as NaN), barriers
  and collectives that never complete, blocks or threads that did not run, launches that no device
  accepts, arguments that do not fit the parameters, crashes, endless loops, data of cp.async used
  before its wait;
- "sanitize": out-of-bounds accesses of global memory, shared memory and local arrays, misaligned
  vectors, signed overflow and whatever else AddressSanitizer and UBSan know;
- "watch": races within a block and between blocks, every access outside of the arrays' bytes,
  writes to read-only arrays; bank conflicts and sectors per source line.

An array argument extends from its first to its last element in memory, whatever lies around it in
the array that it is a view of; arrays that overlap count as one. Before and after it lies nothing
that a kernel may touch. (Sanitize mode works in units of 8 bytes before the first element: only
watch mode sees an access to the half unit before an array that begins in the middle of one.)

What it cannot find:

- Speed. Occupancy, registers, spills, latencies, caches: nothing of that exists here. Wavefronts
  and sectors are counted from addresses alone, lanes matched by instruction and how often it ran,
  as g++ compiled it: NVIDIA's compiler may merge, widen or drop accesses. A lane that skips an
  instruction once, at an edge, is from then on matched with its neighbours' accesses of a step
  before, until the next barrier: conflicts that only appear with pads are not there.
- Reordering by the memory model. Every write is seen by everybody at once and in program order.
  Races are found from the barriers a launch goes through, whatever the order, but only on the
  addresses that this very launch touches. Missing __threadfence()s are noticed between blocks that
  meet in an atomic, not within a block.
- What needs threads or blocks to run at the same time: a wait for another block, or for another
  thread without a barrier, ends at the time limit. Clusters, cooperative groups, dynamic
  parallelism, textures and streams are not there.
- Warps in lockstep: there are none, each lane goes its own way from collective to collective.
  __activemask() names the caller only. __shfl_sync and votes order no memory (as documented by
  NVIDIA), only __syncwarp and __syncthreads do. Two __syncthreads in different lines do not
  match, though the hardware lets them.
- The last bits. Products of mma are summed more accurately than by tensor cores; expf and friends
  are glibc's; a * b + c is not fused unless the kernel says fmaf; rsqrtf is correctly rounded.
- Undefined conversions and shifts where the hardware has an answer of its own (float to int out of
  range, shifts by 32 and more): ask UBSan about shifts.
- Within a struct or an array of arrays, an index that overruns one member into the next.
- A write that stores what was there already, or equal values from two threads: watch mode calls it
  a race, as the language does.
- In watch mode, overruns of static __shared__ arrays and of local arrays: those are sanitize's.
- Atomics are taken to order memory between blocks once the thread has ever fenced in its block.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from .build import MODES, EmulatorError
from .device import BLOCK_ORDERS, THREAD_ORDERS, EmulatedDevice, EmulatedKernel
from .report import Report, Site

__all__ = [
    "BLOCK_ORDERS",
    "MODES",
    "THREAD_ORDERS",
    "EmulatedDevice",
    "EmulatedKernel",
    "EmulatorError",
    "Report",
    "Site",
    "emulated_device",
]


@contextlib.contextmanager
def emulated_device(**options: Any) -> Iterator[EmulatedDevice]:
    """The CUDA backend of gpuconv runs on an EmulatedDevice(**options) inside."""
    device = EmulatedDevice(**options)
    # Late, so that the emulator is usable without gpuconv.
    backend = importlib.import_module("gpuconv.cuda_backend.device")
    with backend.override(device):
        yield device
