"""Whether a CUDA device works here."""

from __future__ import annotations

from gpuconv.errors import BackendError


def why_not() -> BackendError | None:
    """Why CUDA cannot run here, or None where it can."""
    return BackendError("the CUDA backend is not built yet")
