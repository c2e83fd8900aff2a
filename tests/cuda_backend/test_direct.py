"""direct's variants, which only large problems choose, forced on small ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv.cuda_backend import direct, launch
from gpuconv.plan import choose
from gpuconv.testing import assert_close, random_case
from tests.cuda_backend.conftest import on_device, on_host


@pytest.fixture(params=["int32", "int64"])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of output channels for small problems too, and one block to do all the work."""
    monkeypatch.setattr(direct, "_THREADS_PER_SM", 0)
    monkeypatch.setattr(direct, "_BLOCKS_PER_SM", 0)
    monkeypatch.setattr(launch, "index_type", lambda *args: request.param)
    direct.prepare.cache_clear()
    yield
    direct.prepare.cache_clear()


@pytest.mark.parametrize("block", range(3))
def test_tiles_of_channels_and_the_grid_stride_loop(
    cuda_device: Any, forced: None, block: int
) -> None:
    for seed in range(200 * block, 200 * (block + 1)):
        case = random_case(seed, channels=9)
        x, w, bias = case.arrays()
        plan = choose("test", case.problem(), "cuda", cuda_device, "direct")
        y = plan(*(on_device(cuda_device, a) for a in (x, w, bias)))
        assert_close(plan.problem, on_host(y), x, w, bias)


def test_variants_hold_whatever_a_problem_asks_for(
    cuda_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {launch.freeze(macros) for _, macros in direct.forward_variants()}
    asked = set()
    for threads in (0, 1 << 40):
        monkeypatch.setattr(direct, "_THREADS_PER_SM", threads)
        for seed in range(3000):
            problem = random_case(seed).problem()
            for index in ("int32", "int64"):
                asked.add(launch.freeze(direct.macros_for(problem, cuda_device, index)))
    assert asked <= listed
    assert len(listed - asked) < 6  # rare pairs of types with rare sums


def test_it_serves_every_pair_of_types(cuda_device: Any) -> None:
    for x in dtypes.ALL:
        for w in dtypes.ALL:
            try:
                plan = gpuconv.plan_conv1d((1, 2, 9), (3, 2, 3), dtype=(x, w), backend="cuda")
            except TypeError:  # no type holds both
                assert {x.kind, w.kind} == {"u", "i"}
                continue
            assert any(c.algorithm == "direct" and c.cost for c in plan.candidates)
