"""The one exception of gpuconv's own; everything else is a ValueError or a TypeError."""


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here; ``__cause__`` holds the reason."""
