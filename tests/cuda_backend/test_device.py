"""The probe in every state that an installation can be in, each with the reason a user reads."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import backends
from gpuconv.cuda_backend import compiler
from gpuconv.errors import BackendError
from tests.cuda_backend.fake_cupy import FakeCupy
from tests.emulator import emulated_device

device_module: Any = sys.modules["gpuconv.cuda_backend.device"]


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which is a RuntimeError too."""


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CuPy whose probe succeeds; a test breaks one thing of it."""
    fake = FakeCupy()
    modules = {"cupy": fake, "cupy_backends.cuda.api.driver": None}

    def find(name: str) -> Any:
        found = modules[name]
        if isinstance(found, Exception):
            raise found
        return found

    fake.modules = modules
    monkeypatch.setattr(device_module, "import_module", find)
    monkeypatch.setattr(device_module, "_has_driver", lambda: True)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
    monkeypatch.setattr(compiler, "include_folders", lambda: ("/usr/local/cuda/include",))
    monkeypatch.setattr(compiler, "architecture", lambda capability: "sm_90a")
    monkeypatch.setattr(
        compiler, "compile_kernel", lambda *a: compiler.Compiled(b"cubin", compiler.Report())
    )
    forget()
    yield fake
    forget()


def forget() -> None:
    device_module._probe.cache_clear()
    device_module._cuda_device.cache_clear()


def raising(error: Exception) -> Any:
    def function(*args: Any, **options: Any) -> Any:
        raise error

    return function


def reason() -> BackendError:
    found = device_module.why_not()
    assert isinstance(found, BackendError)
    assert "\n" not in str(found)
    return found


def test_a_working_device(cupy: Any) -> None:
    assert device_module.why_not() is None
    assert gpuconv.default_backend() == "cuda"
    assert str(device_module.device("cuda:1")) == "cuda:1, NVIDIA H200"
    assert str(device_module.device()) == "cuda:0, NVIDIA H200"
    lines = device_module.describe()
    assert len(lines) == 4  # two devices, versions, the cache
    assert "sm_90a" in lines[0]
    assert "13.0" in lines[2]


def test_no_cupy(cupy: Any) -> None:
    cupy.modules["cupy"] = ModuleNotFoundError("No module named 'cupy'", name="cupy")
    assert "CuPy is not installed: pip install 'gpuconv[cuda12]'" in str(reason())
    assert isinstance(reason().__cause__, ModuleNotFoundError)


def test_a_cupy_that_cannot_be_imported(cupy: Any) -> None:
    """CuPy 13 turns any failure into an ImportError of many lines, the cause behind it."""
    error = ImportError("\n======\nFailed to import CuPy.\n\nIf you installed CuPy via wheels ...")
    error.__cause__ = ImportError("libcudart.so.12: cannot open shared object file")
    cupy.modules["cupy"] = error
    assert str(reason()) == (
        "CuPy cannot be imported: libcudart.so.12: cannot open shared object file"
    )
    assert reason().__cause__ is error


def test_a_cupy_that_breaks_on_import(cupy: Any) -> None:
    cupy.modules["cupy"] = AttributeError("module 'numpy' has no attribute 'x'")
    assert str(reason()).startswith("CuPy cannot be imported: module 'numpy'")


def test_no_driver(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_has_driver", lambda: False)
    error = CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    cupy.cuda.runtime.getDeviceCount = raising(error)
    assert str(reason()) == "no NVIDIA driver is installed (libcuda is not found)"
    assert reason().__cause__ is error


def test_a_driver_that_is_too_old(cupy: Any) -> None:
    error = CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    cupy.cuda.runtime.getDeviceCount = raising(error)
    assert str(reason()).startswith("the NVIDIA driver is too old for this CuPy: cudaErrorInsuff")


def test_a_driver_in_trouble(cupy: Any) -> None:
    cupy.cuda.runtime.getDeviceCount = raising(OSError("cudaErrorSystemNotReady: fabric manager"))
    assert str(reason()).startswith("the CUDA driver does not answer: cudaErrorSystemNotReady")


@pytest.mark.parametrize("raises", [False, True])
def test_no_devices(cupy: Any, monkeypatch: pytest.MonkeyPatch, raises: bool) -> None:
    error = CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    cupy.cuda.runtime.getDeviceCount = raising(error) if raises else lambda: 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert str(reason()) == "the CUDA driver sees no device (CUDA_VISIBLE_DEVICES='')"


def test_rocm(cupy: Any) -> None:
    cupy.cuda.runtime.is_hip = True
    assert "ROCm" in str(reason())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open"),
        ImportError("libnvrtc.so.12: cannot open shared object file"),
    ],
)
def test_no_nvrtc(cupy: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", raising(error))
    assert "CuPy finds no NVRTC, CUDA's run-time compiler: pip install 'cupy" in str(reason())
    assert reason().__cause__ is error


def test_no_headers(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = compiler.CompileError("probe.cu: could not open source file 'cuda_bf16.h'")
    monkeypatch.setattr(compiler, "compile_kernel", raising(error))
    monkeypatch.setattr(compiler, "include_folders", lambda: ())
    assert "CUDA's headers (cuda_fp16.h) are not found: pip install 'cupy" in str(reason())
    assert reason().__cause__ is error


def test_headers_that_do_not_compile(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = compiler.CompileError("probe.cu with -std=c++17:\ncuda_fp16.h(1): error")
    monkeypatch.setattr(compiler, "compile_kernel", raising(error))
    assert str(reason()).startswith("NVRTC 12.9 does not compile a kernel for sm_90a: probe.cu")


def test_a_device_that_cannot_be_asked(cupy: Any) -> None:
    cupy.cuda.runtime.deviceGetAttribute = raising(CUDARuntimeError("cudaErrorECCUncorrectable"))
    assert str(reason()).startswith("the CUDA device cannot be used: cudaErrorECC")


@pytest.mark.parametrize("old", [0, 1])
def test_a_device_that_is_too_old(cupy: Any, old: int) -> None:
    """NVRTC 12 still compiles for a V100."""
    attribute = cupy.cuda.runtime.deviceGetAttribute
    capability = {75: 7, 76: 0}
    cupy.cuda.runtime.deviceGetAttribute = lambda number, i: (
        capability[number] if i == old and number in capability else attribute(number, i)
    )
    said = f"gpuconv needs compute capability 7.5 or more; cuda:{old}, NVIDIA H200 has 7.0"
    text = io.StringIO()
    gpuconv.show_config(text)
    assert said in text.getvalue()
    if old == 0:  # the current one
        assert str(reason()) == f"the CUDA device cannot be used: {said}"
        assert gpuconv.default_backend() == "numpy"
    else:
        assert device_module.why_not() is None
        with pytest.raises(BackendError, match="needs compute capability"):
            device_module.device("cuda:1")


def test_a_cubin_that_does_not_load(cupy: Any) -> None:
    cupy.cuda.function.Module = raising(RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: ptx"))
    assert "does not run a kernel that NVRTC 12.9 compiled for sm_90a" in str(reason())
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in str(reason())


def test_a_kernel_that_does_nothing(cupy: Any) -> None:
    cupy.runs = False
    assert str(reason()).endswith("a kernel that writes 1234567 left 0")


def test_out_of_memory(cupy: Any) -> None:
    cupy.empty = raising(MemoryError("out of memory allocating 512 bytes"))
    assert "out of memory" in str(reason())


def test_the_reason_reaches_the_caller(cupy: Any) -> None:
    error = ModuleNotFoundError("No module named 'cupy'", name="cupy")
    cupy.modules["cupy"] = error
    assert gpuconv.default_backend() == "numpy"
    with pytest.raises(BackendError, match="CuPy is not installed") as caught:
        gpuconv.use_backend("cuda").__enter__()
    assert str(caught.value).startswith("use_backend: backend 'cuda' cannot run here")
    assert caught.value.__cause__ is reason()
    assert caught.value.__cause__.__cause__ is error
    with pytest.raises(BackendError, match="CuPy is not installed"):
        backends.backend("cuda").device("cuda:0")  # of a torch tensor, say
    text = io.StringIO()
    gpuconv.show_config(text)
    assert "no CUDA: CuPy is not installed" in text.getvalue()


def test_the_probe_runs_once(cupy: Any) -> None:
    calls = []
    count = cupy.cuda.runtime.getDeviceCount
    cupy.cuda.runtime.getDeviceCount = lambda: calls.append(1) or count()
    threads = [threading.Thread(target=device_module.why_not) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device_module.why_not() is None
    assert len(calls) == 1


def test_this_machine() -> None:
    """Without fakes: CI has CuPy and no device; a machine with one has no reason."""
    pytest.importorskip("cupy")
    found = device_module.why_not()
    if found is None:
        assert gpuconv.default_backend() == "cuda"
        return
    assert any(word in str(found) for word in ("driver", "device"))
    assert found.__cause__ is not None
    with pytest.raises(BackendError, match="backend 'cuda' cannot run here"):
        gpuconv.plan_conv1d((1, 1, 4), (1, 1, 2), backend="cuda")


def test_importing_and_computing_on_the_cpu_imports_no_cupy() -> None:
    code = (
        "import sys, numpy as np, gpuconv;"
        "gpuconv.conv1d(np.ones((1, 1, 4)), np.ones((1, 1, 2)));"
        "import gpuconv.cuda_backend, gpuconv.cuda_backend.direct;"
        "assert not {'cupy', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_override_is_the_device_of_every_place() -> None:
    with emulated_device() as device:
        assert device_module.why_not() is None
        assert device_module.device("cuda:3") is device is backends.backend("cuda").device()
        with emulated_device() as inner:
            assert device_module.device() is inner
        assert device_module.device() is device
        with gpuconv.use_backend("cuda"):
            y = gpuconv.asarray([[1.0, 2.0]])
        assert type(y) is np.ndarray


def test_capability() -> None:
    with emulated_device(arch="sm_90a") as device:
        assert device_module.capability(device) == 90
    with emulated_device(arch="sm_120") as device:
        assert device_module.capability(device) == 120
