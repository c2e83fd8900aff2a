"""Problems: the output formula, every padding form, and every message for what does not fit."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv import dtypes
from gpuconv.problem import ConvProblem, describe, freeze, output_extent


def problem_of(x=(2, 3, 8, 9), w=(4, 3, 3, 3), x_dtype="float32", w_dtype="float32", **options):
    return describe("conv2d", 2, x, w, x_dtype, w_dtype, **options)


extents = st.integers(1, 30)


@given(extents, st.integers(1, 6), st.integers(1, 4), st.integers(0, 6), st.integers(0, 6), extents)
def test_output_extent_counts_the_places_where_the_filter_fits(n, f, s, lo, hi, d):
    d = 1 + d % 3
    first_taps = [p for p in range(0, lo + n + hi, s) if p + d * (f - 1) < lo + n + hi]
    assert max(output_extent(n, f, s, lo, hi, d), 0) == len(first_taps)


@given(extents, st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_same_gives_ceil_of_extent_over_stride_with_the_odd_pixel_at_the_end(n, f, s, d):
    at_end = describe(
        "conv1d", 1, (1, 1, n), (1, 1, f), "float32", "float32",
        padding="same", stride=s, dilation=d,
    )  # fmt: skip
    at_start = describe(
        "conv1d", 1, (1, 1, n), (1, 1, f), "float32", "float32",
        padding="same_lower", stride=s, dilation=d,
    )  # fmt: skip
    assert at_end.output == at_start.output == (math.ceil(n / s),)
    (lo,), (hi,) = at_end.pad_lo, at_end.pad_hi
    assert hi - lo in (0, 1)
    assert (at_start.pad_lo, at_start.pad_hi) == ((hi,), (lo,))


def test_every_form_of_padding():
    def pads(padding):
        p = problem_of(padding=padding, dilation=(1, 2))
        return p.pad_lo, p.pad_hi

    assert pads(0) == pads("valid") == ((0, 0), (0, 0))
    assert pads(2) == ((2, 2), (2, 2))
    assert pads((1, 2)) == ((1, 2), (1, 2))
    assert pads(((0, 1), (2, 3))) == ((0, 2), (1, 3))
    assert pads("full") == ((2, 4), (2, 4))
    assert pads("same") == ((1, 2), (1, 2))


def test_shapes_in_every_layout():
    first = problem_of((2, 3, 8, 9))
    last = problem_of((2, 8, 9, 3), layout="NHWC")
    assert first.x_shape == last.x_shape == (2, 3, 8, 9)
    assert first.y_shape == last.y_shape == (2, 4, 6, 7)
    assert (first.channels_last, last.channels_last) == (False, True)
    alone = problem_of((3, 8, 9))
    assert alone.x_shape == (1, 3, 8, 9)
    assert not alone.batched


def test_counts_of_work():
    p = problem_of(groups=1, bias=True)
    assert p.flops == 2 * 4 * 6 * 7 * 3 * 9 * 2
    assert p.bytes_moved == 4 * (2 * 3 * 8 * 9 + 4 * 27 + 2 * 4 * 6 * 7 + 4)
    assert p.reduction == 27
    assert problem_of(x_dtype="complex64").flops == 4 * p.flops


def test_a_problem_is_a_value():
    a, b = problem_of(padding=1), problem_of(padding=(1, 1))
    assert a == b
    assert hash(a) == hash(b)
    assert a != problem_of(padding=1, padding_mode="circular")
    with pytest.raises(AttributeError):
        a.groups = 2
    text = str(problem_of(padding=1, stride=2, dilation=(1, 2), groups=1, bias=True))
    for word in ("fprop", "2-D", "NCHW", "[2,3,8,9]", "stride=2", "dilation=(1, 2)", "bias"):
        assert word in text


def test_gradients_have_their_own_result():
    p = problem_of()
    grad = ConvProblem(**{**_fields(p), "operation": "dgrad"})
    assert grad.result_shape == p.x_shape
    assert grad.reduction == 4 * 9
    weight = ConvProblem(**{**_fields(p), "operation": "wgrad"})
    assert weight.result_shape == p.w_shape
    assert weight.reduction == 2 * 6 * 7


def _fields(p):
    return {n: getattr(p, n) for n, f in p.__dataclass_fields__.items() if f.init}


MESSAGES = [
    ({"w": (64, 4, 3, 3)}, ValueError,
     "conv2d: x has 3 channels but w (64, 4, 3, 3) with groups=1 needs 4"),
    ({"x": (2, 4, 8, 9), "w": (3, 2, 3, 3), "groups": 2}, ValueError,
     "conv2d: w (3, 2, 3, 3) has 3 output channels, which groups=2 does not divide"),
    ({"x": (8, 9)}, ValueError,
     "conv2d: x has shape (8, 9), 2-D; it takes (N, C, H, W), or (C, H, W) for one without a "
     "batch"),
    ({"w": (4, 3, 3)}, ValueError,
     "conv2d: w has shape (4, 3, 3), 3-D; it takes (K, C/groups, R, S)"),
    ({"w": (4, 3, 0, 3)}, ValueError,
     "conv2d: w has shape (4, 3, 0, 3); a filter's extents are at least 1"),
    ({"w": (4, 3, 9, 3)}, ValueError,
     "conv2d: the output would be empty along H: (in + pad_lo + pad_hi - dilation*(filter-1) - 1) "
     "// stride + 1 = (8 + 0 + 0 - 1*(9-1) - 1) // 1 + 1 = 0; a smaller filter or more padding "
     "would do"),
    ({"stride": 0}, ValueError, "conv2d: stride is at least 1; got 0"),
    ({"stride": (1, 1, 1)}, ValueError,
     "conv2d: stride takes one integer, or 2 for the axes H, W; got (1, 1, 1)"),
    ({"dilation": -1}, ValueError, "conv2d: dilation is at least 1; got -1"),
    ({"groups": 0}, ValueError, "conv2d: groups is at least 1; got 0"),
    ({"groups": 1.5}, TypeError, "conv2d: groups takes an integer, got 1.5 (float)"),
    ({"groups": True}, TypeError, "conv2d: groups takes an integer, got True (bool)"),
    ({"workspace_limit": True}, TypeError, "conv2d: workspace_limit takes an integer, got True"),
    ({"stride": 2**63}, ValueError, f"conv2d: stride is less than 2^63; got {2**63}"),
    ({"dilation": (1, 2**70)}, ValueError, f"conv2d: dilation is less than 2^63; got {2**70}"),
    ({"padding": ((0, 2**63), 0)}, ValueError,
     f"conv2d: padding is less than 2^63; got ((0, {2**63}), 0)"),
    ({"padding": -1}, ValueError, "conv2d: padding is at least 0; got -1"),
    ({"padding": "some"}, ValueError,
     "conv2d: padding is one of valid, full, same, same_lower; got 'some'"),
    ({"padding": (1, 2, 3)}, ValueError,
     "conv2d: padding takes one integer, 2 integers, 2 pairs (before, after) for the axes H, W, or "
     "one of valid, full, same, same_lower; got (1, 2, 3)"),
    ({"padding": ((1, 2, 3), 0)}, ValueError,
     "conv2d: padding takes one integer, 2 integers, 2 pairs (before, after) for the axes H, W, or "
     "one of valid, full, same, same_lower; got ((1, 2, 3), 0)"),
    ({"padding_mode": "mirror"}, ValueError,
     "conv2d: padding_mode is one of zeros, reflect, symmetric, replicate, circular; got 'mirror'"),
    ({"x": (1, 3, 0, 9), "padding": 2, "padding_mode": "reflect"}, ValueError,
     "conv2d: padding_mode='reflect' has nothing to repeat along H, where x is empty; "
     "padding_mode='zeros' would do"),
    ({"layout": "CHWN"}, ValueError, "conv2d: layout is one of NCHW, NHWC; got 'CHWN'"),
    ({"precision": "fast"}, ValueError,
     "conv2d: precision is one of ieee, tf32, tf32x3; got 'fast'"),
    ({"workspace_limit": -1}, ValueError, "conv2d: workspace_limit is at least 0; got -1"),
    ({"workspace_limit": "1 MiB"}, TypeError,
     "conv2d: workspace_limit takes an integer, got '1 MiB' (str)"),
    ({"x_dtype": "datetime64[s]"}, TypeError,
     "conv2d: x: dtype 'datetime64[s]' is not one that gpuconv computes; it knows bool, int8"),
    ({"x_dtype": None}, TypeError, "conv2d: x: dtype None is not one that gpuconv computes"),
    ({"x_dtype": "uint64", "w_dtype": "int8"}, TypeError,
     "conv2d: no integer type holds both uint64 and int8; convert one of them first"),
    ({"dtype": "int32"}, TypeError,
     "conv2d: dtype=int32 cannot hold a result of x float32 and w float32 (float32); convert the "
     "result yourself, or ask for a floating or complex type"),
    ({"x_dtype": "complex64", "dtype": "float32"}, TypeError, "conv2d: dtype=float32 cannot hold"),
    ({"bias": "complex64"}, TypeError,
     "conv2d: bias is complex64, which a sum in float32 cannot take in; convert it first"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), MESSAGES)
def test_what_does_not_fit_is_named(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        problem_of(**changes)


@pytest.mark.parametrize("value", [1.0, True, None, (1, 2.0), object(), [True]])
def test_only_integers_reach_the_cache(value):
    with pytest.raises(TypeError, match=r"conv2d: stride takes integers, got"):
        freeze("conv2d", "stride", value)


def test_lists_and_index_types_are_frozen_to_tuples_of_int():
    import numpy as np

    assert freeze("conv2d", "padding", [[1, np.int8(2)], (3, 4)]) == ((1, 2), (3, 4))
    assert type(freeze("conv2d", "stride", np.int64(3))) is int
    assert freeze("conv2d", "padding", "same") == "same"


RESULTS = [
    ("float16", "float16", None, "float16", "float32"),
    ("bfloat16", "bfloat16", None, "bfloat16", "float32"),
    ("float16", "bfloat16", None, "float32", "float32"),
    ("float32", "float64", None, "float64", "float64"),
    ("int32", "float32", None, "float32", "float32"),
    ("uint8", "float16", None, "float16", "float32"),
    ("float64", "complex64", None, "complex128", "complex128"),
    ("float32", "complex64", None, "complex64", "complex64"),
    ("uint8", "uint8", None, "uint64", "uint64"),
    ("uint8", "int8", None, "int64", "int64"),
    ("bool", "bool", None, "int64", "int64"),
    ("bool", "uint8", None, "uint64", "uint64"),
    ("uint8", "uint8", "int32", "int32", "uint64"),
    ("uint8", "int64", "uint8", "uint8", "int64"),
    ("uint8", "int8", "float32", "float32", "float32"),
    ("float32", "float32", "float64", "float64", "float64"),
    ("float64", "float64", "float32", "float32", "float64"),
    ("float16", "float16", "float32", "float32", "float32"),
    ("float32", "float32", "complex64", "complex64", "complex64"),
]


@pytest.mark.parametrize(("x", "w", "asked", "result", "accumulator"), RESULTS)
def test_result_types(x, w, asked, result, accumulator):
    p = problem_of(x_dtype=x, w_dtype=w, dtype=asked)
    assert (p.y_dtype.name, p.accumulator.name) == (result, accumulator)


def test_dtypes_are_known_by_every_name():
    np = pytest.importorskip("numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert dtypes.of("float32") is dtypes.of(np.float32) is dtypes.of(np.dtype("f4"))
    assert dtypes.of(float) is dtypes.FLOAT64
    assert dtypes.of(ml_dtypes.bfloat16) is dtypes.BFLOAT16
    assert dtypes.of(np.dtype(">f4")) is dtypes.FLOAT32
    for dtype in dtypes.ALL:
        assert dtypes.of(dtype.numpy) is dtype
        assert dtype.numpy.itemsize == dtype.itemsize
