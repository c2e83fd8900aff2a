"""Writes docs/capabilities.md: what each function takes, found out by calling it.

    python -m tools.make_capabilities

Needs SciPy's rivals to try (torch, JAX, array-api-strict, ml_dtypes) and g++: the CUDA backend's
column is the CUDA kernels under the emulator of tests/. tests/test_capabilities.py fails where the
file is not what this writes.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv import dtypes, ndimage, signal
from gpuconv.problem import PADDING_MODES

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "capabilities.md"
LIBRARIES = ("numpy", "torch", "jax", "array_api_strict")
NDIMAGE_MODES = ("reflect", "mirror", "nearest", "wrap", "constant")
SIGNAL_BOUNDARIES = ("fill", "wrap", "symm")

Call = Callable[..., Any]


def functions() -> dict[str, Call]:
    """Each function as a call of an array maker: ``call(make, **options)``."""
    calls: dict[str, Call] = {}
    for ndim in (1, 2, 3):
        x, w = (1, 2, *[5] * ndim), (2, 2, *[3] * ndim)
        for stem in ("conv", "conv_transpose"):
            name = f"{stem}{ndim}d"
            calls[name] = _of_two(getattr(gpuconv, name), x, w)
    for name in ("convolve", "correlate", "convolve2d", "correlate2d", "fftconvolve", "oaconvolve"):
        calls[f"signal.{name}"] = _of_two(getattr(signal, name), (5, 6), (3, 2))
    for name in ("convolve", "correlate"):
        calls[f"ndimage.{name}"] = _of_two(getattr(ndimage, name), (5, 6), (3, 2))
    for name in ("convolve1d", "correlate1d"):
        calls[f"ndimage.{name}"] = _of_two(getattr(ndimage, name), (5, 6), (3,))
    for name, args in (
        ("gaussian_filter", (1.0,)), ("gaussian_filter1d", (1.0,)), ("uniform_filter", (3,)),
        ("uniform_filter1d", (3,)), ("sobel", ()), ("prewitt", ()), ("laplace", ()),
        ("gaussian_laplace", (1.0,)), ("gaussian_gradient_magnitude", (1.0,)),
    ):  # fmt: skip
        calls[f"ndimage.{name}"] = _of_one(getattr(ndimage, name), (5, 6), *args)
    return calls


def _of_two(function: Call, x: Any, w: Any) -> Call:
    def call(make: Call, **options: Any) -> Any:
        return function(make(x), make(w), **options)

    return call


def _of_one(function: Call, x: Any, *args: Any) -> Call:
    def call(make: Call, **options: Any) -> Any:
        return function(make(x), *args, **options)

    return call


def maker(library: str, dtype: str) -> Call:
    """Arrays of `library` and `dtype`, of ones."""

    def make(shape: Any) -> Any:
        if library == "numpy":
            return np.ones(shape, dtypes.of(dtype).numpy)
        if library == "torch":
            import torch

            return torch.ones(shape, dtype=getattr(torch, dtype))
        if library == "jax":
            import jax

            return jax.numpy.ones(shape, dtype)
        import array_api_strict

        return array_api_strict.ones(shape, dtype=getattr(array_api_strict, dtype))

    return make


def result(call: Call, library: str, dtype: str, **options: Any) -> str | None:
    """The type of the result, or None where the call or the library refuses."""
    try:
        make = maker(library, dtype)
        like = make((1,))
    except (AttributeError, TypeError):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = call(make, **options)
    except (TypeError, ValueError, RuntimeError):
        return None
    assert type(got) is type(like), f"{type(like)} in, {type(got)} out"
    return dtypes.of(gpuconv.arrays.maybe_library(got).dtype(got)).name


@contextlib.contextmanager
def on(backend: str) -> Iterator[None]:
    if backend == "numpy":
        with gpuconv.use_backend("numpy"):
            yield
    else:
        from tests.emulator import emulated_device

        with emulated_device(), gpuconv.use_backend("cuda"):
            yield


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown; functions of equal rows share one."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        names.setdefault(tuple(cells), []).append(name)
    merged = [[", ".join(group), *cells] for cells, group in names.items()]
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *merged)]
    return "\n".join(lines)


def text() -> str:
    calls = functions()
    types = [dtype.name for dtype in dtypes.ALL]
    found: dict[str, dict[str, dict[str, str | None]]] = {}
    for backend in ("numpy", "cuda"):
        with on(backend):
            found[backend] = {
                name: {t: result(call, "numpy", t) for t in types} for name, call in calls.items()
            }
    type_rows = []
    for name in calls:
        cells = []
        for t in types:
            host, cuda = found["numpy"][name][t], found["cuda"][name][t]
            mark = "–" if host is None else "✓" if host == t else host
            cells.append(mark if host == cuda else f"{mark} (CUDA: {cuda or '–'})")
        type_rows.append([f"`{name}`", *cells])

    with on("numpy"):
        library_rows = [
            [
                f"`{name}`",
                *("✓" if result(call, library, "float32") == "float32" else "–"
                  for library in LIBRARIES),
            ]
            for name, call in calls.items()
        ]  # fmt: skip

    boundary_rows = []
    for name, call in calls.items():
        option, modes = {
            "signal": ("boundary", SIGNAL_BOUNDARIES),
            "ndimage": ("mode", NDIMAGE_MODES),
        }.get(name.partition(".")[0], ("padding_mode", PADDING_MODES))
        accepted: dict[str, list[str]] = {}
        for backend in ("numpy", "cuda"):
            with on(backend):
                accepted[backend] = [
                    m for m in modes if result(call, "numpy", "float32", **{option: m})
                ]
        assert accepted["numpy"] == accepted["cuda"], name
        listed = ", ".join(f"`{m}`" for m in accepted["numpy"]) or "zeros"
        boundary_rows.append([f"`{name}`", f"`{option}`" if accepted["numpy"] else "", listed])

    return f"""# What works with what

Written by `python -m tools.make_capabilities`, which calls every function with every type, boundary
and library, on the NumPy backend and on the CUDA backend (its kernels under the emulator). CuPy
arrays are computed by the CUDA backend, and so are torch and JAX arrays that lie on a GPU.

## Types

Both inputs of the same type. ✓: the result is of that type too; another name: of that type;
–: TypeError. The backends agree where a cell names no difference. `ndimage`'s other filters
(`generic_laplace`, `generic_gradient_magnitude`) do what the function given to them does.

{table(["function", *types], type_rows)}

## Beyond the edge

On both backends.

{table(["function", "option", "accepts"], boundary_rows)}

## Libraries

✓: float32 arrays of the library go in, and its arrays come out.

{table(["function", *LIBRARIES], library_rows)}
"""


def main() -> None:
    PATH.write_text(text(), encoding="utf-8")
    print(f"written: {PATH.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
