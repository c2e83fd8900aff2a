"""The contestants: gpuconv, and the libraries that people use for the same problems.

A peer turns a row and its data into a ``Contestant``: a call without arguments that computes the
row's result from inputs which are already where and how that library likes them. What it cannot do
raises ``Unable`` with the reason, and its cell stays empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import gpuconv
from bench.suites import Data, Row
from gpuconv import backends
from gpuconv.arrays import HostArray
from gpuconv.plan import Plan, choose

# What rounding peers are allowed: their sums may be Winograd's or an FFT's, whose errors are larger
# than those of a plain sum. It is enough to tell a wrong convolution from a right one.
PEER_C = 64.0
FFT_C = 256.0


class Unable(Exception):  # noqa: N818  (it is an answer, not a failure)
    """Why a contestant cannot do a row; `info` for its cell."""

    def __init__(self, reason: str, **info: Any) -> None:
        super().__init__(reason)
        self.info = info


def _nothing() -> None:
    pass


@dataclass
class Contestant:
    """One way of computing one row."""

    name: str
    run: Callable[[], Any]
    to_host: Callable[[Any], HostArray]  # run's result, channels first, NumPy
    before: Callable[[], None] = _nothing  # untimed, before every sample
    c: float = PEER_C  # the constant of its error bound
    host_timed: bool = False  # on a GPU: waits for its own result, and events do not see its stream
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A library, or one way of calling it."""

    name: str
    needs: tuple[str, ...]  # modules
    build: Callable[[Row, Data], Contestant]
    flops_per_second: float | None = None  # a cautious guess, where it may be too slow to wait for
    title: str = ""

    @property
    def installed(self) -> bool:
        return all(_installed(module) for module in self.needs)


@lru_cache(maxsize=32)
def _installed(module: str) -> bool:
    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


# ---- gpuconv ---------------------------------------------------------------------------------


def gpuconv_contestant(
    row: Row, data: Data, backend: str, algorithm: str = "auto", channels_last: bool = False
) -> Contestant:
    """The public function, as users call it: it plans (from its cache), allocates, computes."""
    x, w = (_place(a, backend) for a in (data.x, data.w))
    if channels_last:
        _more_than_one_channel(row)
        x, w = (
            _channels_last(a, backend) if image else a
            for a, image in zip((x, w), row.images, strict=True)
        )
    try:
        plan = planned(row, backend, algorithm, channels_last)
    except ValueError as error:
        raise Unable(str(error)) from error
    info = {
        "algorithm": plan.algorithm,
        "predicted": plan.cost,
        "workspace_bytes": plan.workspace_bytes,
    }
    if reason := next(c.rejected for c in plan.candidates if c.algorithm == plan.algorithm):
        info["only_by_name"] = reason
    return Contestant(
        name="gpuconv" if algorithm == "auto" else f"gpuconv.{algorithm}",
        run=_gpuconv_call(row, x, w, algorithm=algorithm, **row.options),
        to_host=_to_host,
        # An algorithm whose rounding is not a plain sum's states its own constant.
        c=float(getattr(plan.implementation, "ERROR_CONSTANT", 1.0)),
        info=info,
    )


def _gpuconv_call(row: Row, x: Any, w: Any, **options: Any) -> Callable[[], Any]:
    if row.operation == "fprop":
        name = f"conv_transpose{row.ndim}d" if row.transposed else f"conv{row.ndim}d"
        forward = getattr(gpuconv, name)
        return lambda: forward(x, w, **options)
    if row.operation == "dgrad":
        gradient = getattr(gpuconv.grad, f"conv{row.ndim}d_input")
        return lambda: gradient(row.x_shape, w, x, **options)
    gradient = getattr(gpuconv.grad, f"conv{row.ndim}d_weight")
    return lambda: gradient(x, row.w_shape, w, **options)


def planned(row: Row, backend: str, algorithm: str = "auto", channels_last: bool = False) -> Plan:
    """The plan that gpuconv's functions make for `row`."""
    problem = replace(row.problem, channels_last=channels_last)
    return choose("bench", problem, backend, backends.backend(backend).device(), algorithm)


def algorithms(row: Row, backend: str) -> dict[str, float]:
    """Every algorithm that can serve `row`, by "auto" or only by name: its predicted seconds."""
    candidates = planned(row, backend).candidates
    return {c.algorithm: c.cost for c in candidates if c.cost is not None}


