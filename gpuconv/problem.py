"""One convolution problem: what is asked, described once and validated once.

The letters are those of the field: N batch, C and K input and output channels, G groups,
D H W the input's extents, T R S the filter's, Z P Q the output's. A problem holds shapes, dtypes
and options, never arrays; it is frozen and hashable, so plans can be cached by it.

The shapes are always those of the forward convolution ``y = conv(x, w)``. ``operation`` says which
of the three arrays is the result, computed from the other two: ``fprop`` y, ``dgrad`` x's gradient
(from y's and w), ``wgrad`` w's (from x and y's). They are adjoint to each other:

    <fprop(x, w), y> = <x, dgrad(y, w)> = <w, wgrad(x, y)>

over complex numbers with ``conjugate``, as gradients are taken (torch's convention, with which a
step against the gradient descends): dgrad multiplies by w's conjugate, wgrad by x's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from gpuconv import dtypes
from gpuconv.dtypes import DType

Operation = Literal["fprop", "dgrad", "wgrad"]
PaddingMode = Literal["zeros", "reflect", "symmetric", "replicate", "circular"]
Precision = Literal["ieee", "tf32", "tf32x3"]
Extents = tuple[int, ...]

PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)
PRECISIONS: tuple[str, ...] = get_args(Precision)
PADDING_NAMES = ("valid", "full", "same", "same_lower")
LAYOUTS = {1: ("NCW", "NWC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
_LARGEST = 2**63 - 1  # what an index of NumPy holds
AXIS_NAMES = {1: "W", 2: "HW", 3: "DHW"}
# Which arrays an operation reads, and which it writes, in the letters of the forward convolution.
ROLES: dict[Operation, tuple[str, str, str]] = {
    "fprop": ("x", "w", "y"),
    "dgrad": ("y", "w", "x"),
    "wgrad": ("x", "y", "w"),
}


@dataclass(frozen=True)
class ConvProblem:
    """A convolution, without its arrays.

    All extents are tuples with one entry per spatial axis (1 to 3 of them), in the order D, H, W.
    """

    input: Extents
    filter: Extents
    batch: int = 1
    in_channels: int = 1
    out_channels: int = 1
    groups: int = 1
    stride: Extents = ()
    dilation: Extents = ()
    pad_lo: Extents = ()
    pad_hi: Extents = ()
    padding_mode: PaddingMode = "zeros"
    operation: Operation = "fprop"
    flip: bool = False  # True: convolution, f(a) g(c-a); False: correlation
    conjugate: bool = False  # of gradients: dgrad multiplies by conj(w), wgrad by conj(x)
    x_dtype: DType = dtypes.FLOAT32
    w_dtype: DType = dtypes.FLOAT32
    y_dtype: DType = dtypes.FLOAT32
    accumulator: DType = dtypes.FLOAT32
    bias: DType | None = None  # the dtype of the bias, where there is one
    precision: Precision = "ieee"
    workspace_limit: int | None = None
    layout: str = "NCHW"  # how the caller's shapes are written
    channels_last: bool = False  # the memory order expected of x and y
    batched: bool = True  # False: the caller's x and y have no N
    output: Extents = field(init=False)

    def __post_init__(self) -> None:
        ndim = len(self.input)
        for name in ("stride", "dilation"):
            if not getattr(self, name):
                object.__setattr__(self, name, (1,) * ndim)
        for name in ("pad_lo", "pad_hi"):
            if not getattr(self, name):
                object.__setattr__(self, name, (0,) * ndim)
        extents = map(
            output_extent,
            self.input,
            self.filter,
            self.stride,
            self.pad_lo,
            self.pad_hi,
            self.dilation,
        )
        object.__setattr__(self, "output", tuple(extents))
        # A problem is hashed at every call (plans are cached by it): pay for its many fields once.
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f) for f in _HASHED)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes of strings are another process's own: what is kept of them must not travel.
        return type(self), tuple(getattr(self, f) for f in _HASHED)

    @property
    def ndim(self) -> int:
        """The number of spatial axes, 1 to 3."""
        return len(self.input)

    @property
    def x_shape(self) -> Extents:
        """(N, C, spatial...), whatever the layout."""
        return (self.batch, self.in_channels, *self.input)

    @property
    def w_shape(self) -> Extents:
        """(K, C/G, spatial...)."""
        return (self.out_channels, self.in_channels // self.groups, *self.filter)

    @property
    def y_shape(self) -> Extents:
        """(N, K, spatial...), whatever the layout."""
        return (self.batch, self.out_channels, *self.output)

    @property
    def roles(self) -> tuple[str, str, str]:
        """Which of x, w and y are the first operand, the second, and the result."""
        return ROLES[self.operation]

    def shape_of(self, role: str) -> Extents:
        """The shape of "x", "w" or "y", channels first."""
        return {"x": self.x_shape, "w": self.w_shape, "y": self.y_shape}[role]

    def dtype_of(self, role: str) -> DType:
        """The dtype of "x", "w" or "y"."""
        return {"x": self.x_dtype, "w": self.w_dtype, "y": self.y_dtype}[role]

    @property
    def result_shape(self) -> Extents:
        """The shape of what the operation computes, channels first."""
        return self.shape_of(self.roles[2])

    @property
    def result_dtype(self) -> DType:
        """The dtype of what the operation computes."""
        return self.dtype_of(self.roles[2])

    def workspace_within(self, cap: int) -> int:
        """Bytes of scratch memory an algorithm may use: `cap`, or the caller's lower limit."""
        return cap if self.workspace_limit is None else min(cap, self.workspace_limit)

    @property
    def bias_channels(self) -> int:
        """How many elements a bias has: one per channel of the result."""
        return self.in_channels if self.operation == "dgrad" else self.out_channels

    @property
    def group_in_channels(self) -> int:
        """C/G, the input channels that one output channel sees."""
        return self.in_channels // self.groups

    @property
    def group_out_channels(self) -> int:
        """K/G."""
        return self.out_channels // self.groups

    @property
    def depthwise(self) -> bool:
        """Every output channel sees one input channel (a channel multiplier K/C is allowed)."""
        return self.group_in_channels == 1

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read or nothing to write."""
        return 0 in self.x_shape or 0 in self.w_shape or 0 in self.y_shape

    @property
    def padded(self) -> bool:
        """Whether any window reaches over an edge."""
        return any(self.pad_lo) or any(self.pad_hi)

    @property
    def reduction(self) -> int:
        """The number of products summed into one result element."""
        taps = math.prod(self.filter)
        if self.operation == "fprop":
            return self.group_in_channels * taps
        if self.operation == "dgrad":
            return self.group_out_channels * taps
        return self.batch * math.prod(self.output)

    @property
    def flops(self) -> int:
        """Real multiplications and additions of the direct sum (a complex product counts 8)."""
        products = math.prod(self.y_shape) * self.group_in_channels * math.prod(self.filter)
        return products * (8 if self.accumulator.is_complex else 2)

    @property
    def bytes_moved(self) -> int:
        """Bytes that any algorithm must move: each operand read once, the result written once."""
        return (
            math.prod(self.x_shape) * self.x_dtype.itemsize
            + math.prod(self.w_shape) * self.w_dtype.itemsize
            + math.prod(self.y_shape) * self.y_dtype.itemsize
            + (self.bias_channels * self.bias.itemsize if self.bias else 0)
        )

    def __str__(self) -> str:
        layout = LAYOUTS[self.ndim][self.channels_last]
        text = (
            f"{self.operation} {self.ndim}-D {layout} {self.result_dtype}"
            f" {self._named(0)} {self._named(1)} -> {self._named(2)}"
        )
        if any(s != 1 for s in self.stride):
            text += f" stride={_short(self.stride)}"
        if any(d != 1 for d in self.dilation):
            text += f" dilation={_short(self.dilation)}"
        if self.padded:
            pads = tuple(zip(self.pad_lo, self.pad_hi, strict=True))
            text += f" padding={_short(tuple(lo if lo == hi else (lo, hi) for lo, hi in pads))}"
            text += f" ({self.padding_mode})"
        if self.groups != 1:
            text += f" groups={self.groups}"
        if self.bias:
            text += " bias"
        if self.flip:
            text += " flipped"
        if self.conjugate and self.accumulator.is_complex:
            text += " conjugate"
        if self.accumulator != self.result_dtype:
            text += f" accumulate={self.accumulator}"
        if self.precision != "ieee":
            text += f" precision={self.precision}"
        return text

    def _named(self, operand: int) -> str:
        role = self.roles[operand]
        gradient = self.operation != "fprop" and (role == "y" or operand == 2)
        return ("d" if gradient else "") + role + _brackets(self.shape_of(role))


_HASHED = tuple(f for f in ConvProblem.__dataclass_fields__ if f != "output")


def _brackets(shape: Extents) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _short(values: tuple[Any, ...]) -> str:
    """One value where all axes have the same."""
    return str(values[0] if len(set(values)) == 1 else values)


def output_extent(
    extent: int, filter_extent: int, stride: int, pad_lo: int, pad_hi: int, dilation: int
) -> int:
    """``(in + pad_lo + pad_hi - dilation*(filter-1) - 1) // stride + 1``, the output's extent."""
    return (extent + pad_lo + pad_hi - dilation * (filter_extent - 1) - 1) // stride + 1


