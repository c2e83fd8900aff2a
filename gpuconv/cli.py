"""The command ``gpuconv``: filter pictures, show plans, show the configuration.

Exit codes: 0, all is well; 1, something could not be read, computed or written; 2, the command line
itself is wrong; 130, interrupted. Errors are one line each on standard error and start with
``gpuconv: error:``. Pillow is imported by ``filter`` alone, rich where a progress bar is shown.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

import gpuconv
from gpuconv import filters

if TYPE_CHECKING:
    from PIL.Image import Image

Planes = npt.NDArray[np.float32]  # (C, H, W)
Pixels = npt.NDArray[np.unsignedinteger[Any]]

SAMPLE = Path(__file__).with_name("data") / "sample.jpg"
PADDING_NAMES = ("valid", "same", "same_lower", "full")
PADDING_MODES = ("zeros", "reflect", "symmetric", "replicate", "circular")
SHOW_MODES = ("auto", "clip", "abs", "signed")

FILTER_HELP = """\
kernels:
{kernels}
  Numbers follow a name after colons: box:5, gaussian:9, gaussian:9:2.5 (size, sigma).
  A FILE is a .npy array, or text (.txt, .csv) with a row of numbers per line.
  Rows of numbers can be given at once: "1 0 -1; 2 0 -2; 1 0 -1", "1/9,1/9,1/9".
  A kernel lies on the picture as it is written (correlation): it is not flipped.

results that don't fit 0..255 (0..65535 for 16 bits), by --show:
  clip    what is below is black, what is above white
  abs     the absolute value; 0 is black, what only 1% of the pixels exceed is white
          (an eighth of the largest value, where that is more)
  signed  0 is mid-grey; black and white are the negative and positive of what abs makes white
  auto    signed for slopes (weights of sum 0 that change sign when turned by half a turn),
          abs for other weights of sum 0 (laplacian, ridge), clip for all else
  A note under each picture's line says what was done.

