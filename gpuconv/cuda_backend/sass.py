"""The machine instructions of a compiled kernel, counted, where NVIDIA's disassembler is installed.

It is in the CUDA Toolkit, and in PyPI's package nvidia-cuda-nvdisasm. It needs no device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

# Products; asynchronous copies and matrix loads; shared, global and local memory; barriers.
COLUMNS = (
    "FFMA", "HFMA2", "DFMA", "HMMA", "DMMA", "LDGSTS", "LDSM", "LDS", "STS", "LDG", "STG", "LDL",
    "STL", "BAR",
)  # fmt: skip
LOCAL = ("LDL", "STL")  # what a kernel of ours must not have: arrays that are not in registers

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE
)


@lru_cache(maxsize=1)
def disassembler() -> Path | None:
    """nvdisasm: of the path, of PyPI's package, or of the toolkit."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    spec = find_spec("nvidia")
    places = [Path(root) for root in (spec.submodule_search_locations or () if spec else ())]
    candidates = [place for root in places for place in root.glob("cu*/bin/nvdisasm*")]
    candidates += [
        Path(root) / "bin" / "nvdisasm"
        for root in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda")
        if root
    ]
    return next((c for c in candidates if os.access(c, os.X_OK)), None)


def counts(cubin: bytes) -> Counter[str]:
    """How often each instruction is written in a cubin, by the first part of its name.

    FileNotFoundError where there is no disassembler, RuntimeError where it fails.
    """
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(tool), "-c", str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return listed(done.stdout)


def listed(text: str) -> Counter[str]:
    """The same from what the disassembler prints."""
    return Counter(_INSTRUCTION.findall(text))
