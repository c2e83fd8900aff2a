"""3x3 convolution of stride 1 by Winograd's method, in two forms.

FUSED, F(2x2, 3x3): 16 products where the sum has 36. kernels_cuda/winograd.cu transforms,
multiplies and transforms back in one kernel; only the transformed filters (winograd_filter.cu) are
written to memory.

PASSES, F(4x4, 3x3): 36 products where the sum has 144. The transformed inputs (winograd_input.cu)
and the products (winograd_multiply.cu) go through a workspace, some tiles at a time, so that they
stay in the cache, and winograd_output.cu makes y of them.

Error. gpuconv/toom_cook.py derives, for one output and its tile,

    |y - y_ref| <= (L + t) u kappa  sum over c of  max|x_c in the tile| max|w_c|

beside the rounding of the result: u is float32's unit roundoff, kappa 64 and 564, and L the
roundings on a product's way through the sum: C of FUSED, 16 + C/16 of PASSES, which sums in two
levels. The direct sum's bound, 9 C u sum |x||w|, is in these terms 81 C u sum max|x_c| max|w_c|. A
form is used where its bound is at most twice that one (``bound``): FUSED from 5 channels on, PASSES
from 122; with fewer than 5 the algorithm can be asked for by name, and is FUSED. Small outputs
beside large ones are less exact than direct sums: the bound knows all that a tile reads, not each
window of it.

A NaN or infinity that a tile reads reaches outputs that do not see it, and leaves all of these not
finite: the kernels compute such a tile anew, as direct sums.

What decides the order of a sum, and with it its bits: the shapes that are planned for, the
workspace's limit and the device. The batch of a call, strides, and passes do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes, toom_cook
from gpuconv.cuda_backend import launch, rates
from gpuconv.cuda_backend.launch import DIVISOR, Launch, Layout, Macros
from gpuconv.dtypes import DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

ERROR_CONSTANT = 2.0  # its error bound over that of the direct sum, for all that a tile reads

TYPES = (dtypes.FLOAT32, dtypes.FLOAT16, dtypes.BFLOAT16)
TILES = np.dtype(
    [
        ("across", DIVISOR),
        ("down", DIVISOR),
        ("filter_blocks", DIVISOR),
        ("tile_blocks", DIVISOR),
        ("channel_blocks", DIVISOR),
        ("groups", DIVISOR),
        ("first", np.int32),
        ("count", np.int32),
        ("pitch", np.int32),
        ("x_channels_inner", np.int32),
        ("y_channels_inner", np.int32),
        ("y_vector", np.int32),
    ],
    align=True,
)


@dataclass(frozen=True)
class Form:
    """F(outputs x outputs, 3x3), as one of the two ways computes it."""

    name: str
    outputs: int  # extent of a tile
    tiles: int  # that a block multiplies
    threads: int
    blocks: int  # that share a multiprocessor
    chunk: int  # channels between two barriers
    roundings: int  # t: of the filter's transform, the input's, the output's
    efficiency: float  # the share of the multiply-add rate that a full multiprocessor reaches

    @property
    def positions(self) -> int:
        return (self.outputs + 2) ** 2


FUSED = Form("fused", 2, 32, 256, 1, 8, roundings=1 + 2 + 4, efficiency=0.7)
PASSES = Form("passes", 4, 128, 128, 2, 16, roundings=1 + 4 + 6, efficiency=0.75)

_FILTERS = 64  # output channels of a block
_BLOCK = 256  # threads of the kernels that transform
_SHARED_BYTES = 4 * 2 * 8 * (16 * _FILTERS + 16 * 32 + 4)  # of FUSED
_STATIC_BYTES = 16
_WORKSPACE = 64 << 20
_PASS_BYTES = 32 << 20  # most inputs and products of a pass, for large caches to hold

_MOST_TILES = 1 << 24  # of one launch, where an image has no more

_CHUNK_CYCLES = {FUSED: 100, PASSES: 250}  # beyond a chunk's multiplications: waiting, the barrier
_EXCHANGE_CYCLES = 4000  # of a block of FUSED, from sums to results
_BANDWIDTH = 0.8  # the share of the memory's bandwidth


def bound(form: Form, channels: int) -> float:
    """Its error bound over the direct sum's, both for inputs and taps as large as the largest.

    (L + t) kappa / (81 C), as the module's docstring says.
    """
    longest = channels
    if form is PASSES:
        longest = form.chunk + -(-channels // form.chunk)
    kappa = toom_cook.amplification(form.outputs)
    return (longest + form.roundings) * kappa / (81 * channels)


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if problem.filter != (3, 3):
        return No("the filter is not 3x3")
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return No("it has no stride or dilation")
    if problem.x_dtype not in TYPES:
        return No(f"has no kernel for x in {problem.x_dtype}")
    if launch.type_macros(problem) != launch.uniform_macros(problem.x_dtype):
        return No("x, w, bias and the result must have one dtype")
    blocks = problem.groups * -(-problem.group_out_channels // _FILTERS)
    if max(_image_tiles(problem, FUSED), blocks * _MOST_TILES // FUSED.tiles) >= 2**30:
        return No("an image or the output channels are too large for its 32-bit counters")
    if not _forms(problem, device):
        return No(f"a block takes {_SHARED_BYTES + _STATIC_BYTES} bytes of shared memory")
    if _cut(problem, device) is None:
        return No("one group's transformed filters do not fit in the workspace")
    return True


def only_by_name(problem: ConvProblem) -> str | None:
    if all(bound(form, problem.group_in_channels) > ERROR_CONSTANT for form in (FUSED, PASSES)):
        return (
            f"with {problem.group_in_channels} input channels of a group its error bound is more "
            f"than {ERROR_CONSTANT:g} times that of the direct sum"
        )
    return None


def cost(problem: ConvProblem, device: Any) -> float:
    """Waves of blocks at the multiply-add rate; the transforms of PASSES at the memory's.

    A multiprocessor that runs n blocks takes the longer of: all their multiplications at the form's
    share of its full rate; and ceil(n / those that fit) times a lone block, which waits for itself.
    """
    return _found(problem, device).seconds


def workspace(problem: ConvProblem, device: Any) -> int:
    return _found(problem, device).bytes


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    problem, device = plan.problem, plan.device
    cut = _found(problem, device)
    images = _most_images(problem, cut.form)
    for k in range(0, problem.out_channels, cut.channels):
        some = slice(k, k + cut.channels)
        filters, added = w[some], None if bias is None else bias[some]
        for n in range(0, x.shape[0], images):
            arrays = x[n : n + images], filters, added, out[n : n + images, some]
            _bind(problem, device, cut, *arrays)(*arrays)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None] | None:
    """What ``run`` does where all output channels and images are computed at once."""
    problem, device = plan.problem, plan.device
    cut = _found(problem, device)
    if cut.channels < problem.out_channels or x.shape[0] > _most_images(problem, cut.form):
        return None
    return _bind(problem, device, cut, x, w, bias, out)


def _bind(
    problem: ConvProblem, device: Any, cut: Cut, x: Any, w: Any, bias: Any, out: Any
) -> Callable[..., None]:
    if w.shape[0] != problem.out_channels:
        problem = replace(problem, out_channels=w.shape[0])
    transform, *steps = prepare_part(problem, device, Layout(x, w, bias, out), cut)
    passes = list(zip(*[iter(steps)] * 3, strict=False))

    def call(x: Any, w: Any, bias: Any, out: Any) -> None:
        filters = device.empty((cut.filter_floats,), np.float32)
        transform(device, w, filters)
        if cut.form is FUSED:
            steps[0](device, x, w, filters, bias, out)
            return
        inputs = device.empty((cut.input_floats,), np.float32)
        products = device.empty((cut.product_floats,), np.float32)
        for read, multiply, write in passes:
            read(device, x, inputs)
            multiply(device, filters, inputs, products)
            write(device, x, w, products, bias, out)

    return call


# ---- the cut ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a problem is computed: the form, and how much of it at a time."""

    form: Form
    channels: int  # output channels whose transformed filters are held at a time
    tiles: int  # of a pass
    filter_floats: int
    input_floats: int
    product_floats: int
    seconds: float

    @property
    def bytes(self) -> int:
        return 4 * (self.filter_floats + self.input_floats + self.product_floats)


