"""What is measured: suites of rows, each with its source.

A row is one problem: an operation, shapes, options, element types, and how often a network asks for
it. Rows hold no arrays; ``Row.data`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from bench.networks import NETWORKS, Layer
from gpuconv import dtypes
from gpuconv.arrays import HostArray
from gpuconv.problem import ROLES, ConvProblem, Operation, describe, describe_transpose

OPERATIONS: tuple[Operation, ...] = tuple(ROLES)
Kind = Literal["network", "filter", "signal"]


@dataclass(frozen=True)
class Data:
    """The arrays of one row; `factors` where w is an outer product, w[0, 0] = u[:, None] * v.

    x and w are the first and the second array that the row's operation reads, as ``plan.Algorithm``
    has it: dy and w of dgrad, x and dy of wgrad.
    """

    x: HostArray
    w: HostArray
    factors: tuple[HostArray, HostArray] | None = None


@dataclass(frozen=True)
class Row:
    """One problem of a suite. All shapes are channels first, whatever memory a contestant uses.

    x_shape and w_shape are those of the forward pass, whose gradient dgrad and wgrad are.
    """

    suite: str
    name: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    x_dtype: str = "float32"
    w_dtype: str = "float32"
    precision: str = "ieee"
    separable: bool = False  # w has rank 1: a Gaussian
    count: int = 1  # how often the network has it
    operation: Operation = "fprop"
    transposed: bool = False  # conv_transpose: w is (C, K/groups, spatial...)

    @property
    def key(self) -> str:
        """What is the same row in another run."""
        name = self.name if self.operation == "fprop" else f"{self.name} {self.operation}"
        types = self.x_dtype if self.x_dtype == self.w_dtype else f"{self.x_dtype}*{self.w_dtype}"
        if self.precision != "ieee":
            types += f" {self.precision}"
        return f"{self.suite}/{name} n{self.x_shape[0]} {types}"

    @property
    def ndim(self) -> int:
        return len(self.w_shape) - 2

    @property
    def batch(self) -> int:
        return self.x_shape[0]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of gpuconv.conv2d, conv_transpose2d, grad.conv2d_input, ..."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "precision": self.precision,
        }

    @cached_property
    def problem(self) -> ConvProblem:
        """A transposed convolution's is dgrad, as gpuconv computes it."""
        shapes = self.x_shape, self.w_shape, self.x_dtype, self.w_dtype
        if self.transposed:
            return describe_transpose("bench", self.ndim, *shapes, **self.options)
        return describe("bench", self.ndim, *shapes, operation=self.operation, **self.options)

    @property
    def flops(self) -> int:
        """Of the direct sum; an algorithm that needs fewer may pass the machine's ceiling."""
        return self.problem.flops

    @property
    def bytes_moved(self) -> int:
        """Each operand read once, the result written once."""
        return self.problem.bytes_moved

    @property
    def single_plane(self) -> bool:
        """Whether it is one filter on one or more pictures: what image libraries can do."""
        forward = self.operation == "fprop" and not self.transposed
        return forward and self.x_shape[1] == 1 and self.w_shape[0] == 1

    @property
    def trained(self) -> bool:
        """Whether its gradients are measured, too: nobody learns a picture's one filter, and a
        transposed convolution's gradients are problems that other rows have."""
        return not (self.transposed or self.single_plane)

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two arrays that the operation reads."""
        first, second, _ = self.problem.roles
        return self.problem.shape_of(first), self.problem.shape_of(second)

    @property
    def images(self) -> tuple[bool, bool]:
        """Which of the two are images (or their gradients), and no filters."""
        first, second, _ = self.problem.roles
        return first != "w", second != "w"

    def data(self, seed: int = 0) -> Data:
        """Random arrays; data of zeros or ones would hide errors, and may run faster."""
        rng = np.random.default_rng([seed, *self.key.encode()])
        shapes = self.operand_shapes
        x = _random(rng, shapes[0], self.x_dtype)
        if not self.separable:
            return Data(x, _random(rng, shapes[1], self.w_dtype))
        u, v = (_gaussian(n).astype(self.w_dtype) for n in self.w_shape[2:])
        return Data(x, (u[:, None] * v).reshape(self.w_shape), (u, v))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> HostArray:
    kind = dtypes.of(dtype)
    if kind.is_exact:
        info = np.iinfo(kind.name)
        return rng.integers(info.min, info.max, shape, kind.numpy, endpoint=True)
    wide = rng.random(shape, np.float64 if kind.name == "float64" else np.float32)
    wide -= 0.5
    return wide.astype(kind.numpy, copy=False)


def _gaussian(size: int) -> HostArray:
    """As far as three standard deviations to each side."""
    i = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (i / (size / 6)) ** 2)
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class Suite:
    """A named list of rows."""

    name: str
    title: str
    source: str
    kind: Kind
    make: Callable[[tuple[int, ...]], list[Row]]  # of the batch sizes

    def rows(
        self,
        batches: Iterable[int] = (1, 32),
        dtype: str = "float32",
        precision: str = "ieee",
        operations: Iterable[Operation] = ("fprop",),
    ) -> list[Row]:
        """The rows, in `dtype` where the suite leaves it open; filters and signals have their own
        batch. A row's gradients follow it."""
        rows = []
        operations = tuple(operations)
        for row in self.make(tuple(batches)):
            if row.x_dtype == row.w_dtype:
                row = replace(row, x_dtype=dtype, w_dtype=dtype)
            elif dtype != "float32":  # a picture of bytes is filtered in float32
                continue
            row = replace(row, precision=precision if row.w_dtype == "float32" else "ieee")
            rows += [
                replace(row, operation=operation)
                for operation in operations
                if operation == "fprop" or row.trained
            ]
        return rows