def _more_than_one_channel(row: Row) -> None:
    """Raise Unable where channels-last memory is no other."""
    channels = (
        shape[1] for shape, image in zip(row.operand_shapes, row.images, strict=True) if image
    )
    if all(count == 1 for count in channels):
        raise Unable("one channel: the memory is the same")


def _place(array: HostArray, backend: str) -> Any:
    if backend == "numpy":
        return array
    if array.dtype.name == "bfloat16":  # CuPy 13 has no bfloat16: such users have torch tensors
        return _torch_tensor(array).cuda()
    with backends.use_backend("cuda"):
        return backends.asarray(array)


def _channels_last(array: Any, backend: str) -> Any:
    if hasattr(array, "movedim"):
        return array.movedim(1, -1).contiguous().movedim(-1, 1)
    xp = np if backend == "numpy" else import_module("cupy")
    return xp.moveaxis(xp.ascontiguousarray(xp.moveaxis(array, 1, -1)), -1, 1)


def _to_host(y: Any) -> HostArray:
    if isinstance(y, np.ndarray):
        return y
    if hasattr(y, "detach"):
        y = y.detach().cpu()
        # NumPy has no bfloat16 of its own; float32 holds its values.
        return np.asarray(y.float() if str(y.dtype) == "torch.bfloat16" else y)
    if hasattr(y, "get"):
        return np.asarray(y.get())
    return np.asarray(y)


# ---- torch -----------------------------------------------------------------------------------


def _torch_tensor(array: HostArray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch(device: str, channels_last: bool, benchmark: bool) -> Callable[[Row, Data], Contestant]:
    def build(row: Row, data: Data) -> Contestant:
        import torch

        if channels_last and row.ndim != 2:
            raise Unable("channels_last is for 2-D")
        if channels_last:
            _more_than_one_channel(row)
        if row.precision == "tf32x3":
            raise Unable("has no tf32x3")
        if device == "cuda" and not torch.cuda.is_available():
            raise Unable("this torch sees no CUDA device")
        memory = torch.channels_last if channels_last else torch.contiguous_format
        x, w = (
            _torch_tensor(a).to(device).contiguous(memory_format=memory) for a in (data.x, data.w)
        )
        run = _torch_call(row, x, w, memory)

        def before() -> None:
            if device == "cuda":
                torch.backends.cudnn.benchmark = benchmark
                torch.backends.cudnn.allow_tf32 = row.precision == "tf32"

        return Contestant("torch", run, _to_host, before)

    return build


def _torch_call(row: Row, x: Any, w: Any, memory: Any) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F  # noqa: N812  (as everyone calls it)

    options = {k: v for k, v in row.options.items() if k != "precision"}
    if row.operation == "fprop":
        name = f"conv_transpose{row.ndim}d" if row.transposed else f"conv{row.ndim}d"
        conv = getattr(F, name)
        return lambda: conv(x if x.dtype == w.dtype else x.to(w.dtype), w, **options)
    # What autograd calls. It takes the array that the gradient is of for its shape and memory.
    backward = torch.ops.aten.convolution_backward
    stride, padding, dilation = ([options[k]] * row.ndim for k in ("stride", "padding", "dilation"))
    rest = None, stride, padding, dilation, False, [0] * row.ndim, row.groups
    shape = row.x_shape if row.operation == "dgrad" else row.w_shape
    of = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)
    if row.operation == "dgrad":
        return lambda: backward(x, of, w, *rest, [True, False, False])[0]
    return lambda: backward(w, x, of, *rest, [False, True, False])[1]


# ---- libraries of pictures and signals -------------------------------------------------------


