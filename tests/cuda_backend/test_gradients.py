"""dgrad and wgrad of every registered algorithm, on random problems, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import grad
from gpuconv.cuda_backend import direct, launch
from gpuconv.plan import choose, serving
from gpuconv.problem import Operation
from gpuconv.testing import assert_close, random_array, random_case
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device
from tests.test_grad import gradient


def run(plan: Any, device: Any, *arrays: Any) -> Any:
    return on_host(plan(*(on_device(device, a) for a in arrays)))


def constant(algorithm: str, operation: Operation) -> float:
    """The algorithm's own constant in the error bound."""
    found = next(
        a for a in serving("cuda", operation) if a.__name__.rpartition(".")[2] == algorithm
    )
    return getattr(found, "ERROR_CONSTANT", 1.0)


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
@pytest.mark.parametrize("block", range(4))
def test_random_problems(cuda_device: Any, operation: Operation, block: int) -> None:
    for seed in range(60 * block, 60 * (block + 1)):
        case = random_case(seed, largest=6, channels=4)
        changes = {"flip": seed % 5 == 0, "conjugate": seed % 2 == 0}
        problem, first, second = gradient(case, operation, **changes)
        for candidate in choose("test", problem, "cuda", cuda_device).candidates:
            if candidate.rejected or candidate.algorithm == "separable":
                continue
            plan = choose("test", problem, "cuda", cuda_device, candidate.algorithm)
            y = run(plan, cuda_device, first, second)
            c = constant(candidate.algorithm, operation)
            assert_close(problem, y, first, second, c=c)
            np.testing.assert_array_equal(y, run(plan, cuda_device, first, second))


@pytest.fixture(params=["int32", "int64"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of channels for small problems too, and one block to do all the work."""
    monkeypatch.setattr(direct, "_THREADS_PER_SM", 0)
    monkeypatch.setattr(direct, "_BLOCKS_PER_SM", 0)
    monkeypatch.setattr(launch, "index_type", lambda *args: request.param)
    direct.prepare.cache_clear()
    yield
    direct.prepare.cache_clear()


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
def test_tiles_of_channels_and_the_grid_stride_loop(
    cuda_device: Any, forced: None, operation: Operation
) -> None:
    for seed in range(60):
        case = random_case(seed, largest=6, channels=9)
        problem, first, second = gradient(case, operation)
        plan = choose("test", problem, "cuda", cuda_device, "direct")
        assert_close(problem, run(plan, cuda_device, first, second), first, second)


def test_variants_hold_whatever_a_gradient_asks_for(
    cuda_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations: tuple[Operation, ...] = ("dgrad", "wgrad")
    for operation in operations:
        listed = {launch.freeze(macros) for _, macros in direct.gradient_variants(operation)}
        asked = set()
        for threads in (0, 1 << 40):
            monkeypatch.setattr(direct, "_THREADS_PER_SM", threads)
            for seed in range(2000):
                problem, _, _ = gradient(random_case(seed, largest=3), operation)
                for index in ("int32", "int64"):
                    asked.add(launch.freeze(direct.macros_for(problem, cuda_device, index)))
        assert asked <= listed


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
def test_a_plan_serves_other_batches(cuda_device: Any, operation: Operation) -> None:
    rng = np.random.default_rng(0)
    x, w, dy = (random_array(rng, s, "float32") for s in ((5, 8, 9, 9), (8, 8, 3, 3), (5, 8, 7, 7)))
    plans = choose(
        "test", gpuconv.plan_conv2d((2, *x.shape[1:]), w.shape, operation=operation).problem,
        "cuda", cuda_device,
    )  # fmt: skip
    for candidate in plans.candidates:
        if candidate.rejected:
            continue
        plan = choose("test", plans.problem, "cuda", cuda_device, candidate.algorithm)
        if operation == "dgrad":
            whole = run(plan, cuda_device, dy, w)
            for n in range(5):
                alone = run(plan, cuda_device, dy[n : n + 1], w)
                np.testing.assert_array_equal(whole[n : n + 1], alone)
        else:
            problem = replace(plans.problem, batch=5)
            assert_close(problem, run(plan, cuda_device, x, dy), x, dy)


def test_public_functions(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = (random_array(rng, s, "float32") for s in ((2, 3, 8, 9), (4, 3, 3, 3)))
    y = gpuconv.conv2d(x, w, padding=1, stride=2, padding_mode="reflect")
    options = {"padding": 1, "stride": 2, "padding_mode": "reflect"}
    found = []
    for backend in ("cuda", "numpy"):
        with gpuconv.use_backend(backend):
            found.append((
                grad.conv2d_input(x.shape, w, y, **options),
                grad.conv2d_weight(x, w.shape, y, **options),
                grad.conv2d_bias(y),
                gpuconv.conv_transpose2d(y, w, x[0, :, 0, 0], stride=2, output_padding=1),
            ))  # fmt: skip
    for cuda, host in zip(*found, strict=True):
        np.testing.assert_allclose(cuda, host, rtol=1e-4, atol=1e-4)


def test_warmup_of_gradients(cuda_device: Any) -> None:
    for operation in ("dgrad", "wgrad"):
        gpuconv.warmup(gpuconv.plan_conv2d((2, 4, 8, 8), (4, 4, 3, 3), operation=operation))


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_the_direct_kernels_race_with_no_one_and_stay_in_bounds(mode: str) -> None:
    operations: tuple[Operation, ...] = ("dgrad", "wgrad")
    with (
        emulated_device(mode=mode, order="random", block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        for operation in operations:
            for seed in range(10):
                case = random_case(
                    seed, largest=4, channels=3, dtypes=("float32", "complex64"), mixed_dtypes=False
                )
                problem, first, second = gradient(case, operation)
                plan = choose("test", problem, "cuda", device, "direct")
                assert_close(problem, plan(first, second), first, second)
