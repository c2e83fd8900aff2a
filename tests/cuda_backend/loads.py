"""Which kernels a device is asked for."""

from __future__ import annotations

from typing import Any

import gpuconv
from gpuconv.arrays import HostArray
from gpuconv.cuda_backend import launch
from gpuconv.cuda_backend.device import override
from gpuconv.plan import choose
from gpuconv.problem import ConvProblem
from tests.emulator import EmulatedDevice


class Loader(EmulatedDevice):
    """`loaded`: the kernels that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[Any] = set()

    def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
        self.loaded.add((source, launch.freeze(macros)))
        return super().load(source, macros, kernel)


def assert_warmup_loads(
    problem: ConvProblem, algorithm: str, x: HostArray, w: HostArray, stems: set[str], launches: int
) -> None:
    """``warmup`` launches nothing and loads what a call launches: kernels of these `stems`."""
    warmed, called = Loader(), Loader()
    for device in (warmed, called):
        with override(device), gpuconv.use_backend("cuda"):
            plan = choose("test", problem, "cuda", device, algorithm)
            if device is warmed:
                gpuconv.warmup(plan)
            else:
                plan(x, w)
    assert warmed.loaded == called.loaded
    assert {stem for stem, _ in called.loaded} == stems
    assert (warmed.launches, called.launches) == (0, launches)