def _plane_problem(row: Row) -> None:
    """Raise Unable unless the row is what SciPy, OpenCV and their kin compute."""
    if not row.single_plane:
        raise Unable("one filter on pictures only")
    if row.stride != 1 or row.dilation != 1:
        raise Unable("no stride, no dilation")
    if any(n % 2 == 0 for n in row.w_shape[2:]):
        raise Unable("filters with a middle only")
    if any(row.padding != n // 2 for n in row.w_shape[2:]):
        raise Unable("results of the input's size only")


# A way of calling a library: of the row and its data, the call and the pictures it takes.
PlaneCall = Callable[[Row, Data], tuple[Callable[[Any], Any], Any]]
Place = Callable[[HostArray], Any]


def _pictures(
    name: str, function: PlaneCall, c: float = PEER_C, *, stacks: bool = False
) -> Callable[[Row, Data], Contestant]:
    """A contestant that calls `function`'s result on each picture, in a loop as a user would; with
    `stacks`, once on all of them, (N, spatial...)."""

    def build(row: Row, data: Data) -> Contestant:
        _plane_problem(row)
        call, x = function(row, data)
        planes = [x[:, 0]] if stacks else [x[n, 0] for n in range(row.batch)]

        def run() -> Any:
            return [call(plane) for plane in planes]

        def to_host(ys: Any) -> HostArray:
            y = _to_host(ys[0]) if stacks else np.stack([_to_host(y) for y in ys])
            return y[:, None]

        return Contestant(name, run, to_host, c=c)

    return build


def _convolve2d(module: str, place: Place) -> PlaneCall:
    def function(row: Row, data: Data) -> tuple[Callable[[Any], Any], Any]:
        if row.ndim != 2:
            raise Unable("2-D only")
        convolve2d = import_module(module).convolve2d
        w = place(np.ascontiguousarray(data.w[0, 0, ::-1, ::-1]))
        return lambda plane: convolve2d(plane, w, "same"), place(data.x)

    return function


def _fftconvolve(module: str, place: Place) -> PlaneCall:
    def function(row: Row, data: Data) -> tuple[Callable[[Any], Any], Any]:
        # "same" is the size of the first argument; one filter is broadcast over the stack.
        if any(n < f for n, f in zip(row.x_shape[2:], row.w_shape[2:], strict=True)):
            raise Unable("filters smaller than the picture only")
        fftconvolve = import_module(module).fftconvolve
        w = place(np.ascontiguousarray(np.flip(data.w[0])))
        axes = tuple(range(1, row.ndim + 1))
        if module.startswith("cupyx"):
            return lambda stack: fftconvolve(stack, w, mode="same", axes=axes), place(data.x)
        fft = import_module("scipy.fft")

        def call(stack: Any) -> Any:
            with fft.set_workers(_threads):
                return fftconvolve(stack, w, mode="same", axes=axes)

        return call, place(data.x)

    return function


def _ndimage(module: str, place: Place, separable: bool = False) -> PlaneCall:
    def function(row: Row, data: Data) -> tuple[Callable[[Any], Any], Any]:
        ndimage = import_module(module)
        dtype = data.w.dtype
        if not separable:
            w = place(data.w[0])
            return (
                lambda stack: ndimage.correlate(stack, w, output=dtype, mode="constant"),
                place(data.x),
            )
        if data.factors is None:
            raise Unable("w is no outer product")
        u, v = map(place, data.factors)

        def call(stack: Any) -> Any:
            across = ndimage.correlate1d(stack, v, axis=-1, output=dtype, mode="constant")
            return ndimage.correlate1d(across, u, axis=-2, output=dtype, mode="constant")

        return call, place(data.x)

    return function


def _opencv(separable: bool) -> PlaneCall:
    def function(row: Row, data: Data) -> tuple[Callable[[Any], Any], Any]:
        import cv2

        if row.ndim != 2:
            raise Unable("2-D only")
        depths = {"float32": cv2.CV_32F, "float64": cv2.CV_64F}
        if row.w_dtype not in depths:
            raise Unable(f"no {row.w_dtype}")
        depth, border = depths[row.w_dtype], cv2.BORDER_CONSTANT
        if not separable:
            w = data.w[0, 0]
            return lambda plane: cv2.filter2D(plane, depth, w, borderType=border), data.x
        if data.factors is None:
            raise Unable("w is no outer product")
        u, v = data.factors
        return lambda plane: cv2.sepFilter2D(plane, depth, v, u, borderType=border), data.x

    return function


def _numpy_correlate(row: Row, data: Data) -> tuple[Callable[[Any], Any], Any]:
    if row.ndim != 1:
        raise Unable("1-D only")
    w = data.w[0, 0]
    if w.size > row.x_shape[2]:
        raise Unable("it would take the longer one for the signal")
    return lambda plane: np.correlate(plane, w, "same"), data.x


def _host(array: HostArray) -> HostArray:
    return array


def _cupy(array: HostArray) -> Any:
    if array.dtype.name == "bfloat16":
        raise Unable("no bfloat16")
    return import_module("cupy").asarray(array)


# ---- JAX -------------------------------------------------------------------------------------


def _jax(platform: str) -> Callable[[Row, Data], Contestant]:
    def build(row: Row, data: Data) -> Contestant:
        import jax

        if row.w_dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        if row.x_dtype != row.w_dtype:
            raise Unable("one element type only")
        try:
            device = jax.devices(platform)[0]
        except RuntimeError as error:
            raise Unable(f"JAX sees no {platform} device") from error
        letters = "DHW"[3 - row.ndim :]
        problem = row.problem

        def conv(x: Any, w: Any) -> Any:
            return jax.lax.conv_general_dilated(
                x,
                w,
                problem.stride,
                list(zip(problem.pad_lo, problem.pad_hi, strict=True)),
                rhs_dilation=problem.dilation,
                dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
                feature_group_count=problem.groups,
                precision="default" if row.precision == "tf32" else "highest",
            )

        # A convolution is linear in each operand: what jax.vjp makes of it, too.
        of_x, of_w = (
            jax.ShapeDtypeStruct(shape, data.x.dtype)
            for shape in (problem.x_shape, problem.w_shape)
        )
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "fprop": conv,
            "dgrad": lambda dy, w: jax.linear_transpose(lambda x: conv(x, w), of_x)(dy)[0],
            "wgrad": lambda x, dy: jax.linear_transpose(lambda w: conv(x, w), of_w)(dy)[0],
        }
        x, w = (jax.device_put(a, device) for a in (data.x, data.w))
        compiled = jax.jit(functions[problem.operation])
        return Contestant(
            "jax", lambda: compiled(x, w).block_until_ready(), _to_host, host_timed=True
        )

    return build