def describe(
    function: str,
    ndim: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    x_dtype: Any,
    w_dtype: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    padding_mode: Any = "zeros",
    layout: Any = None,
    dtype: Any = None,
    precision: Any = "ieee",
    workspace_limit: Any = None,
    bias: Any = None,
    flip: bool = False,
    channels_last: bool | None = None,
    operation: Operation = "fprop",
    conjugate: bool = True,
    names: tuple[str, str] = ("x", "w"),
) -> ConvProblem:
    """Validate what the caller of `function` asked and normalise it to a problem.

    The shapes are the forward convolution's; `x_dtype` and `w_dtype` are those of the first and the
    second array that `operation` reads (``ROLES``). `names` are the function's words for the two
    shapes. `channels_last` is the memory order of the images where it is not the one that `layout`
    names; `bias` is the bias's dtype, or True for the result's own.
    Every error names `function` and the argument, what came, and what would do.
    """
    check = _Check(function, ndim, names)
    layout = check.layout(layout)
    batch, channels, extents, batched = check.x_shape(x_shape, layout)
    out_channels, group_channels, filter_extents = check.w_shape(w_shape)
    groups = check.integer("groups", groups, minimum=1)
    check.channels(channels, out_channels, group_channels, groups, w_shape)
    stride = check.per_axis("stride", stride)
    dilation = check.per_axis("dilation", dilation)
    pads = check.padding(padding, extents, filter_extents, stride, dilation)
    padding_mode = check.choice("padding_mode", padding_mode, PADDING_MODES)
    check.boundary(padding_mode, extents, pads)
    check.output(extents, filter_extents, stride, pads, dilation)
    check.choice("operation", operation, tuple(ROLES))
    roles = ROLES[operation]
    first, second = (
        check.dtype("grad_output" if role == "y" else role, given)
        for role, given in zip(roles, (x_dtype, w_dtype), strict=False)
    )
    result, accumulator = check.result_dtype(first, second, dtype)
    types = dict(zip(roles, (first, second, result), strict=True))
    if workspace_limit is not None:
        workspace_limit = check.integer("workspace_limit", workspace_limit, minimum=0)
    return ConvProblem(
        input=extents,
        filter=filter_extents,
        batch=batch,
        in_channels=channels,
        out_channels=out_channels,
        groups=groups,
        stride=stride,
        dilation=dilation,
        pad_lo=tuple(lo for lo, _ in pads),
        pad_hi=tuple(hi for _, hi in pads),
        padding_mode=padding_mode,
        operation=operation,
        flip=flip,
        conjugate=conjugate and operation != "fprop",
        x_dtype=types["x"],
        w_dtype=types["w"],
        y_dtype=types["y"],
        accumulator=accumulator,
        bias=None if bias is None else check.bias_dtype(bias, result, accumulator),
        precision=check.choice("precision", precision, PRECISIONS),
        workspace_limit=workspace_limit,
        layout=layout,
        channels_last=layout.endswith("C") if channels_last is None else channels_last,
        batched=batched,
    )


