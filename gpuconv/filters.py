"""Image filters by name, from text and from files: what ``gpuconv filter --kernel`` understands.

Every kernel is a float32 NumPy array of shape (R, S) and is meant for *correlation*, as
``gpuconv.conv2d`` computes it: it lies on the image as it is printed, unflipped. So ``sobel-x`` is
positive where the picture gets brighter to the right, ``sobel-y`` where it does downwards.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Kernel = npt.NDArray[np.float32]

MAX_SIZE = 1001  # of a named kernel: far beyond any picture's use, well below what fills a memory


class KernelError(ValueError):
    """A kernel's name, text or file content that makes no kernel. The message says what would."""


# --------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------


def box(size: int = 3) -> Kernel:
    """The mean of size x size pixels."""
    return np.full((size, size), 1 / size**2, dtype=np.float32)


def gaussian(size: int = 5, sigma: float | None = None) -> Kernel:
    """A Gaussian blur whose weights sum to 1; sigma left out: 0.3*((size-1)/2 - 1) + 0.8.

    That default is OpenCV's: it fills the kernel, whose rim has a few percent of its peak.
    """
    weights = _bell(size, sigma)
    return np.asarray(np.outer(weights, weights), dtype=np.float32)


def disk(size: int = 7) -> Kernel:
    """The mean over a disk, as a lens out of focus blurs; pixels on its rim count in part."""
    # 8x8 points in each pixel tell which part of it the disk covers.
    points = (np.arange(size * 8) + 0.5) / 8 - size / 2
    inside = points[:, None] ** 2 + points**2 <= (size / 2) ** 2
    cover = inside.reshape(size, 8, size, 8).sum(axis=(1, 3))
    return np.asarray(cover / cover.sum(), dtype=np.float32)


def motion_blur(size: int = 9) -> Kernel:
    """The mean along a diagonal, from the upper left to the lower right."""
    return (np.eye(size) / size).astype(np.float32)


