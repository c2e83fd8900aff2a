"""The suites are what they say: shapes chain, counts and costs are those of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gpuconv
from bench import suites
from bench.networks import NETWORKS, Walk
from bench.suites import SUITES, Row, select

# Convolutions and 10^9 products per image. Sources: the papers' tables (ResNet-50 3.8 with the
# stride in the 1x1, 4.1 as here; VGG-16 15.3; MobileNetV2 0.30; EfficientNet-B0 0.39; ConvNeXt-T
# 4.5; RepLKNet-31B 15.3; ResNeXt-50 4.2), or counted by hand (U-Net's 23 layers, four of them
# transposed with 5.6; DCGAN: 0.82 + 3 * 33.6 + 3.1 million).
KNOWN = {
    "resnet50": (53, 4.09),
    "vgg16": (13, 15.35),
    "mobilenetv2": (52, 0.299),
    "efficientnet_b0": (81, 0.385),
    "convnext_t": (58, 4.455),
    "replknet31b": (130, 15.35),
    "resnext50": (53, 4.23),
    "unet": (23, 150.4),
    "sdxl": (18, 336.4),
    "aspp": (12, 79.75),
    "dcgan": (5, 0.1046),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_and_products_are_those_of_the_network(name: str) -> None:
    layers = NETWORKS[name][2]()
    count, gmacs = KNOWN[name]
    assert len(layers) == count
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("name", NETWORKS)
def test_distinct_rows_count_every_layer_once(name: str) -> None:
    layers = NETWORKS[name][2]()
    rows = suites.distinct(name, layers, batch=2)
    assert sum(row.count for row in rows) == len(layers)
    assert sum(row.count * row.flops for row in rows) == 2 * 2 * sum(layer.macs for layer in layers)
    for row in rows:
        layer = next(layer for layer in layers if layer.name == row.name)
        assert row.problem.shape_of("x" if layer.transposed else "y") == (2, *layer.output)


def test_what_networks_are_known_for() -> None:
    def has(name: str, **wanted: int) -> bool:
        return any(
            all(getattr(layer, k) == v for k, v in wanted.items()) for layer in NETWORKS[name][2]()
        )

    assert has("resnet50", channels=3, filters=64, filter=7, stride=2, height=224)
    assert has("mobilenetv2", channels=96, filters=96, filter=3, stride=2, groups=96, height=112)
    assert has("convnext_t", channels=384, filter=7, groups=384, height=14)
    assert has("replknet31b", channels=128, filter=31, groups=128, height=56)
    assert has("resnext50", channels=128, filter=3, groups=32, height=56)
    assert has("efficientnet_b0", filter=5, stride=2, groups=144, height=56)
    assert has("unet", channels=1, filters=64, filter=3, padding=0, height=572)
    assert has("unet", channels=1024, filters=512, filter=3, height=56)
    assert has("sdxl", channels=1920, filters=640, filter=3, height=64)
    assert has("aspp", channels=2048, filters=256, filter=3, dilation=12, height=33)
    assert has("unet", channels=1024, filters=512, filter=2, stride=2, height=28, transposed=True)
    assert has("dcgan", channels=64, filters=3, filter=4, stride=2, height=32, transposed=True)


def test_a_walk_refuses_what_does_not_chain() -> None:
    walk = Walk(3, 8)
    with pytest.raises(ValueError, match="groups=2"):
        walk.conv("a", 4, 3, groups=2)
    with pytest.raises(ValueError, match="too small"):
        walk.conv("a", 4, 9, padding=0)
    with pytest.raises(ValueError, match="cannot be added"):
        walk.add((4, 8, 8))
    with pytest.raises(ValueError, match="too small"):
        walk.concatenate((4, 7, 8))


@pytest.mark.parametrize("name", SUITES)
def test_every_row_is_a_problem_that_gpuconv_plans(name: str) -> None:
    rows = SUITES[name].rows()
    assert SUITES[name].source
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert min(row.problem.result_shape) >= 1
        if row.transposed:
            assert row.problem.operation == "dgrad"
            continue
        shape = gpuconv.conv_output_shape(
            row.x_shape, row.w_shape,
            **{k: v for k, v in row.options.items() if k != "precision"},
        )  # fmt: skip
        assert shape == row.problem.y_shape


def test_select() -> None:
    everything = select(None)
    assert "sample" not in everything
    assert {row.batch for row in everything["vgg16"]} == {1, 32}
    assert {f"{size}x{size} {filter}x{filter}" for size in (512, 8192) for filter in (3, 63)} <= {
        row.name for row in everything["filters"]
    }
    halves = select(["vgg16", "filters", "audio"], dtype="float16", batches=[4])
    assert {row.x_dtype for rows in halves.values() for row in rows} == {"float16"}
    assert {row.batch for row in halves["vgg16"]} == {4}
    (row,) = select(["resnet50"], contains=["conv1 n1 "], batches=[1])["resnet50"][:1]
    assert row.key == "resnet50/conv1 n1 float32"
    (tf32,) = select(["vgg16"], contains=["conv1_1"], batches=[1], precision="tf32")["vgg16"]
    assert tf32.precision == "tf32"
    assert tf32.key.endswith("tf32")
    quick = select(None, quick=True, batches=[1])
    assert 0 < sum(map(len, quick.values())) < 150
    with pytest.raises(ValueError, match="suite is one of"):
        select(["resnet51"])


def test_gradients_follow_their_row_where_a_network_learns_it() -> None:
    rows = SUITES["sample"].rows([1, 32], operations=suites.OPERATIONS)
    assert len({row.key for row in rows}) == len(rows)
    keys = [row.key for row in rows]
    first = "sample/resnet50/layer1.0.conv2{} n{} float32"
    assert keys[:6] == [
        first.format(operation, batch)
        for batch in (1, 32)
        for operation in ("", " dgrad", " wgrad")
    ]
    backward = [row for row in rows if row.operation != "fprop"]
    assert len(backward) == 2 * sum(row.trained for row in SUITES["sample"].rows([1, 32]))
    assert not any(row.single_plane or row.transposed for row in backward)
    for row in backward:
        first_role = "x" if row.operation == "wgrad" else "y"
        assert row.operand_shapes[0] == row.problem.shape_of(first_role)
        assert row.problem.result_shape == (
            row.x_shape if row.operation == "dgrad" else row.w_shape
        )
        forward = next(r for r in rows if r.key == row.key.replace(f" {row.operation}", ""))
        assert (row.flops, row.bytes_moved) == (forward.flops, forward.bytes_moved)
    (only,) = select(["dcgan"], contains=["conv3 "], batches=[2], operations=["dgrad", "fprop"])[
        "dcgan"
    ]
    assert only.operation == "fprop"
    data = next(r for r in backward if r.operation == "wgrad" and r.batch == 1).data()
    assert data.x.shape[0] == data.w.shape[0] == 1
    assert data.w.ndim == data.x.ndim


def test_a_transposed_layer_s_extents_are_those_of_the_function() -> None:
    walk = Walk(4, 7)
    for filter, stride, padding in ((2, 2, 0), (4, 2, 1), (3, 1, 1), (5, 3, 2)):
        channels, height, width = walk.shape
        walk.transposed("a", 6, filter, stride, padding)
        y = gpuconv.conv_transpose2d(
            np.ones((1, channels, height, width)), np.ones((channels, 6, filter, filter)),
            stride=stride, padding=padding,
        )  # fmt: skip
        assert y.shape[1:] == walk.shape == walk.layers[-1].output


def test_data_is_random_and_the_same_again() -> None:
    row = Row("s", "r", (2, 3, 5, 5), (4, 3, 3, 3))
    data, again = row.data(), row.data()
    np.testing.assert_array_equal(data.x, again.x)
    assert data.x.shape == row.x_shape
    assert data.x.dtype == np.float32
    assert np.unique(data.x).size > 100
    assert (row.data(seed=1).x != data.x).any()
    bytes_ = Row("s", "r", (1, 1, 64, 64), (1, 1, 3, 3), x_dtype="uint8").data()
    assert bytes_.x.dtype == np.uint8
    assert np.unique(bytes_.x).size > 200


def test_a_gaussian_is_an_outer_product() -> None:
    data = Row("s", "r", (1, 1, 9, 9), (1, 1, 7, 5), separable=True).data()
    assert data.factors is not None
    np.testing.assert_array_equal(data.w[0, 0], np.outer(*data.factors))
    assert math.isclose(float(data.w.sum()), 1, rel_tol=1e-5)