def describe_transpose(
    function: str,
    ndim: int,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    x_dtype: Any,
    w_dtype: Any,
    *,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    layout: Any = None,
    dtype: Any = None,
    precision: Any = "ieee",
    workspace_limit: Any = None,
    bias: Any = None,
    channels_last: bool | None = None,
) -> ConvProblem:
    """The transposed convolution of x under w, (C, K/groups, spatial...), as a dgrad problem.

    It is the adjoint of the forward convolution that has these options and gives a result of x's
    extents: the result is that one's input. `output_padding` says which of the inputs with such a
    result, where a stride leaves several.
    """
    check = _Check(function, ndim, ("x", "w"), transposed=True)
    layout = check.layout(layout)
    batch, channels, extents, batched = check.x_shape(x_shape, layout)
    w_channels, group_out, filters = check.w_shape(w_shape)
    groups = check.integer("groups", groups, minimum=1)
    if channels != w_channels:
        raise check.value_error(
            f"x has {channels} channels but w {tuple(w_shape)} takes {w_channels}; w is "
            f"(C, K/groups, ...) here"
        )
    if channels % groups:
        raise check.value_error(f"x has {channels} channels, which groups={groups} does not divide")
    stride = check.per_axis("stride", stride)
    dilation = check.per_axis("dilation", dilation)
    extra = check.per_axis("output_padding", output_padding, minimum=0)
    for axis, e, s, d in zip(AXIS_NAMES[ndim], extra, stride, dilation, strict=True):
        if e and e >= max(s, d):
            raise check.value_error(
                f"output_padding is less than stride or dilation; got {e} along {axis}, where "
                f"stride is {s} and dilation {d}"
            )
    same = padding in ("same", "same_lower")
    if same and any(extra):
        raise check.value_error(
            f"padding={padding!r} makes the result stride times as large as x, which leaves no "
            f"output_padding to choose; got output_padding={output_padding!r}"
        )
    results = tuple(n * s for n, s in zip(extents, stride, strict=True))
    pads = check.padding(padding, results, filters, stride, dilation)
    if not same:
        results = tuple(
            (n - 1) * s - lo - hi + d * (f - 1) + e + 1
            for n, s, (lo, hi), d, f, e in zip(
                extents, stride, pads, dilation, filters, extra, strict=True
            )
        )
        for axis, n, s, (lo, hi), d, f, e, out in zip(
            AXIS_NAMES[ndim], extents, stride, pads, dilation, filters, extra, results, strict=True
        ):
            if out < 1:
                raise check.value_error(
                    f"the output would be empty along {axis}: (in - 1)*stride - pad_lo - pad_hi + "
                    f"dilation*(filter-1) + output_padding + 1 = ({n} - 1)*{s} - {lo} - {hi} + "
                    f"{d}*({f}-1) + {e} + 1 = {out}; less padding would do"
                )
    x_type, w_type = check.dtype("x", x_dtype), check.dtype("w", w_dtype)
    result, accumulator = check.result_dtype(x_type, w_type, dtype)
    if workspace_limit is not None:
        workspace_limit = check.integer("workspace_limit", workspace_limit, minimum=0)
    return ConvProblem(
        input=results,
        filter=filters,
        batch=batch,
        in_channels=group_out * groups,
        out_channels=channels,
        groups=groups,
        stride=stride,
        dilation=dilation,
        pad_lo=tuple(lo for lo, _ in pads),
        # Where the extra output is a stride or more, the forward convolution would take one window
        # more than x has elements: what lies at the end is no part of its input.
        pad_hi=tuple(
            hi - max(e - s + 1, 0) for (_, hi), e, s in zip(pads, extra, stride, strict=True)
        ),
        operation="dgrad",
        x_dtype=result,
        w_dtype=w_type,
        y_dtype=x_type,
        accumulator=accumulator,
        bias=None if bias is None else check.bias_dtype(bias, result, accumulator),
        precision=check.choice("precision", precision, PRECISIONS),
        workspace_limit=workspace_limit,
        layout=layout,
        channels_last=layout.endswith("C") if channels_last is None else channels_last,
        batched=batched,
    )