# ---- networks --------------------------------------------------------------------------------


def distinct(suite: str, layers: list[Layer], batch: int) -> list[Row]:
    """The layers as rows, each problem once, named after its first layer and counted."""

    def w_shape(layer: Layer) -> tuple[int, ...]:
        outer, inner = layer.filters, layer.channels
        if layer.transposed:
            outer, inner = inner, outer
        return outer, inner // layer.groups, layer.filter, layer.filter

    counts: dict[Layer, int] = {}
    names: dict[Layer, str] = {}
    for layer in layers:
        shape = replace(layer, name="")
        names.setdefault(shape, layer.name)
        counts[shape] = counts.get(shape, 0) + 1
    return [
        Row(
            suite,
            names[layer],
            (batch, layer.channels, layer.height, layer.width),
            w_shape(layer),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            count=count,
            transposed=layer.transposed,
        )
        for layer, count in counts.items()
    ]


def _network(name: str) -> Suite:
    title, source, layers = NETWORKS[name]

    def make(batches: tuple[int, ...]) -> list[Row]:
        return [row for batch in batches for row in distinct(name, layers(), batch)]

    return Suite(name, title, source, "network", make)


# ---- pictures --------------------------------------------------------------------------------

PICTURE_SIZES = (512, 1024, 2048, 4096, 8192)
FILTER_SIZES = (3, 5, 7, 11, 15, 31, 63)


def _pictures(suite: str, separable: bool) -> Callable[[tuple[int, ...]], list[Row]]:
    def make(batches: tuple[int, ...]) -> list[Row]:
        return [
            Row(
                suite,
                f"{size}x{size} {filter}x{filter}",
                (1, 1, size, size),
                (1, 1, filter, filter),
                padding=filter // 2,
                x_dtype=x_dtype,
                separable=separable,
            )
            for x_dtype in ("float32", "uint8")
            for size in PICTURE_SIZES
            for filter in FILTER_SIZES
        ]

    return make


def _mnist(batches: tuple[int, ...]) -> list[Row]:
    def row(name: str, n: int, c: int, size: int, k: int, filter: int, padding: int) -> Row:
        x_shape, w_shape = (n, c, size, size), (k, c, filter, filter)
        return Row("mnist", name, x_shape, w_shape, padding=padding)

    return [
        row("one filter 3x3", 10000, 1, 28, 1, 3, 1),
        row("one filter 5x5", 10000, 1, 28, 1, 5, 2),
        row("one filter 7x7", 10000, 1, 28, 1, 7, 3),
        row("eight filters 3x3", 10000, 1, 28, 8, 3, 1),
        row("LeNet-5 C1", 1000, 1, 32, 6, 5, 0),
        row("LeNet-5 C3", 1000, 6, 14, 16, 5, 0),
    ]


# ---- 1-D -------------------------------------------------------------------------------------


