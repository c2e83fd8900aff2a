"""A call like one before it: no question is asked twice, and every answer stays the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import conv, execute
from gpuconv.calls import Calls, signature
from gpuconv.testing import random_array

X = random_array(np.random.default_rng(0), (2, 3, 8, 9), "float32")
W = random_array(np.random.default_rng(1), (4, 3, 3, 3), "float32")
BIAS = random_array(np.random.default_rng(2), (4,), "float32")


@pytest.fixture(autouse=True)
def _no_calls_from_before() -> None:
    conv._calls.clear()


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions whose arrays were looked at one by one."""
    seen: list[str] = []
    init = execute.Operands.__init__

    def watched(self: Any, function: str, **options: Any) -> None:
        seen.append(function)
        init(self, function, **options)

    monkeypatch.setattr(execute.Operands, "__init__", watched)
    return seen


def plan(*shapes: Any, **options: Any) -> gpuconv.Plan:
    made = gpuconv.plan_conv2d(*shapes, backend="numpy", **options)
    made._calls.clear()  # plans are cached: another test may have called it
    return made


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "conv2d": lambda x, w: gpuconv.conv2d(x, w, padding=[1, 1]),
    "with bias": lambda x, w: gpuconv.conv2d(x, w, BIAS, stride=(2, 1), padding="same"),
    "of other dtypes": lambda x, w: gpuconv.conv2d(x, w, dtype="float64", precision="tf32"),
    "conv1d": lambda x, w: gpuconv.conv1d(x[:, :, 0], w[:, :, 0]),
    "conv_transpose2d": lambda x, w: gpuconv.conv_transpose2d(
        x, w.transpose(1, 0, 2, 3), stride=2, output_padding=1
    ),
    "conv2d_input": lambda x, w: gpuconv.grad.conv2d_input(
        (2, 4, 8, 9), w.transpose(1, 0, 2, 3), x, padding="same"
    ),
    "conv2d_weight": lambda x, w: gpuconv.grad.conv2d_weight(x, (3, 3, 3, 3), x[..., 2:, 2:]),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_the_first_call_is_checked(name: str, unprepared: list[str]) -> None:
    call = CALLS[name]
    first = call(X, W)
    assert len(unprepared) == 1
    again = call(2 * X, W - 1)
    assert len(unprepared) == 1
    assert again.strides == first.strides
    conv._calls.clear()
    np.testing.assert_array_equal(again, call(2 * X, W - 1))
    assert len(unprepared) == 2


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("memory", ["NCHW", "NHWC"])
@pytest.mark.parametrize("given", [True, False])
def test_layouts_and_memory_orders(layout: str, memory: str, batched: bool, given: bool) -> None:
    x = X
    if memory == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "NHWC":
        x = x.transpose(0, 2, 3, 1)
    x = x if batched else x[0]
    out = np.empty((2, 6, 7, 4) if layout == "NHWC" else (2, 4, 6, 7), np.float32)
    out = out if batched else out[0]
    results = []
    for scale in (1, 1, 3):
        kept = {"out": np.full_like(out, np.nan)} if given else {}
        y = gpuconv.conv2d(scale * x if scale > 1 else x, W, BIAS, layout=layout, **kept)
        assert not given or y is kept["out"]
        results.append(y)
    assert results[0].strides == results[1].strides
    np.testing.assert_array_equal(results[0], results[1])
    expected = gpuconv.conv2d(3 * X[: len(x) if batched else 1], W, BIAS)
    expected = expected.transpose(0, 2, 3, 1) if layout == "NHWC" else expected
    np.testing.assert_allclose(
        results[2], expected if batched else expected[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("value", [["zeros"], {}, np.ones(2)])
@pytest.mark.parametrize(
    "option",
    ["groups", "padding_mode", "layout", "dtype", "precision", "workspace_limit", "algorithm"],
)
def test_options_without_a_hash_are_named(option: str, value: Any) -> None:
    grad = np.ones((2, 4, 6, 7), np.float32)
    with pytest.raises((TypeError, ValueError), match=f"conv2d: {option} "):
        gpuconv.conv2d(X, W, **{option: value})
    with pytest.raises((TypeError, ValueError), match=f"conv2d_input: {option} "):
        gpuconv.grad.conv2d_input(X.shape, W, grad, **{option: value})
    with pytest.raises((TypeError, ValueError), match=f"plan_conv2d: ({option}|x) "):
        gpuconv.plan_conv2d(X.shape, W.shape, **{option: value})
    if option != "padding_mode":
        with pytest.raises((TypeError, ValueError), match=f"conv_transpose2d: {option} "):
            gpuconv.conv_transpose2d(grad, W, **{option: value})


def test_a_gradient_keeps_its_shape_apart() -> None:
    grad = gpuconv.conv2d(X, W, stride=2)
    for height in (7, 8, 7):
        dx = gpuconv.grad.conv2d_input((2, 3, height, 9), W, grad, stride=2)
        assert dx.shape == (2, 3, height, 9)
    with pytest.raises(TypeError, match="conv2d_input: input_shape takes an integer"):
        gpuconv.grad.conv2d_input((2, 3, 7.0, 9), W, grad, stride=2)


def test_gradients_of_a_plan() -> None:
    forward = gpuconv.conv2d(X, W)
    for operation, first, second in (("dgrad", forward, W), ("wgrad", X, forward)):
        made = plan(X.shape, W.shape, operation=operation)
        one, two = made(first, second), made(first, second)
        assert len(made._calls) == 1
        np.testing.assert_array_equal(one, two)


def test_a_plan_for_other_batches(unprepared: list[str]) -> None:
    made = plan(X.shape, W.shape)
    for batch in (1, 2, 1, 2, 1):
        np.testing.assert_array_equal(made(X[:batch], W), made(X, W)[:batch])
    assert len(unprepared) == 2


def test_what_differs_is_checked_again() -> None:
    made = plan(X.shape, W.shape)
    out = np.empty((2, 4, 6, 7), np.float32)
    for _ in range(2):
        made(X, W)
        made(X, W, out=out)
    with pytest.raises(ValueError, match=re.escape("x has shape (2, 3, 8, 8); it takes (2, 3, 8")):
        made(X[..., :8], W)
    with pytest.raises(TypeError, match="w is float64; it takes float32"):
        made(X, W.astype("float64"))
    with pytest.raises(ValueError, match="planned without a bias, called with one"):
        made(X, W, BIAS)
    with pytest.raises(ValueError, match=re.escape("out has shape (2, 4, 6, 6)")):
        made(X, W, out=out[..., :6])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is a read-only numpy array"):
        made(X, W, out=out)
    with pytest.raises(TypeError, match="w is a list"):
        made(X, W.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1.0},
        {"stride": True},
        {"stride": (1, True)},
        {"padding": 0.0},
        {"groups": 1.0},
        {"workspace_limit": 1e9},
        {"layout": "HWCN"},
    ],
)
def test_what_equals_a_right_option_is_not_one(options: dict[str, Any]) -> None:
    right = {"stride": 1, "padding": 0, "groups": 1, "workspace_limit": 10**9, "layout": "NCHW"}

    def message() -> str:
        with pytest.raises((TypeError, ValueError)) as caught:
            gpuconv.conv2d(X, W, **{**right, **options})
        return str(caught.value)

    before = message()
    for stride in (1, (1, 1)):
        gpuconv.conv2d(X, W, **{**right, "stride": stride})
    assert message() == before


