"""Every test here that takes `cuda_device` runs twice: emulated on the CPU, and on a real device.

The real one carries the mark ``gpu`` and skips itself where there is none; the test is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import backends
from gpuconv.arrays import HostArray
from tests.emulator import emulated_device


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def cuda_device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The device, with ``use_backend("cuda")`` around the test."""
    if request.param == "emulated":
        with emulated_device() as device, gpuconv.use_backend("cuda"):
            yield device
    else:
        with gpuconv.use_backend("cuda"):
            yield backends.backend("cuda").device()


def on_device(device: Any, array: HostArray | None) -> Any:
    """The same values in the same memory order on the device: strides, offset and all."""
    if array is None or device.xp is np:
        return array
    cupy = device.xp
    low, high = np.lib.array_utils.byte_bounds(array)
    pad = low % 256  # keep the address's low bits: alignment is part of the memory order
    memory = cupy.zeros(pad + high - low, np.uint8)
    pointer = memory.data + (pad + array.__array_interface__["data"][0] - low)
    result = cupy.ndarray(array.shape, array.dtype, pointer, array.strides)
    result[...] = cupy.asarray(np.ascontiguousarray(array))
    return result


def on_host(array: Any) -> HostArray:
    """A result as NumPy's."""
    return array if isinstance(array, np.ndarray) else array.get()
