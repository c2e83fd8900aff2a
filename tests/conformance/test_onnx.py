"""ONNX's own node tests of convolutions, from the onnx package, run through gpuconv."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import gpuconv

pytest.importorskip("onnx")

CASES = (
    "test_basic_conv_with_padding", "test_basic_conv_without_padding",
    "test_conv_with_strides_padding", "test_conv_with_strides_no_padding",
    "test_conv_with_strides_and_asymmetric_padding", "test_conv_with_autopad_same",
    "test_convinteger_without_padding", "test_convinteger_with_padding",
)  # fmt: skip
TRANSPOSED = (
    "test_convtranspose", "test_convtranspose_1d", "test_convtranspose_3d",
    "test_convtranspose_output_shape", "test_convtranspose_pad",
    "test_convtranspose_kernel_shape", "test_convtranspose_pads", "test_convtranspose_dilations",
    "test_convtranspose_autopad_same", "test_convtranspose_group_2",
    "test_convtranspose_group_2_image_3",
)  # fmt: skip
AUTO_PADS = {"SAME_UPPER": "same", "SAME_LOWER": "same_lower", "VALID": "valid"}


@pytest.fixture(scope="module")
def exported() -> dict[str, Any]:
    """(node, inputs, outputs) of every case that the onnx package defines for convolutions."""
    from onnx.backend.test.case import node

    found: dict[str, Any] = {}

    def expect(node: Any, inputs: Any, outputs: Any, name: str, **kwargs: Any) -> None:
        found[name] = (node, inputs, outputs)

    for stem, cls in (("conv", "Conv"), ("convinteger", "ConvInteger"),
                      ("convtranspose", "ConvTranspose")):  # fmt: skip
        module = importlib.import_module(f"{node.__name__}.{stem}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "expect", expect)
            for name in dir(getattr(module, cls)):
                if name.startswith("export"):
                    getattr(getattr(module, cls), name)()
    return found


def test_every_node_test_is_known(exported: dict[str, Any]) -> None:
    assert set(CASES) | set(TRANSPOSED) == set(exported)


@pytest.mark.parametrize("name", CASES)
def test_conv(exported: dict[str, Any], name: str) -> None:
    node, inputs, (expected,) = exported[name]
    options = attributes(node)
    x, w, *rest = inputs
    if node.op_type == "ConvInteger":
        # y = sum of (x - x_zero) (w - w_zero); what is padded reads x_zero, so it counts as 0.
        x_zero, w_zero = (*(z.astype(np.int32) for z in rest), np.int32(0), np.int32(0))[:2]
        x = x.astype(np.int32) - x_zero
        w = w.astype(np.int32) - np.reshape(w_zero, (-1, 1, 1, 1))  # one, or one per channel
        y = run(x, w, options, dtype=np.int32)
    else:
        y = run(x, w, options, bias=rest[0] if rest else None)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose(exported: dict[str, Any], name: str) -> None:
    node, inputs, (expected,) = exported[name]
    options = attributes(node)
    x, w, *bias = inputs
    ndim = x.ndim - 2
    stride = options.get("strides", [1] * ndim)
    dilation = options.get("dilations", [1] * ndim)
    extra = options.get("output_padding", [0] * ndim)
    whole = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(x.shape[2:], stride, dilation, w.shape[2:], extra, strict=True)
    ]
    pads = options.get("pads", [0] * 2 * ndim)
    pairs = list(zip(pads[:ndim], pads[ndim:], strict=True))
    wanted = options.get("output_shape")
    if options.get("auto_pad") in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(x.shape[2:], stride, strict=True)]
    if wanted is not None:
        pairs = []
        for i, (has, wants) in enumerate(zip(whole, wanted, strict=True)):
            total = max(has - wants, 0)
            extra[i] += max(wants - has, 0)
            less, more = total // 2, total - total // 2
            upper = options.get("auto_pad") == "SAME_UPPER"
            pairs.append((less, more) if upper else (more, less))
    transpose = getattr(gpuconv, f"conv_transpose{ndim}d")
    y = transpose(
        x, w, *bias, stride=tuple(stride), padding=tuple(pairs), dilation=tuple(dilation),
        output_padding=tuple(extra), groups=options.get("group", 1),
    )  # fmt: skip
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def run(x: Any, w: Any, options: dict[str, Any], **kwargs: Any) -> Any:
    ndim = x.ndim - 2
    pads = options.get("pads", [0] * 2 * ndim)
    padding: Any = tuple(zip(pads[:ndim], pads[ndim:], strict=True))
    if options.get("auto_pad", "NOTSET") != "NOTSET":
        padding = AUTO_PADS[options["auto_pad"]]
    return getattr(gpuconv, f"conv{ndim}d")(
        x, w,
        stride=tuple(options.get("strides", [1] * ndim)),
        dilation=tuple(options.get("dilations", [1] * ndim)),
        groups=options.get("group", 1), padding=padding, **kwargs,
    )  # fmt: skip