def unsharp(size: int = 5) -> Kernel:
    """Unsharp masking: twice the picture minus its `gaussian` blur."""
    kernel = -gaussian(size)
    kernel[size // 2, size // 2] += 2
    return kernel


def laplacian_of_gaussian(size: int = 9) -> Kernel:
    """The Laplacian of a Gaussian of sigma size/6: edges and blobs, deaf to fine noise. Sum 0."""
    sigma = size / 6
    squares = (np.arange(size) - size // 2) ** 2
    r2 = (squares[:, None] + squares) / (2 * sigma**2)
    kernel = (r2 - 1) * np.exp(-r2)
    # The cut-off tails are missing from the sum; spread over all, they don't show.
    kernel -= kernel.mean()
    return np.asarray(kernel / np.abs(kernel).sum() * 8, dtype=np.float32)


def _bell(size: int, sigma: float | None) -> npt.NDArray[np.float64]:
    if sigma is None:
        sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum())


def _fixed(text: str) -> Callable[[], Kernel]:
    return lambda: parse(text)


@dataclass(frozen=True)
class Named:
    """A kernel that has a name: how it is made, and which numbers may follow the name."""

    make: Callable[..., Kernel]
    about: str
    parameters: tuple[str, ...] = ()
    smallest: int = 1


NAMED: dict[str, Named] = {
    "identity": Named(_fixed("0 0 0; 0 1 0; 0 0 0"), "the picture as it is"),
    "box": Named(box, "mean of SIZE x SIZE pixels (3)", ("SIZE",)),
    "gaussian": Named(gaussian, "Gaussian blur, SIZE x SIZE (5)", ("SIZE", "SIGMA")),
    "disk": Named(disk, "blur of a lens out of focus, SIZE across (7)", ("SIZE",)),
    "motion-blur": Named(motion_blur, "diagonal blur of SIZE pixels (9)", ("SIZE",)),
    "sharpen": Named(_fixed("0 -1 0; -1 5 -1; 0 -1 0"), "stronger edges"),
    "unsharp": Named(unsharp, "unsharp masking with a Gaussian of SIZE (5)", ("SIZE",)),
    "sobel-x": Named(_fixed("-1 0 1; -2 0 2; -1 0 1"), "slope to the right"),
    "sobel-y": Named(_fixed("-1 -2 -1; 0 0 0; 1 2 1"), "slope downwards"),
    "scharr-x": Named(_fixed("-3 0 3; -10 0 10; -3 0 3"), "slope to the right, rounder"),
    "scharr-y": Named(_fixed("-3 -10 -3; 0 0 0; 3 10 3"), "slope downwards, rounder"),
    "prewitt-x": Named(_fixed("-1 0 1; -1 0 1; -1 0 1"), "slope to the right, plain"),
    "prewitt-y": Named(_fixed("-1 -1 -1; 0 0 0; 1 1 1"), "slope downwards, plain"),
    "laplacian": Named(_fixed("0 1 0; 1 -4 1; 0 1 0"), "second derivative, 4 neighbours"),
    "log": Named(
        laplacian_of_gaussian, "Laplacian of a Gaussian of SIZE (9)", ("SIZE",), smallest=3
    ),
    "ridge": Named(_fixed("-1 -1 -1; -1 8 -1; -1 -1 -1"), "outlines: 8 minus the 8 neighbours"),
    "emboss": Named(_fixed("-2 -1 0; -1 1 1; 0 1 2"), "relief lit from the lower right"),
}


# --------------------------------------------------------------------------------------------
# From what a user writes
# --------------------------------------------------------------------------------------------


def resolve(spec: str) -> tuple[str, Kernel]:
    """The kernel that `spec` means, and a short label for file names.

    Parameters
    ----------
    spec : str
        A name (``"ridge"``), a name with numbers (``"box:5"``, ``"gaussian:9:2.5"``), the path of
        a .txt, .csv or .npy file, or the rows of numbers themselves.

    Raises
    ------
    KernelError
        It is none of these, or makes no kernel.
    OSError
        The file can't be read.

    Examples
    --------
    >>> from gpuconv import filters
    >>> filters.resolve("box:5")[1].shape
    (5, 5)
    >>> filters.resolve("1 0 -1; 2 0 -2; 1 0 -1")
    ('kernel', array([[ 1.,  0., -1.],
           [ 2.,  0., -2.],
           [ 1.,  0., -1.]], dtype=float32))
    """
    name = spec.partition(":")[0]
    if name in NAMED:
        return spec.replace(":", "-"), named(spec)
    path = Path(spec)
    if path.suffix.lower() in (".txt", ".csv", ".npy") or _is_file(path):
        return path.stem, load(path)
    if re.fullmatch(r"[A-Za-z][\w-]*(:.*)?", spec):
        close = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise KernelError(
            f"no kernel is called {name!r}{hint}; names are {', '.join(NAMED)}; a .txt, .csv or "
            f".npy file or rows of numbers like '1 0 -1; 2 0 -2; 1 0 -1' would do too"
        )
    return "kernel", parse(spec)


def named(spec: str) -> Kernel:
    """The kernel called `spec`, a name out of `NAMED`, followed by its numbers: ``"box:5"``."""
    name, *arguments = spec.split(":")
    entry = NAMED[name]
    if len(arguments) > len(entry.parameters):
        form = ":".join((name, *entry.parameters))
        raise KernelError(f"kernel {spec!r}: {name} is written {form!r}, nothing more")
    numbers: list[float] = []
    for parameter, text in zip(entry.parameters, arguments, strict=False):
        if parameter == "SIZE":
            numbers.append(_size(spec, text, entry.smallest))
        else:
            numbers.append(_sigma(spec, text))
    return entry.make(*numbers)


def parse(text: str) -> Kernel:
    """Rows of numbers to a kernel.

    Rows end with ``;`` or a line break, numbers are parted by blanks or commas, and may be
    fractions.

    Examples
    --------
    >>> from gpuconv import filters
    >>> filters.parse("1/4, 1/2, 1/4")
    array([[0.25, 0.5 , 0.25]], dtype=float32)
    """
    lines = [line.strip() for line in re.split(r"[;\n]", text)]
    # One comma may end a row; any other that has no number beside it is a number forgotten.
    words = [re.split(r"\s*,\s*|\s+", line.removesuffix(",").strip()) for line in lines if line]
    rows = [[_number(word) for word in row] for row in words]
    if not rows:
        raise KernelError("the kernel is empty; rows of numbers like '1 0 -1; 2 0 -2' would do")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise KernelError(
                f"the kernel's row 1 has {len(rows[0])} numbers but row {i + 1} has {len(row)}; "
                f"all rows take the same count"
            )
    return _checked(np.array(rows), "the kernel")


def load(path: Path) -> Kernel:
    """A kernel from a .npy array, or from any other file as rows of numbers (# starts a comment).

    Raises
    ------
    KernelError
        The content makes no kernel.
    OSError
        The file can't be read.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            try:
                array = np.lib.format.read_array(file, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise KernelError(
                    f"kernel file {path}: not a .npy array of numbers ({error}); "
                    f"numpy.save writes one"
                ) from None
        return _checked(array, f"kernel file {path}: the array")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise KernelError(
            f"kernel file {path}: not text; rows of numbers, or an array in .npy, would do"
        ) from None
    try:
        return parse("\n".join(line.partition("#")[0] for line in text.splitlines()))
    except KernelError as error:
        raise KernelError(f"kernel file {path}: {error}") from None


def _checked(array: npt.NDArray[np.generic], what: str) -> Kernel:
    if array.dtype.kind not in "biuf":
        raise KernelError(f"{what} is of type {array.dtype}; real numbers would do")
    if array.ndim != 2:
        raise KernelError(
            f"{what} is {array.ndim}-D, of shape {array.shape}; a kernel is 2-D: rows and columns"
        )
    if array.size == 0:
        raise KernelError(f"{what} is empty, of shape {array.shape}; it takes at least one number")
    with np.errstate(over="ignore"):
        kernel = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.argwhere(~np.isfinite(kernel))
    if bad.size:
        r, s = bad[0]
        raise KernelError(
            f"{what} has {array[r, s]} at row {r + 1}, column {s + 1}; "
            f"finite numbers within float32 would do"
        )
    return kernel


def _number(word: str) -> float:
    try:
        if "/" in word:
            over, under = word.split("/")
            return float(over) / float(under)
        return float(word)
    except ValueError:
        raise KernelError(
            f"the kernel has {word!r} where a number should be; 2, -0.5, 1e-3 or 1/9 would do"
        ) from None
    except ZeroDivisionError:
        raise KernelError(f"the kernel has {word!r}, a division by zero") from None


def _size(spec: str, text: str, smallest: int) -> int:
    size = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if size % 2 == 0 or not smallest <= size <= MAX_SIZE:
        raise KernelError(
            f"kernel {spec!r}: the size is {text!r}; an odd number from {smallest} to {MAX_SIZE} "
            f"would do, so that the kernel has a middle"
        )
    return size


def _sigma(spec: str, text: str) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = 0.0
    if not 0.01 <= sigma < float("inf"):
        raise KernelError(f"kernel {spec!r}: sigma is {text!r}; a number from 0.01 up would do")
    return sigma


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long kernel is no file name
        return False
