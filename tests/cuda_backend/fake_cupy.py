"""A CuPy that only writes down what it is asked: the seam at which a real device is tested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeCupy:
    """What CudaDevice uses of CuPy: two devices, of which 0 is current."""

    def __init__(self, attributes: dict[int, int] | None = None) -> None:
        self.current = 0
        self.runs = True
        self.log: list[Any] = []
        values = {13: 1980000, 16: 132, 36: 3201000, 37: 6144, 38: 50 << 20, 75: 9, 76: 0,
                  97: 232448} | (attributes or {})  # fmt: skip
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                getDeviceProperties=lambda i: {"name": b"NVIDIA H200"},
                deviceGetAttribute=lambda number, i: values[number],
                getDevice=lambda: self.current,
                getDeviceCount=lambda: 2,
                memGetInfo=lambda: (1 << 37, 1 << 37),
                deviceSynchronize=lambda: self.log.append("synchronize"),
                driverGetVersion=lambda: 13000,
                runtimeGetVersion=lambda: 12090,
            ),
            Device=self.device,
            function=SimpleNamespace(Module=self.module),
        )

    def device(self, ordinal: int) -> Any:
        cupy = self

        class Current:
            def __enter__(self) -> None:
                self.before, cupy.current = cupy.current, ordinal

            def __exit__(self, *error: Any) -> None:
                cupy.current = self.before

        return Current()

    def module(self) -> Any:
        def function(grid: Any, block: Any, args: Any, shared: int) -> None:
            self.log.append(("launch", self.current, grid, block, args, shared))

            if self.runs and len(args) == 2:  # as the probe's kernel would
                args[0][0] = args[1]

        function.ptr = 4242  # type: ignore[attr-defined]
        return SimpleNamespace(
            load=lambda cubin: self.log.append(("load", self.current, type(cubin))),
            get_function=lambda name: self.log.append(("function", name)) or function,
        )

    def empty(self, shape: Any, dtype: Any) -> Any:
        self.log.append(("empty", self.current, shape, np.dtype(dtype).name))
        return np.zeros(shape, dtype)
