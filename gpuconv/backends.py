"""Which backend serves a call, and why: default_backend, use_backend, asarray, show_config.

An array is computed where it lies: NumPy and other host arrays by the NumPy backend, CuPy and other
CUDA arrays by the CUDA backend. Only ``use_backend`` moves them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from gpuconv.errors import BackendError

BACKENDS = ("numpy", "cuda")

_forced: ContextVar[str | None] = ContextVar("gpuconv_backend", default=None)


def default_backend() -> str:
    """``"cuda"`` where a CUDA device works, else ``"numpy"``.

    A device works when it answers and a trivial kernel compiles, loads and runs on it. The probe
    runs once per process, at the first call that needs it; ``show_config()`` says what it found.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.default_backend() in ("numpy", "cuda")
    True
    """
    return "numpy" if why_no_cuda() else "cuda"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute on the backend `name` inside the ``with`` block, wherever the arrays lie.

    Arrays are moved there, results come back to where the arrays came from. The choice holds for
    the current thread or task, and nests.

    Parameters
    ----------
    name : "numpy" or "cuda"

    Raises
    ------
    ValueError
        `name` is no backend.
    gpuconv.BackendError
        The backend cannot run here; the cause is chained.

    Examples
    --------
    >>> import gpuconv, numpy as np
    >>> with gpuconv.use_backend("numpy"):
    ...     gpuconv.conv1d(np.ones((1, 1, 4)), np.ones((1, 1, 2)))
    array([[[2., 2., 2.]]])
    """
    token = _forced.set(check_backend("use_backend", name))
    try:
        yield
    finally:
        _forced.reset(token)


def asarray(obj: Any, /) -> Any:
    """`obj` as an array of the current backend: CuPy for ``"cuda"``, NumPy for ``"numpy"``.

    The current backend is that of the surrounding ``use_backend``, or else ``default_backend()``.
    A program that makes its arrays with this runs unchanged on both.

    Parameters
    ----------
    obj : array or nested sequence of numbers
        NumPy, CuPy, torch, JAX, anything with DLPack, lists and scalars.

    Examples
    --------
    >>> import gpuconv
    >>> with gpuconv.use_backend("numpy"):
    ...     gpuconv.asarray([[1.0, 2.0]])
    array([[1., 2.]])
    """
    from gpuconv import arrays

    library = arrays.maybe_library(obj)
    if current_backend() == "cuda":
        return _cuda().asarray(obj, library)
    return np.asarray(obj) if library is None else library.to_host(obj)


def warmup(*plans: Any) -> None:
    """Compile and load the kernels of `plans` now, not at their first call.

    Kernels are compiled when a plan first runs on a GPU, and kept on disk for other processes.
    A server calls this before it takes requests, and a CUDA graph's capture needs it done. Plans of
    the NumPy backend compile nothing.

    Parameters
    ----------
    *plans : gpuconv.Plan
        For arrays that are contiguous, in the memory order planned; others may need a kernel more.

    Raises
    ------
    TypeError
        What is no plan.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.warmup(gpuconv.plan_conv2d((8, 3, 32, 32), (16, 3, 3, 3)))
    """
    from gpuconv.plan import Plan

    for plan in plans:
        if not isinstance(plan, Plan):
            raise TypeError(
                f"warmup: it takes plans, each as an argument; got a {type(plan).__name__}; "
                f"gpuconv.plan_conv2d(...) makes one"
            )
        if plan.backend == "cuda":
            backend("cuda").warmup(plan)


def current_backend() -> str:
    """The backend of the surrounding ``use_backend``, or else the default one."""
    return _forced.get() or default_backend()


def forced_backend() -> str | None:
    """The backend of the surrounding ``use_backend``, if any."""
    return _forced.get()


def check_backend(function: str, name: Any) -> str:
    """`name`, if it is a backend that can run here."""
    if name not in BACKENDS:
        raise ValueError(f"{function}: backend is one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "cuda" and (reason := why_no_cuda()):
        raise BackendError(f"{function}: backend 'cuda' cannot run here: {reason}") from reason
    return str(name)


def why_no_cuda() -> BackendError | None:
    """Why CUDA cannot run here (an error, its cause chained), or None where it can."""
    return _cuda().why_not()  # type: ignore[no-any-return]


def _cuda() -> Any:
    return import_module("gpuconv.cuda_backend.device")


@cache
def backend(name: str) -> Any:
    """The package of the backend `name`: its registry of algorithms and its devices."""
    return import_module(f"gpuconv.{name}_backend")


def show_config(file: Any = None) -> None:
    """Print versions, devices and caches, and in a line why calls run where they run.

    Parameters
    ----------
    file : text stream, optional
        Standard output where left out.

    Examples
    --------
    >>> import gpuconv
    >>> gpuconv.show_config()  # doctest: +ELLIPSIS
    gpuconv ...
    """
    import gpuconv
    from gpuconv.numpy_backend.device import cpu

    reason = why_no_cuda()
    lines = [
        f"gpuconv {gpuconv.__version__} on Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"default backend: {default_backend()}",
    ]
    if reason:
        lines.append(f"no CUDA: {reason}")
    else:
        lines.extend(_cuda().describe())
    lines.append(f"numpy backend: {cpu()}")
    packages = ("numpy", "threadpoolctl", "ml_dtypes", "cupy", "torch", "jax", "scipy")
    lines.extend(f"  {package}: {_version(package)}" for package in packages)
    print("\n".join(lines), file=file)


def _version(package: str) -> str:
    """The installed version, from the metadata: nothing is imported to learn it."""
    from importlib import metadata  # slow to import, and only wanted here

    names = [package, *(f"{package}-cuda{v}x" for v in (11, 12, 13))]
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
