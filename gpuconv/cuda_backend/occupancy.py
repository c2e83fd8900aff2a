"""How many blocks of a kernel share a multiprocessor, from what ptxas says of it: no device needed.

The rules and limits are those of NVIDIA's cuda_occupancy.h (CUDA 12.9) and of the CUDA C++
Programming Guide, "Technical Specifications per Compute Capability": registers are given to warps
in units of 256 and lie in four partitions, shared memory is given to blocks in units of 128 bytes
(256 before 8.0), 1 KiB of it per block to the driver (from 8.0 on).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor, and of a block
_REGISTER_UNIT, _PARTITIONS, _MOST_REGISTERS = 256, 4, 256


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_unit: int = 128
    shared_reserved: int = 1 << 10


LIMITS = {
    75: Limits(1024, 16, 64 << 10, shared_unit=256, shared_reserved=0),
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    103: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}


@dataclass(frozen=True)
class Occupancy:
    """Of a multiprocessor by one kernel."""

    blocks: int
    warps: int
    share: float  # of the warps that it can hold
    limit: str  # what allows no more: "registers", "shared memory", "threads" or "blocks"


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int = 0) -> Occupancy:
    """That of blocks of `threads`, with so many registers each and bytes of shared memory in all.

    `arch` is "sm_90a" and the like. One that is not listed has the limits of the next lower one;
    KeyError where there is none.
    """
    number = int("".join(c for c in arch if c.isdigit()))
    limits = LIMITS[max((n for n in LIMITS if n <= number), default=number)]
    warps = -(-threads // 32)
    per_warp = _round_up(32 * registers, _REGISTER_UNIT)
    allowed = {
        "threads": limits.threads // 32 // warps,
        "blocks": limits.blocks,
        "registers": _PARTITIONS * (REGISTERS // _PARTITIONS // max(per_warp, 1)) // warps,
        "shared memory": limits.shared
        // max(_round_up(shared_bytes + limits.shared_reserved, limits.shared_unit), 1),
    }
    # A block that would take more than all registers is refused, even where its warps would fit.
    if registers > _MOST_REGISTERS or per_warp * _round_up(warps, _PARTITIONS) > REGISTERS:
        allowed["registers"] = 0
    limit = min(allowed, key=allowed.__getitem__)
    blocks = allowed[limit]
    return Occupancy(blocks, blocks * warps, 32 * blocks * warps / limits.threads, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# ---- the threads of a compiled kernel --------------------------------------------------------

_MAX_THREADS, _SIZED = 0x05, 0x04  # EIATTR_MAX_THREADS, EIFMT_SVAL: as cuobjdump names them


def max_threads(cubin: bytes) -> int | None:
    """The threads of a block that ``__launch_bounds__`` allow; None where a kernel has none."""
    for name, data in _sections(cubin):
        if not name.startswith(".nv.info."):
            continue
        at = 0
        while at + 4 <= len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, at)
            at += 4
            if form != _SIZED:
                continue  # the value is where the others have their size
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<III", data, at)
                return int(x * y * z)
            at += size
    return None


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every section of a 64-bit ELF file."""
    if not elf.startswith(b"\x7fELF\x02"):
        return  # PTX
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = elf[headers[names_at][4] :]
    for name, _, _, _, offset, length in headers:
        yield names[name : names.index(b"\0", name)].decode(), elf[offset : offset + length]