def as_shape(function: str, name: str, shape: Any) -> Extents:
    """The caller's `shape` as a tuple; its entries are checked by ``describe``."""
    own = getattr(shape, "shape", None)
    if isinstance(own, tuple) and len(own) != 1:  # the array in place of its shape
        raise TypeError(
            f"{function}: {name} takes a sequence of integers, got an array of shape "
            f"{tuple(own)}; its .shape would do"
        )
    try:
        return tuple(shape)
    except TypeError:
        raise TypeError(
            f"{function}: {name} takes a sequence of integers, got {shape!r} "
            f"({type(shape).__name__})"
        ) from None


def freeze(function: str, name: str, value: Any) -> Any:
    """The option `value` with every list a tuple and every integer an int: hashable, comparable.

    Plans are cached by their options, and ``1 == 1.0 == True``: what is no integer must be refused
    before the cache is asked, or 1.5 would be told apart from 1 but 1.0 would not.
    """
    if type(value) is int or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(freeze(function, name, v) for v in value)
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        wanted = "integers" if name != "padding" else "integers or one of the names of padding"
        raise TypeError(
            f"{function}: {name} takes {wanted}, got {value!r} ({type(value).__name__})"
        ) from None


class _Check:
    """The argument checks of one public function, each ending in a value or a clear error."""

    def __init__(
        self,
        function: str,
        ndim: int,
        names: tuple[str, str] = ("x", "w"),
        transposed: bool = False,
    ) -> None:
        self.function = function
        self.ndim = ndim
        self.x, self.w = names
        self.filters = "(C, K/groups, " if transposed else "(K, C/groups, "

    @staticmethod
    def _is(name: str, values: Extents) -> str:
        return f"{name} is {values}" if name.endswith("shape") else f"{name} has shape {values}"

    def value_error(self, text: str) -> ValueError:
        return ValueError(f"{self.function}: {text}")

    def type_error(self, text: str) -> TypeError:
        return TypeError(f"{self.function}: {text}")

    def choice(self, name: str, value: Any, choices: Sequence[str]) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise self.value_error(f"{name} is one of {', '.join(choices)}; got {value!r}")
        return value

    def layout(self, layout: Any) -> str:
        layouts = LAYOUTS[self.ndim]
        return layouts[0] if layout is None else str(self.choice("layout", layout, layouts))

    def shape(self, name: str, shape: Sequence[int]) -> Extents:
        whole = name if name.endswith("shape") else f"{name}'s shape"
        values = tuple(self.integer(whole, n, minimum=0) for n in shape)
        return values

    def x_shape(self, shape: Sequence[int], layout: str) -> tuple[int, int, Extents, bool]:
        values = self.shape(self.x, shape)
        if len(values) not in (self.ndim + 1, self.ndim + 2):
            raise self.value_error(
                f"{self._is(self.x, values)}, {len(values)}-D; it takes ({', '.join(layout)}), or "
                f"({', '.join(layout[1:])}) for one without a batch"
            )
        batched = len(values) == self.ndim + 2
        batch, rest = (values[0], values[1:]) if batched else (1, values)
        if layout.endswith("C"):
            return batch, rest[-1], rest[:-1], batched
        return batch, rest[0], rest[1:], batched

    def w_shape(self, shape: Sequence[int]) -> tuple[int, int, Extents]:
        values = self.shape(self.w, shape)
        if len(values) != self.ndim + 2:
            letters = ", ".join("TRS"[3 - self.ndim :]) if self.ndim > 1 else "S"
            raise self.value_error(
                f"{self._is(self.w, values)}, {len(values)}-D; it takes {self.filters}{letters})"
            )
        if 0 in values[2:]:
            raise self.value_error(f"{self._is(self.w, values)}; a filter's extents are at least 1")
        return values[0], values[1], values[2:]

    def channels(
        self, channels: int, out_channels: int, group_channels: int, groups: int, w_shape: Extents
    ) -> None:
        if channels != group_channels * groups:
            raise self.value_error(
                f"{self.x} has {channels} channels but {self.w} {tuple(w_shape)} with "
                f"groups={groups} "
                f"needs {group_channels * groups}"
            )
        if out_channels % groups:
            raise self.value_error(
                f"{self.w} {tuple(w_shape)} has {out_channels} output channels, which "
                f"groups={groups} "
                f"does not divide"
            )

    def integer(self, name: str, value: Any, *, minimum: int) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise self.type_error(
                f"{name} takes an integer, got {value!r} ({type(value).__name__})"
            ) from None
        if number < minimum:
            raise self.value_error(f"{name} is at least {minimum}; got {number}")
        if number > _LARGEST:
            raise self.value_error(f"{name} is less than 2^63; got {number}")
        return number

    def per_axis(self, name: str, value: Any, minimum: int = 1) -> Extents:
        if not isinstance(value, tuple):
            return (self.integer(name, value, minimum=minimum),) * self.ndim
        if len(value) != self.ndim:
            raise self.value_error(
                f"{name} takes one integer, or {self.ndim} for the axes {self.axes}; got {value!r}"
            )
        return tuple(self.integer(name, v, minimum=minimum) for v in value)

    @property
    def axes(self) -> str:
        return ", ".join(AXIS_NAMES[self.ndim])

    def padding(
        self, padding: Any, extents: Extents, filters: Extents, stride: Extents, dilation: Extents
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(padding, str):
            self.choice("padding", padding, PADDING_NAMES)
            spans = tuple(d * (f - 1) for f, d in zip(filters, dilation, strict=True))
            if padding == "valid":
                return ((0, 0),) * self.ndim
            if padding == "full":
                return tuple((span, span) for span in spans)
            pads = []
            for extent, span, step in zip(extents, spans, stride, strict=True):
                total = max((-(-extent // step) - 1) * step + span + 1 - extent, 0)
                less, more = total // 2, total - total // 2
                pads.append((less, more) if padding == "same" else (more, less))
            return tuple(pads)
        values = padding if isinstance(padding, tuple) else (padding,) * self.ndim
        forms = (
            f"one integer, {self.ndim} integers, {self.ndim} pairs (before, after) for the axes "
            f"{self.axes}, or one of {', '.join(PADDING_NAMES)}"
        )
        if len(values) != self.ndim:
            raise self.value_error(f"padding takes {forms}; got {padding!r}")
        pairs = tuple(v if isinstance(v, tuple) else (v, v) for v in values)
        if any(len(pair) != 2 or not all(isinstance(v, int) for v in pair) for pair in pairs):
            raise self.value_error(f"padding takes {forms}; got {padding!r}")
        if any(v < 0 for pair in pairs for v in pair):
            raise self.value_error(f"padding is at least 0; got {padding!r}")
        if any(v > _LARGEST for pair in pairs for v in pair):
            raise self.value_error(f"padding is less than 2^63; got {padding!r}")
        return pairs

    def boundary(
        self, padding_mode: str, extents: Extents, pads: tuple[tuple[int, int], ...]
    ) -> None:
        if padding_mode == "zeros":
            return
        for axis, extent, pair in zip(AXIS_NAMES[self.ndim], extents, pads, strict=True):
            if extent == 0 and any(pair):
                raise self.value_error(
                    f"padding_mode={padding_mode!r} has nothing to repeat along {axis}, where x is "
                    f"empty; padding_mode='zeros' would do"
                )

    def output(
        self,
        extents: Extents,
        filters: Extents,
        stride: Extents,
        pads: tuple[tuple[int, int], ...],
        dilation: Extents,
    ) -> None:
        names = AXIS_NAMES[self.ndim]
        for axis, n, f, s, (lo, hi), d in zip(
            names, extents, filters, stride, pads, dilation, strict=True
        ):
            out = output_extent(n, f, s, lo, hi, d)
            if out < 1:
                raise self.value_error(
                    f"the output would be empty along {axis}: "
                    f"(in + pad_lo + pad_hi - dilation*(filter-1) - 1) // stride + 1 = "
                    f"({n} + {lo} + {hi} - {d}*({f}-1) - 1) // {s} + 1 = {out}; "
                    f"a smaller filter or more padding would do"
                )

    def dtype(self, name: str, dtype: Any) -> DType:
        if not isinstance(dtype, Hashable):
            raise self.type_error(f"{name} takes a dtype or its name, got {dtype!r}")
        try:
            return dtypes.of(dtype)
        except TypeError as error:
            raise self.type_error(f"{name}: {error}") from None

    def result_dtype(self, x: DType, w: DType, asked: Any) -> tuple[DType, DType]:
        try:
            natural = dtypes.natural_result(x, w)
            if asked is None:
                return natural, dtypes.accumulator(natural)
            wanted = self.dtype("dtype", asked)
            accumulator = dtypes.sum_type(x, w, wanted)
        except TypeError as error:
            text = str(error)
            prefix = f"{self.function}: "
            raise self.type_error(text.removeprefix(prefix)) from None
        if not dtypes.can_convert(natural, wanted):
            raise self.type_error(
                f"dtype={wanted} cannot hold a result of x {x} and w {w} ({natural}); "
                f"convert the result yourself, or ask for a floating or complex type"
            )
        return wanted, accumulator

    def bias_dtype(self, bias: Any, y: DType, accumulator: DType) -> DType:
        dtype = y if bias is True else self.dtype("bias", bias)
        if not dtypes.can_convert(dtype, accumulator):
            raise self.type_error(
                f"bias is {dtype}, which a sum in {accumulator} cannot take in; convert it first"
            )
        return dtype