def test_a_result_over_an_operand_goes_through_memory_of_its_own() -> None:
    x = random_array(np.random.default_rng(3), (1, 1, 16, 16), "float32")
    w = random_array(np.random.default_rng(4), (1, 1, 3, 3), "float32")
    expected = gpuconv.conv2d(x, w, padding=1)
    assert gpuconv.conv2d(x, w, padding=1, out=np.empty_like(x)) is not x
    inside = x.copy()
    assert gpuconv.conv2d(inside, w, padding=1, out=inside) is inside
    np.testing.assert_array_equal(inside, expected)


def test_a_plan_refuses_arrays_of_another_backend_every_time() -> None:
    from tests.emulator import emulated_device

    made = plan(X.shape, W.shape)
    made(X, W)
    with emulated_device(), gpuconv.use_backend("cuda"):
        for _ in range(2):
            with pytest.raises(TypeError, match="the plan is for the backend 'numpy'"):
                made(X, W)
    with gpuconv.use_backend("numpy"):
        made(X, W)


def test_what_is_no_plain_array_has_no_signature() -> None:
    class Mine(np.ndarray):
        pass

    assert signature(X, W, None, None) is not None
    assert signature(X.view(Mine), W, None, None) is None
    assert signature(X, W.view(Mine), None, None) is None
    assert signature(X, W, BIAS.tolist(), None) is None
    assert signature(X, W, None, BIAS.view(Mine)) is None
    assert signature(X.tolist(), W, None, None) is None


def test_a_foreign_byte_order_is_converted_every_time() -> None:
    foreign = X.astype(">f4")
    for _ in range(2):
        np.testing.assert_array_equal(gpuconv.conv2d(foreign, W), gpuconv.conv2d(X, W))


def test_calls_do_not_grow_without_bound() -> None:
    kept = Calls(3)
    for key in range(10):
        kept.remember(key, lambda x, w, bias, out: None)
        assert key in kept
        assert len(kept) <= 3


def test_threads_share_a_plan() -> None:
    made = plan((1, *X.shape[1:]), W.shape)
    images = [random_array(np.random.default_rng(i), (1, 3, 8, 9), "float32") for i in range(8)]
    expected = [gpuconv.conv2d(x, W) for x in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: made(images[i % 8], W), range(400)))
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y, expected[i % 8])