def _audio(batches: tuple[int, ...]) -> list[Row]:
    rows = []
    samples, channels = 16000, 1  # one second
    for i, (taps, stride) in enumerate(((10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2)):
        shape = (1, channels, samples), (512, channels, taps)
        rows.append(Row("audio", f"wav2vec2 conv{i}", *shape, stride=stride))
        samples, channels = (samples - taps) // stride + 1, 512
    rows.append(
        Row("audio", "wav2vec2 position", (1, 768, 49), (768, 48, 128), padding=64, groups=16)
    )
    rows += [
        Row("audio", f"FIR {taps} taps, 10 s", (1, 1, 480000), (1, 1, taps), padding=taps // 2)
        for taps in (31, 101, 1023, 4095)
    ]
    return [
        replace(row, x_shape=(batch, *row.x_shape[1:]))
        for row in rows
        for batch in (batches if row.name.startswith("wav2vec2") else (1,))
    ]


def _small(batches: tuple[int, ...]) -> list[Row]:
    return [
        Row("small", "twice-dropped ball", (1, 1, 3), (1, 1, 3), padding=2),
        Row("small", "4x4 sobel", (1, 1, 4, 4), (1, 1, 3, 3)),
        Row("small", "28x28 3x3", (1, 1, 28, 28), (1, 1, 3, 3), padding=1),
        Row("small", "8 channels 14x14", (1, 8, 14, 14), (8, 8, 3, 3), padding=1),
    ]  # fmt: skip


# ---- a little of everything --------------------------------------------------------------------

_SAMPLE = (
    # Ordered so that a run cut short has seen every kind of problem once.
    "resnet50/layer1.0.conv2", "gaussian/4096x4096 15x15", "filters/4096x4096 7x7",
    "mobilenetv2/block2.depthwise", "resnet50/layer1.0.conv1", "resnet50/conv1",
    "convnext_t/stage2.0.depthwise", "mnist/one filter 5x5", "audio/FIR 101 taps, 10 s",
    "resnext50/layer2.1.conv2", "replknet31b/stage2.0.large", "vgg16/conv3_2",
    "aspp/os16.rate12", "unet/up2.upconv", "sdxl/down1.0.conv2", "unet/down1.1", "dcgan/conv3",
    "filters/4096x4096 3x3",
    "filters/2048x2048 31x31", "efficientnet_b0/block4.depthwise", "mobilenetv2/block2.expand",
    "resnet50/layer2.0.conv2", "resnet50/layer3.1.conv2", "resnet50/layer4.1.conv2",
    "convnext_t/stage3.0.expand", "replknet31b/stage1.0.large", "audio/wav2vec2 conv1",
    "small/28x28 3x3", "vgg16/conv1_2", "filters/1024x1024 63x63", "gaussian/2048x2048 63x63",
)  # fmt: skip


def _sample(batches: tuple[int, ...]) -> list[Row]:
    found: dict[str, list[Row]] = {}
    for suite in SUITES.values():
        if suite.name != "sample":
            for row in suite.make(batches):
                if row.x_dtype == row.w_dtype:
                    found.setdefault(f"{row.suite}/{row.name}", []).append(row)
    return [
        replace(row, suite="sample", name=name, count=1) for name in _SAMPLE for row in found[name]
    ]


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        *map(_network, NETWORKS),
        Suite(
            "filters",
            "Pictures under one dense filter",
            "square pictures of 512 to 8192 under filters of 3 to 63, zeros beyond the edge",
            "filter",
            _pictures("filters", separable=False),
        ),
        Suite(
            "gaussian",
            "Pictures under a Gaussian",
            "the same, with a filter of rank 1 that is given as a full one",
            "filter",
            _pictures("gaussian", separable=True),
        ),
        Suite(
            "mnist",
            "Stacks of small pictures",
            "the MNIST test set under one filter and eight; LeNet-5 (LeCun et al. 1998), figure 2",
            "filter",
            _mnist,
        ),
        Suite(
            "audio",
            "1-D: audio",
            "wav2vec 2.0 (arXiv 2006.11477), sections 2 and 4.2, on a second of 16 kHz; "
            "FIR filters on ten seconds of 48 kHz",
            "signal",
            _audio,
        ),
        Suite(
            "small",
            "The smallest: what a call costs",
            "the dropped ball of README, and what fits a cache line or two",
            "signal",
            _small,
        ),
        Suite(
            "sample",
            "A little of everything",
            "rows of the other suites",
            "network",
            _sample,
        ),
    )
}

QUICK = ("resnet50", "mobilenetv2", "filters", "audio", "small")  # what --quick measures


def select(
    names: Iterable[str] | None,
    *,
    batches: Iterable[int] = (1, 32),
    dtype: str = "float32",
    precision: str = "ieee",
    operations: Iterable[Operation] = ("fprop",),
    contains: Iterable[str] = ("",),
    quick: bool = False,
) -> dict[str, list[Row]]:
    """The rows of the named suites (all but the sample where none is named) that match: whose key
    has one of the texts of `contains`."""
    if names is None:
        names = QUICK if quick else [name for name in SUITES if name != "sample"]
    chosen, texts = {}, tuple(contains)
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite is one of {', '.join(SUITES)}; got {name!r}")
        rows = SUITES[name].rows(batches, dtype, precision, operations)
        rows = [row for row in rows if any(text in row.key for text in texts)]
        if quick:  # what a laptop does in the blink of an eye
            rows = [row for row in rows if row.flops < 8e9 and math.prod(row.x_shape) < 1 << 22]
        if rows:
            chosen[name] = rows
    return chosen