examples:
  gpuconv filter --kernel ridge                     the sample picture that comes with gpuconv
  gpuconv filter photo.jpg --kernel sobel-x --side-by-side
  gpuconv filter photo.jpg --kernel "1 0 -1; 2 0 -2; 1 0 -1" -o edges.png
  gpuconv filter photo.jpg --kernel gaussian:15 --padding-mode zeros --stride 2
  gpuconv filter holiday/ more/*.png --kernel emboss -o filtered/
"""

PLAN_HELP = """\
The length of --w chooses the operation: K,C/G,S is 1-D, K,C/G,R,S is 2-D, K,C/G,T,R,S is 3-D.

examples:
  gpuconv plan --x 32,64,56,56 --w 64,64,3,3 --padding same
  gpuconv plan --x 8,96,112,112 --w 96,1,7,7 --groups 96 --padding 3 --stride 2
  gpuconv plan --x 1,16,16,64,64 --w 32,16,3,3,3 --padding 1,0:2,1
"""

INFO_HELP = """\
Versions, devices and caches, and in a line why convolutions run where they run.

example:
  gpuconv info
"""


class CommandError(Exception):
    """What ends the command, with a message for the user and the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


# --------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and an exception."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} ({self.prog} --help explains)", status=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (``sys.argv``'s where left out).

    Returns the exit status; ``--help`` and ``--version`` raise SystemExit(0), as argparse does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name that the terminal's encoding has no letters for is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        status: int = arguments.run(arguments)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
        return status
    except CommandError as error:
        _complain(str(error))
        return error.status
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # All else that is read and written has errors of its own: this is standard output's reader
        # that went away (`gpuconv info | head -1`), or its disk that is full. What Python still
        # flushes on its way out goes nowhere, or it would complain then.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141  # 128 + SIGPIPE, as a shell reports it
        _complain(f"standard output: {_reason(error)}")
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="gpuconv",
        description="Convolution: filter pictures, and see how convolutions are computed.",
    )
    parser.add_argument("--version", action="version", version=f"gpuconv {gpuconv.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="filter|plan|info", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, more: str) -> Any:
        sub = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    names = "\n".join(f"  {name:12} {entry.about}" for name, entry in filters.NAMED.items())
    more = FILTER_HELP.format(kernels=names)
    sub = command("filter", run_filter, "filter pictures with a kernel", more)
    sub.add_argument(
        "images",
        metavar="IMAGE|FOLDER",
        nargs="*",
        help="pictures, and folders of them; none: a sample picture",
    )
    sub.add_argument(
        "-k", "--kernel", required=True, metavar="NAME|FILE|ROWS", help="the kernel, see below"
    )
    sub.add_argument(
        "--stride", type=_extents, default=(1,), metavar="N|SY,SX", help="step of the kernel (1)"
    )
    sub.add_argument(
        "--padding",
        type=_padding,
        default="same",
        metavar="PADDING",
        help="same, same_lower, valid, full, N, PY,PX or TOP:BOTTOM,LEFT:RIGHT (same)",
    )
    sub.add_argument(
        "--padding-mode",
        choices=PADDING_MODES,
        default="reflect",
        help="what lies beyond the edge (reflect: no dark rim)",
    )
    sub.add_argument(
        "--backend", choices=("numpy", "cuda"), help="where to compute (cuda where it works)"
    )
    sub.add_argument(
        "--show", choices=SHOW_MODES, default="auto", help="how results become pixels, see below"
    )
    sub.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="the file to write, or the folder (<picture>-<kernel>.png here)",
    )
    sub.add_argument(
        "--side-by-side", action="store_true", help="put the original next to the result"
    )

    sub = command("plan", run_plan, "show how a convolution would be computed", PLAN_HELP)
    sub.add_argument("--x", type=_extents, required=True, metavar="N,C,H,W", help="shape of x")
    sub.add_argument("--w", type=_extents, required=True, metavar="K,C/G,R,S", help="shape of w")
    sub.add_argument("--stride", type=_extents, metavar="N,…")
    sub.add_argument(
        "--padding",
        type=_padding,
        metavar="PADDING",
        help="same, same_lower, valid, full, or per axis N or BEFORE:AFTER (0)",
    )
    sub.add_argument("--dilation", type=_extents, metavar="N,…")
    sub.add_argument("--groups", type=int, metavar="G")
    sub.add_argument("--padding-mode", choices=PADDING_MODES)
    sub.add_argument("--layout", help="NCHW, NHWC, …")
    sub.add_argument("--dtype", help="float32, float16, int16, … (float32)")
    sub.add_argument("--precision", help="ieee, tf32 or tf32x3")
    sub.add_argument("--algorithm", help="auto, or one out of the table")
    sub.add_argument(
        "--workspace-limit", type=_bytes, metavar="BYTES", help="a number, or 512KiB, 64MiB, 1GiB"
    )
    sub.add_argument("--backend", choices=("numpy", "cuda"))

    command("info", run_info, "show versions, devices and caches", INFO_HELP)
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """`argv`, with a kernel that starts with a minus sign tied to its option.

    argparse would take ``-1,0,1`` for an option of its own.
    """
    result: list[str] = []
    for word in argv:
        if result and result[-1] in ("-k", "--kernel") and re.match(r"-[0-9.]", word):
            result[-1] = f"--kernel={word}"
        else:
            result.append(word)
    return result


def _extents(text: str) -> tuple[int, ...]:
    words = re.split("[,x]", text)
    if not all(re.fullmatch(r"[0-9]+", word) for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; 2 or 32,64,56,56 would do"
        )
    return tuple(map(int, words))


def _padding(text: str) -> str | tuple[int | tuple[int, ...], ...]:
    if text in PADDING_NAMES:
        return text
    axes = [axis.split(":") for axis in text.split(",")]
    numbers = all(re.fullmatch(r"[0-9]+", word) for axis in axes for word in axis)
    if not numbers or any(len(axis) > 2 for axis in axes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no padding; {', '.join(PADDING_NAMES)}, 1, 1,2 or 0:1,2:2 would do"
        )
    return tuple(int(a[0]) if len(a) == 1 else (int(a[0]), int(a[1])) for a in axes)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*(?:([KMG])(?:iB|B)?)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 0, 1000000 or 64MiB would do")
    return int(match[1]) << 10 * " KMG".index((match[2] or " ").upper())


def _scalar(values: str | tuple[int | tuple[int, ...], ...]) -> Any:
    """One number stands for all axes; several are one per axis."""
    return values[0] if len(values) == 1 and isinstance(values[0], int) else values


def _complain(message: str) -> None:
    if sys.stderr is not None:
        print(f"gpuconv: error: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------
# gpuconv plan, gpuconv info
# --------------------------------------------------------------------------------------------


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan of the convolution that the options describe."""
    planners = {3: gpuconv.plan_conv1d, 4: gpuconv.plan_conv2d, 5: gpuconv.plan_conv3d}
    if len(arguments.w) not in planners:
        raise CommandError(
            f"argument --w: {arguments.w} has {len(arguments.w)} numbers; "
            f"3 (K,C/G,S), 4 (K,C/G,R,S) or 5 (K,C/G,T,R,S) would do",
            status=2,
        )
    given = vars(arguments).items()
    options = {k: v for k, v in given if v is not None and k not in ("run", "x", "w")}
    for name in {"stride", "padding", "dilation"} & options.keys():
        options[name] = _scalar(options[name])
    try:
        plan = planners[len(arguments.w)](arguments.x, arguments.w, **options)
    except gpuconv.BackendError as error:
        raise CommandError(str(error)) from error
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), status=2) from error
    print(plan)
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    """Print the configuration."""
    gpuconv.show_config()
    return 0


# --------------------------------------------------------------------------------------------
# gpuconv filter
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What to do with each picture."""

    kernel: filters.Kernel
    label: str
    stride: Any
    padding: Any
    padding_mode: str
    backend: str
    show: str
    side_by_side: bool


def run_filter(arguments: argparse.Namespace) -> int:
    """Filter every picture; go on after one that fails, and tell at the end."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise CommandError(
            "filter reads and writes pictures with Pillow, which is not installed; "
            "pip install 'gpuconv[cli]' would do"
        ) from error
    job = _job(arguments)
    sources, failures = _sources(arguments.images)
    total = len(sources) + failures
    targets = _targets(sources, total > 1, arguments.out, job.label)
    try:
        with gpuconv.use_backend(job.backend), _progress(len(sources)) as advance:
            for source, target in zip(sources, targets, strict=True):
                try:
                    _filter_one(source, target, job)
                except CommandError as error:
                    failures += 1
                    _complain(str(error))
                advance()
    except gpuconv.BackendError as error:
        raise CommandError(f"--backend {job.backend}: {error}; numpy works anywhere") from error
    if failures and total > 1:
        _complain(f"{failures} of {total} inputs failed, {total - failures} pictures were written")
    return 1 if failures else 0


def _job(arguments: argparse.Namespace) -> Job:
    """The options, checked against each other before any picture is read."""
    try:
        label, kernel = filters.resolve(arguments.kernel)
    except filters.KernelError as error:
        raise CommandError(f"argument -k/--kernel: {error}", status=2) from error
    except OSError as error:
        raise CommandError(f"kernel file {arguments.kernel}: {_reason(error)}") from error
    stride, padding = _scalar(arguments.stride), _scalar(arguments.padding)
    # A picture of the kernel's size fits whatever the options, so only they can be at fault.
    shape = (1, 1, *kernel.shape)
    try:
        gpuconv.conv_output_shape(shape, shape, stride=stride, padding=padding)
    except ValueError as error:
        raise CommandError(str(error).partition(": ")[2], status=2) from error
    return Job(
        kernel=kernel,
        label=label,
        stride=stride,
        padding=padding,
        padding_mode=arguments.padding_mode,
        backend=arguments.backend or gpuconv.default_backend(),
        show=arguments.show,
        side_by_side=arguments.side_by_side,
    )


def _sources(images: Sequence[str]) -> tuple[list[Path], int]:
    """The pictures to filter, folders opened, and how many folders held none."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    sources: list[Path] = []
    failures = 0
    for path in map(Path, images):
        if not path.is_dir():
            sources.append(path)
            continue
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        except OSError as error:
            inside, why = [], _reason(error)
        else:
            why = "no pictures in this folder; PNG or JPEG files would do"
        inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
        sources += inside
        if not inside:
            failures += 1
            _complain(f"{path}: {why}")
    return (sources if images else [SAMPLE]), failures


def _targets(sources: Sequence[Path], several: bool, out: str | None, label: str) -> list[Path]:
    """Where each result goes: one file, or ``<picture>-<kernel>.png`` in a folder."""
    from PIL import Image

    folder = Path(out or ".")
    known = {s for s, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    is_folder = out is None or folder.is_dir() or out.endswith(("/", os.sep))
    if several and not is_folder and folder.suffix.lower() in known:
        raise CommandError(
            f"argument -o/--out: {out!r} is one picture, for {len(sources)} results; a folder, or "
            f"'{out}/' to make one, would do",
            status=2,
        )
    if is_folder or several:
        if out is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CommandError(
                    f"{folder}: {_reason(error)}; a folder for the results would do"
                ) from error
        targets = [folder / f"{source.stem}-{label}.png" for source in sources]
    else:
        if folder.suffix.lower() not in known:
            raise CommandError(
                f"argument -o/--out: {out!r} does not end as a picture that can be written; "
                f".png, .jpg or an existing folder would do",
                status=2,
            )
        targets = [folder] * len(sources)
    taken: dict[Path, Path] = {}
    for source, target in zip(sources, targets, strict=True):
        if target in taken:
            raise CommandError(
                f"{taken[target]} and {source} would both be written to {target}; "
                f"another name for one of them, or one at a time with -o, would do",
                status=2,
            )
        taken[target] = source
        if any(_same_file(target, other) for other in sources):
            raise CommandError(
                f"{target} is an input and would be overwritten; another -o would do", status=2
            )
    return targets


def _same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:  # one of them does not exist
        return False


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, where someone watches and there is something to wait for.

    Yields what is called after each picture.
    """
    if total < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # the bar is a comfort, not a need
        yield lambda: None
        return
    # Lines that go to the same terminal are printed above the bar; a file gets its own.
    with Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        task = progress.add_task("filter", total=total)
        yield lambda: progress.advance(task)


def _filter_one(source: Path, target: Path, job: Job) -> None:
    """Read, convolve, show, write, and print the line that says so."""
    picture = _read(source)
    images = picture.planes[:, None]  # (C, 1, H, W): each plane is an image of its own
    weights = job.kernel[None, None]
    options: dict[str, Any] = {
        "stride": job.stride,
        "padding": job.padding,
        "padding_mode": job.padding_mode,
    }
    try:
        plan = gpuconv.plan_conv2d(images.shape, weights.shape, **options, backend=job.backend)
        start = time.perf_counter()
        result = gpuconv.conv2d(images, weights, **options)[:, 0]
        seconds = time.perf_counter() - start
        steps, offsets = plan.problem.stride, plan.problem.pad_lo
        sites = [
            _sites(length, extent, size, step, lo)
            for length, extent, size, step, lo in zip(
                result.shape[1:],
                picture.planes.shape[1:],
                job.kernel.shape,
                steps,
                offsets,
                strict=True,
            )
        ]
        pixels, note = _shown(result, sites, job, picture.top)
        after = _to_image(pixels, None if picture.alpha is None else _alpha(picture.alpha, sites))
        height, width = result.shape[1:]
        if job.side_by_side:
            before = _to_image(picture.planes.astype(_pixel_type(picture.top)), picture.alpha)
            after = _side_by_side(before, after, (source.name, job.label))
    except MemoryError as error:
        raise CommandError(f"{source}: not enough memory for a picture of this size") from error
    except ValueError as error:
        raise CommandError(f"{source}: {error}") from error
    _write(target, after, picture.icc_profile)
    before_size = f"{picture.planes.shape[2]}x{picture.planes.shape[1]}"
    print(
        f"{source.name} {before_size} {picture.mode} -> {target} {width}x{height} "
        f"({job.backend}, {plan.algorithm}, {_milliseconds(seconds)})"
    )
    if note:
        print(f"  note: {note}")


# --------------------------------------------------------------------------------------------
# Pictures: in, out, and what convolution makes of them
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture's planes to filter, and what goes around the filter unchanged."""

    mode: str
    planes: Planes  # grey, or red, green and blue, in 0..top
    alpha: Pixels | None  # (H, W)
    top: int  # 255 or 65535
    icc_profile: bytes | None


def _read(path: Path) -> Picture:
    """The picture at `path`, upright, in grey or RGB, its alpha apart."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # Pillow warns of odd metadata and of large files; pictures that can be read will do.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except UnidentifiedImageError as error:
        raise CommandError(f"{path}: not a picture; a PNG or JPEG file would do") from error
    except MemoryError as error:
        raise CommandError(f"{path}: not enough memory for a picture of this size") from error
    except OSError as error:
        raise CommandError(f"{path}: {_reason(error)}; a readable picture would do") from error
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        raise CommandError(f"{path}: a broken picture ({error}); a whole one would do") from error
    mode = image.mode
    profile = image.info.get("icc_profile")
    if mode.startswith("I;16") or mode == "I":
        grey = np.asarray(image)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise CommandError(
                f"{path}: grey values from {grey.min()} to {grey.max()}; 0 to 65535 would do"
            )
        return Picture("I;16", grey[None].astype(np.float32), None, 65535, profile)
    if mode == "F":
        raise CommandError(f"{path}: floating-point pixels; 8 or 16 bits would do")
    if mode == "1":
        image = image.convert("L")
    elif mode in ("PA", "La", "RGBa") or (
        mode in ("P", "RGB", "L") and "transparency" in image.info
    ):
        image = image.convert("LA" if mode in ("La", "L") else "RGBA")
    elif mode not in ("L", "LA", "RGB", "RGBA"):
        if mode != "P":
            profile = None  # it described the other colour space
        image = image.convert("RGB")
    pixels = np.atleast_3d(np.asarray(image))
    alpha = pixels[:, :, -1] if image.mode.endswith("A") else None
    colors = pixels if alpha is None else pixels[:, :, :-1]
    planes = np.ascontiguousarray(np.moveaxis(colors, -1, 0), dtype=np.float32)
    return Picture(image.mode, planes, alpha, 255, profile)


@dataclass(frozen=True)
class _Sites:
    """Along one axis: which input pixel lies under the kernel's middle, for each output pixel."""

    centers: npt.NDArray[np.intp]
    inside: slice  # the outputs whose windows stay within the picture


def _sites(length: int, extent: int, size: int, step: int, pad: int) -> _Sites:
    starts = np.arange(length) * step - pad
    inside = np.flatnonzero((starts >= 0) & (starts + size <= extent))
    whole = slice(0, length)
    return _Sites(
        np.clip(starts + (size - 1) // 2, 0, extent - 1),
        slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else whole,
    )


def _alpha(alpha: Pixels, sites: Sequence[_Sites]) -> Pixels:
    """The alpha that the output's pixels had in the input: never filtered."""
    return np.ascontiguousarray(alpha[np.ix_(sites[0].centers, sites[1].centers)])


def _shown(
    result: Planes, sites: Sequence[_Sites], job: Job, top: int
) -> tuple[Pixels, str | None]:
    """Pixels of a result, and a note about what had to be done to it."""
    show = _auto_show(job.kernel) if job.show == "auto" else job.show
    note: str | None
    if show == "clip":
        beyond = float(np.mean((result < -0.5) | (result >= top + 0.5)))
        percent = f"{beyond:.1%}" if beyond >= 0.001 else "less than 0.1%"
        note = f"{percent} of the values are outside 0..{top}: shown as black or white"
        weight = float(job.kernel.sum(dtype=np.float64))
        if weight > 1.5:
            note += f"; the kernel sums to {weight:g}, divided by that it would keep the brightness"
        values, note = result, note if beyond else None
    else:
        # Where the kernel hangs over the edge, values owe much to the padding; they don't count.
        size = np.abs(result[:, sites[0].inside, sites[1].inside])
        # The strongest hundredth may saturate, so that the rest is not too faint to see; but not
        # all that stands out where there is little.
        scale = max(float(np.percentile(size, 99)), float(size.max()) / 8) or 1.0
        if show == "abs":
            values = np.abs(result) * np.float32(top / scale)
            note = f"absolute values: 0 is black, {scale:.4g} and above is white"
        else:
            middle = (top + 1) // 2
            values = middle + result * np.float32((top - middle) / scale)
            note = (
                f"signed result: 0 is mid-grey, {-scale:.4g} and below is black, "
                f"{scale:.4g} and above is white"
            )
    return np.clip(np.rint(values), 0, top).astype(_pixel_type(top)), note


def _auto_show(kernel: filters.Kernel) -> str:
    """How results of this kernel are best seen."""
    exact = kernel.astype(np.float64)
    if abs(exact.sum()) > 1e-3 * np.abs(exact).sum() or not exact.any():
        return "clip"  # it keeps brightness (or is all zeros)
    # Turned by half a turn a slope changes its sign, and which sign is half of what it tells. A
    # second derivative stays as it is; on black, its lines are easier to see.
    odd = np.allclose(exact, -exact[::-1, ::-1], rtol=1e-3, atol=1e-6 * np.abs(exact).max())
    return "signed" if odd else "abs"


def _pixel_type(top: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(np.uint8) if top == 255 else np.dtype(np.uint16)


def _to_image(planes: Pixels, alpha: Pixels | None) -> Image:
    """A Pillow image of the planes (C, H, W), and of alpha where there is one."""
    from PIL import Image

    if alpha is not None:
        planes = np.concatenate([planes, alpha[None]])
    pixels = planes[0] if len(planes) == 1 else np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    return Image.fromarray(pixels)


def _side_by_side(before: Image, after: Image, captions: tuple[str, str]) -> Image:
    """Both pictures on white, captions under them.

    Both get the room that the larger one takes. A smaller one is enlarged by a whole factor where
    one fits, so that its pixels stay pixels, and is centred.
    """
    from PIL import Image, ImageDraw, ImageFont, features

    width, height = max(before.width, after.width), max(before.height, after.height)
    gap = max(8, width // 48)
    text = max(12, min(width, height) // 28)
    # Without FreeType, Pillow's own font is too small and knows too few letters.
    strip = 2 * text if features.check("freetype2") else 0
    sheet = Image.new("RGB", (2 * width + gap, height + strip), "white")
    for i, (image, caption) in enumerate(zip((before, after), captions, strict=True)):
        left = i * (width + gap)
        panel = _on_white(image)
        factor = min(width // panel.width, height // panel.height)
        panel = panel.resize(
            (panel.width * factor, panel.height * factor), Image.Resampling.NEAREST
        )
        sheet.paste(panel, (left + (width - panel.width) // 2, (height - panel.height) // 2))
        if strip:
            font = ImageFont.load_default(size=text)
            while len(caption) > 4 and font.getlength(caption) > width:
                caption = caption[:-4] + "..."
            middle = (left + width / 2, height + strip / 2)
            ImageDraw.Draw(sheet).text(middle, caption, fill="black", font=font, anchor="mm")
    return sheet


def _on_white(image: Image) -> Image:
    """The image as 8-bit RGB, what is transparent turned white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _write(path: Path, image: Image, icc_profile: bytes | None) -> None:
    """Write the picture whole or not at all: under another name first, then renamed."""
    from PIL import Image

    kind = Image.registered_extensions()[path.suffix.lower()]
    encoded = io.BytesIO()
    try:
        image.save(encoded, format=kind, icc_profile=icc_profile, quality=95)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(
            f"{path}: {kind} can't hold this picture ({error}); a .png would"
        ) from error
    temporary = path.with_name(f".gpuconv-{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(encoded.getbuffer())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CommandError(
            f"{path}: cannot be written: {_reason(error)}; another -o would do"
        ) from error


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