# ---- the lists -------------------------------------------------------------------------------

CPU_PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", ("torch",), _torch("cpu", False, False), title="torch, oneDNN, NCHW"),
        Peer("torch_last", ("torch",), _torch("cpu", True, False), title="torch, channels_last"),
        Peer("opencv", ("cv2",), _pictures("opencv", _opencv(False))),
        Peer("opencv_sep", ("cv2",), _pictures("opencv_sep", _opencv(True))),
        Peer(
            "convolve2d",
            ("scipy",),
            _pictures("convolve2d", _convolve2d("scipy.signal", _host)),
            0.5e9,
            title="scipy.signal.convolve2d",
        ),
        Peer(
            "fftconvolve",
            ("scipy",),
            _pictures("fftconvolve", _fftconvolve("scipy.signal", _host), FFT_C, stacks=True),
            title="scipy.signal.fftconvolve",
        ),
        Peer(
            "ndimage",
            ("scipy",),
            _pictures("ndimage", _ndimage("scipy.ndimage", _host), stacks=True),
            1e9,
            title="scipy.ndimage.correlate",
        ),
        Peer(
            "ndimage_sep",
            ("scipy",),
            _pictures("ndimage_sep", _ndimage("scipy.ndimage", _host, separable=True), stacks=True),
            title="scipy.ndimage.correlate1d, twice",
        ),
        Peer("np.correlate", (), _pictures("np.correlate", _numpy_correlate), 0.5e9),
        Peer("jax", ("jax",), _jax("cpu"), 1e9, title="jax.lax, jitted"),
    )
}

CUDA_PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", ("torch",), _torch("cuda", False, False), title="torch, cuDNN, NCHW"),
        Peer("torch_bm", ("torch",), _torch("cuda", False, True), title="benchmark mode, NCHW"),
        Peer("torch_last", ("torch",), _torch("cuda", True, False), title="channels_last"),
        Peer(
            "torch_last_bm",
            ("torch",),
            _torch("cuda", True, True),
            title="benchmark mode, channels_last",
        ),
        Peer(
            "cupyx_ndimage",
            ("cupy",),
            _pictures("cupyx_ndimage", _ndimage("cupyx.scipy.ndimage", _cupy), stacks=True),
            1e11,
        ),
        Peer(
            "cupyx_ndimage_sep",
            ("cupy",),
            _pictures(
                "cupyx_ndimage_sep",
                _ndimage("cupyx.scipy.ndimage", _cupy, separable=True),
                stacks=True,
            ),
        ),
        Peer(
            "cupyx_convolve2d",
            ("cupy",),
            _pictures("cupyx_convolve2d", _convolve2d("cupyx.scipy.signal", _cupy)),
            1e11,
        ),
        Peer(
            "cupyx_fftconvolve",
            ("cupy",),
            _pictures(
                "cupyx_fftconvolve", _fftconvolve("cupyx.scipy.signal", _cupy), FFT_C, stacks=True
            ),
        ),
        Peer("jax", ("jax",), _jax("gpu")),
    )
}

PEERS = {"numpy": CPU_PEERS, "cuda": CUDA_PEERS}

_threads = 1  # what run.fix_threads set, for the libraries that are told at every call


def set_threads(threads: int) -> None:
    """Remember the number of threads for SciPy's FFTs."""
    global _threads
    _threads = threads
