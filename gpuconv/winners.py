"""The files in which ``tuning`` keeps the fastest algorithm of a problem on a machine.

One small file for each, beside the compiled kernels: in ``$CUPY_CACHE_DIR/gpuconv`` or the user's
cache folder. Its name is a hash of the problem, the device, its driver or NumPy's version, and the
source text of the backend and its kernels, so that a winner is forgotten when any of them changes.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gpuconv import backends
from gpuconv.cuda_backend import compiler
from gpuconv.plan import Plan
from gpuconv.problem import ConvProblem


def file_name(problem: ConvProblem, backend: str, device: Any) -> str:
    """Of the file that holds the winner."""
    words = [repr(problem), backend, backends.backend(backend).identity(device), _sources(backend)]
    return f"tuned-{hashlib.sha256(json.dumps(words).encode()).hexdigest()}.json"


@lru_cache(maxsize=2)
def _sources(backend: str) -> str:
    """A hash of what the backend is made of."""
    files = list(Path(backends.backend(backend).__file__).parent.glob("*.py"))
    if backend == "cuda":
        files += compiler.source_folder().glob("*.cu*")
    hashes = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        hashes.update(file.read_bytes())
    return hashes.hexdigest()


def read(name: str) -> str | None:
    """The winner in a file; None where there is none, or no whole one."""
    try:
        content = json.loads((compiler.cache_folder() / name).read_text(encoding="utf-8"))
        algorithm = content["algorithm"]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return None
    return algorithm if isinstance(algorithm, str) else None


def write(name: str, plan: Plan, algorithm: str, seconds: dict[str, float]) -> None:
    """OSError, or RuntimeError where there is no home folder, where it cannot be kept."""
    content = {
        "problem": str(plan.problem),
        "device": str(plan.device),
        "algorithm": algorithm,
        "seconds": seconds,
    }
    data = json.dumps(content, indent=1).encode()
    compiler.write_whole(compiler.cache_folder() / name, data, lambda: read(name) is not None)