def _found(problem: ConvProblem, device: Any) -> Cut:
    cut = _cut(problem, device)
    assert cut is not None, "supports() has said that it fits"
    return cut


@lru_cache(maxsize=4096)
def _cut(problem: ConvProblem, device: Any) -> Cut | None:
    """The cheapest cut that fits the workspace; where none does, the smallest."""
    cuts = [c for form in _forms(problem, device) for c in _cuts(problem, device, form)]
    limit = problem.workspace_limit
    fitting = [c for c in cuts if limit is None or c.bytes <= limit]
    if fitting:
        return min(fitting, key=lambda c: c.seconds)
    return min(cuts, key=lambda c: c.bytes, default=None)


def _forms(problem: ConvProblem, device: Any) -> list[Form]:
    """The forms that the device can run and whose error bound is small enough.

    With too few channels for that, which only happens by name, the one of the smaller error.
    """
    channels = problem.group_in_channels
    most = max(ERROR_CONSTANT, bound(FUSED, channels))
    fits = device.max_shared_bytes >= _SHARED_BYTES + _STATIC_BYTES
    return [f for f in (FUSED, PASSES) if bound(f, channels) <= most and (fits or f is PASSES)]


def _cuts(problem: ConvProblem, device: Any, form: Form) -> Iterator[Cut]:
    """Some cuts of up to 64 MiB, the smallest among them."""
    blocks = -(-problem.group_out_channels // _FILTERS)
    per_block = problem.groups * problem.group_in_channels * form.positions * _FILTERS
    total = problem.batch * _image_tiles(problem, form)
    held = blocks  # of each group
    while True:
        parts = -(-blocks // held)
        channels = problem.out_channels if parts == 1 else held * _FILTERS
        filters = held * per_block
        seconds = _filter_seconds(problem, device, form, parts)
        if form is FUSED:
            seconds += parts * _fused_seconds(problem, device, held, total)
            options = [Cut(form, channels, 0, filters, 0, 0, seconds)]
        else:
            options = []
            for tiles in range(form.tiles, total + form.tiles, form.tiles):
                inputs = form.positions * problem.in_channels * tiles
                products = form.positions * problem.groups * held * _FILTERS * tiles
                if options and 4 * (inputs + products) > _PASS_BYTES:
                    break
                passes, rest = divmod(total, tiles)
                each = passes * _pass_seconds(problem, device, held, tiles)
                if rest:
                    each += _pass_seconds(problem, device, held, rest)
                options.append(
                    Cut(form, channels, tiles, filters, inputs, products, seconds + parts * each)
                )
        yield from (option for option in options if option.bytes <= _WORKSPACE)
        # The output channels that a part computes are to be neighbours, so of one group.
        if held == 1 or problem.groups > 1:
            return
        held = -(-held // 2)


def _image_tiles(problem: ConvProblem, form: Form) -> int:
    return math.prod(-(-n // form.outputs) for n in problem.output)


def _most_images(problem: ConvProblem, form: Form) -> int:
    """Of one launch, so that its counters suffice."""
    return max(_MOST_TILES // _image_tiles(problem, form), 1)


def _filter_seconds(problem: ConvProblem, device: Any, form: Form, parts: int) -> float:
    written = 4 * form.positions * problem.out_channels * problem.group_in_channels
    return float(parts * rates.LAUNCH_SECONDS + written / (_BANDWIDTH * device.bandwidth))


def _multiply_seconds(
    problem: ConvProblem, device: Any, form: Form, blocks: int, step: float, ends: int
) -> float:
    """Of blocks that take `step` cycles of multiply-adds for a chunk of channels."""
    alone = step * max(1.0, 128 / form.threads) + _CHUNK_CYCLES[form]
    each = -(-blocks // device.sm_count)
    chunks = -(-problem.group_in_channels // form.chunk)
    cycles = max(
        each * (chunks * step / form.efficiency + ends),
        -(-each // form.blocks) * (chunks * alone + ends),
    )
    return float(cycles / device.clock_hz)


def _fused_seconds(problem: ConvProblem, device: Any, held: int, tiles: int) -> float:
    form = FUSED
    blocks = problem.groups * held * -(-tiles // form.tiles)
    step = form.positions * _FILTERS * form.tiles * form.chunk / 128
    multiply = _multiply_seconds(problem, device, form, blocks, step, _EXCHANGE_CYCLES)
    moved = problem.bytes_moved / (_BANDWIDTH * device.bandwidth)
    return rates.LAUNCH_SECONDS + max(multiply, float(moved))


def _pass_seconds(problem: ConvProblem, device: Any, held: int, tiles: int) -> float:
    """The transforms write and read again what the product reads and writes."""
    form = PASSES
    blocks = form.positions * problem.groups * held * -(-tiles // form.tiles)
    step = _FILTERS * form.tiles * form.chunk / 128
    channels = problem.in_channels + problem.groups * held * _FILTERS
    each = 4 * form.positions + problem.x_dtype.itemsize * form.outputs**2
    moved = tiles * channels * each / (_BANDWIDTH * device.bandwidth)
    multiply = _multiply_seconds(problem, device, form, blocks, step, 0)
    return 3 * rates.LAUNCH_SECONDS + multiply + float(moved)


# ---- launches --------------------------------------------------------------------------------


def prepare(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, ...]:
    """Everything of the launches but the arrays; of a whole problem, for ``gpuconv.warmup``."""
    cut = _found(problem, device)
    part = replace(problem, out_channels=cut.channels)
    return prepare_part(part, device, layout, cut)


@lru_cache(maxsize=1024)
def prepare_part(problem: ConvProblem, device: Any, layout: Layout, cut: Cut) -> tuple[Launch, ...]:
    """The transform of the filters; then the one kernel of FUSED, or three for each pass."""
    form, dtype = cut.form, problem.x_dtype
    p = launch.pack(problem, layout)
    blocks = -(-problem.group_out_channels // _FILTERS)
    tiles = np.zeros((), TILES)
    down, across = (-(-n // form.outputs) for n in problem.output)
    tiles["across"], tiles["down"] = launch.divisor(across), launch.divisor(down)
    tiles["filter_blocks"] = launch.divisor(blocks)
    tiles["groups"] = launch.divisor(problem.groups)
    tiles["x_channels_inner"] = launch.channels_last(layout.x)
    tiles["y_channels_inner"] = launch.channels_last(layout.y)
    tiles["y_vector"] = _y_vector(problem, layout, form)
    total = layout.batch * _image_tiles(problem, form)
    items = problem.groups * blocks * problem.group_in_channels * _FILTERS
    transform = Launch(
        kernel=device.load("winograd_filter", _filter_macros(dtype, form)),
        grid=launch.strided_grid(device, items, _BLOCK),
        block=(_BLOCK, 1, 1),
        constants=(p, _frozen(tiles), np.int32(items)),
    )
    if form is FUSED:
        tiles["count"] = total
        fused = Launch(
            kernel=device.load("winograd", _macros(dtype, launch.index_type(problem, layout))),
            grid=(-(-total // form.tiles) * problem.groups * blocks, 1, 1),
            block=(form.threads, 1, 1),
            constants=(p, _frozen(tiles)),
            shared_bytes=_SHARED_BYTES,
        )
        return transform, fused
    passes = [
        _pass(problem, device, p, tiles, first, min(cut.tiles, total - first))
        for first in range(0, total, cut.tiles)
    ]
    return transform, *(step for steps in passes for step in steps)


def _pass(
    problem: ConvProblem, device: Any, p: Any, tiles: Any, first: int, count: int
) -> tuple[Launch, Launch, Launch]:
    dtype = problem.x_dtype
    tile_blocks = -(-count // PASSES.tiles)
    tiles["first"], tiles["count"], tiles["pitch"] = first, count, tile_blocks * PASSES.tiles
    tiles["tile_blocks"] = launch.divisor(tile_blocks)

    def one_per_thread(stem: str, channels: int, lanes: int) -> Launch:
        """A thread for each tile and channel; of a block, `lanes` tiles."""
        channel_blocks = -(-channels // (_BLOCK // lanes))
        tiles["channel_blocks"] = launch.divisor(channel_blocks)
        return Launch(
            kernel=device.load(stem, _pass_macros(stem, dtype)),
            grid=(-(-count // lanes) * channel_blocks, 1, 1),
            block=(_BLOCK, 1, 1),
            constants=(p, _frozen(tiles)),
        )

    multiply = Launch(
        kernel=device.load("winograd_multiply", {"STAGES": 3}),
        grid=(
            PASSES.positions * problem.groups * tile_blocks * int(tiles["filter_blocks"]["value"]),
            1,
            1,
        ),
        block=(PASSES.threads, 1, 1),
        constants=(np.int32(problem.group_in_channels), _frozen(tiles)),
    )
    x_lanes, y_lanes = (
        8 if inner else 32 for inner in (tiles["x_channels_inner"], tiles["y_channels_inner"])
    )
    return (
        one_per_thread("winograd_input", problem.in_channels, x_lanes),
        multiply,
        one_per_thread("winograd_output", problem.out_channels, y_lanes),
    )


def _frozen(tiles: Any) -> Any:
    copy = tiles.copy()
    copy.flags.writeable = False
    return copy


def _y_vector(problem: ConvProblem, layout: Layout, form: Form) -> bool:
    """Whether a tile's row of results lies together, at a multiple of its size."""
    n, k, h, w = layout.y
    return (
        w == 1
        and layout.alignment >= form.outputs * problem.y_dtype.itemsize
        and problem.output[1] % form.outputs == 0
        and all(
            stride % form.outputs == 0
            for stride, extent in zip(
                (n, k, h), (layout.batch, problem.out_channels, problem.output[0]), strict=True
            )
            if extent > 1
        )
    )


# ---- variants --------------------------------------------------------------------------------


def _macros(dtype: DType, index: str) -> Macros:
    types = launch.uniform_macros(dtype)
    return {name: types[name] for name in ("X_T", "W_T", "B_T", "Y_T")} | {"INDEX_T": index}


def _filter_macros(dtype: DType, form: Form) -> Macros:
    return {"W_T": dtype.name, "OUTPUTS": form.outputs, "BLOCK": _BLOCK}


def _pass_macros(stem: str, dtype: DType) -> Macros:
    types = launch.uniform_macros(dtype)
    names = ("X_T",) if stem == "winograd_input" else ("X_T", "W_T", "B_T", "Y_T")
    return {name: types[name] for name in names} | {"BLOCK": _BLOCK}


def variants() -> Iterator[tuple[str, Macros]]:
    """Per type: FUSED with both indices, the filters of both forms, two of the passes."""
    for dtype in TYPES:
        for index in ("int32", "int64"):
            yield "winograd", _macros(dtype, index)
        for form in (FUSED, PASSES):
            yield "winograd_filter", _filter_macros(dtype, form)
        for stem in ("winograd_input", "winograd_output"):
            yield stem, _pass_macros(stem, dtype)
    yield "winograd_multiply", {"STAGES": 3}
