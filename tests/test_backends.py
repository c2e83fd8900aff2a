"""Which backend serves, and that the choice is made by name, by arrays, or not at all."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import gpuconv

NO_CUDA = gpuconv.default_backend() == "numpy"
needs_no_cuda = pytest.mark.skipif(not NO_CUDA, reason="a CUDA device works here")


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_no_optional_library():
    loaded = run(
        """
        import sys, gpuconv
        optional = {"cupy", "torch", "jax", "scipy", "ml_dtypes", "threadpoolctl", "PIL", "rich"}
        print(sorted(optional & set(sys.modules)))
        """
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("given", [[], "auto", (1, 3, 8, 8)])
def test_warmup_takes_plans(given):
    with pytest.raises(TypeError, match=f"warmup: .* got a {type(given).__name__}; gpuconv.plan_"):
        gpuconv.warmup(given)


def test_a_numpy_call_loads_no_foreign_library():
    loaded = run(
        """
        import sys, numpy as np, gpuconv
        gpuconv.conv2d(np.ones((1, 1, 5, 5)), np.ones((1, 1, 3, 3)))
        print(sorted({"cupy", "torch", "jax", "scipy"} & set(sys.modules)))
        """
    )
    assert loaded.strip() == "[]"


def test_importing_adds_little_to_numpy():
    """Modules, not seconds: what is imported beside NumPy's own is counted."""
    count = run(
        """
        import sys, numpy
        before = set(sys.modules)
        import gpuconv
        print(len(set(sys.modules) - before))
        """
    )
    assert int(count) < 40


@needs_no_cuda
def test_without_a_device_the_default_is_numpy_and_the_reason_is_told():
    assert gpuconv.default_backend() == "numpy"
    with (
        pytest.raises(
            gpuconv.BackendError, match="use_backend: backend 'cuda' cannot run here"
        ) as e,
        gpuconv.use_backend("cuda"),
    ):
        pass
    assert e.value.__cause__ is not None
    with pytest.raises(gpuconv.BackendError, match="plan_conv2d: backend 'cuda' cannot run here"):
        gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), backend="cuda")


@pytest.mark.parametrize("name", ["rocm", "gpu", "", None])
def test_unknown_backends_are_refused(name):
    message = re.escape(f"backend is one of numpy, cuda; got {name!r}")
    with pytest.raises(ValueError, match=f"use_backend: {message}"), gpuconv.use_backend(name):
        pass
    if name is not None:  # which leaves the choice to gpuconv
        with pytest.raises(ValueError, match=f"plan_conv2d: {message}"):
            gpuconv.plan_conv2d((1, 1, 5, 5), (1, 1, 3, 3), backend=name)


def test_use_backend_nests_and_holds_for_its_own_thread():
    from gpuconv import backends

    seen = []
    with gpuconv.use_backend("numpy"):
        with gpuconv.use_backend("numpy"):
            pass
        assert backends.forced_backend() == "numpy"
        thread = threading.Thread(target=lambda: seen.append(backends.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert backends.forced_backend() is None


def test_asarray_makes_arrays_of_the_backend():
    with gpuconv.use_backend("numpy"):
        a = gpuconv.asarray([[1, 2]])
        assert type(a) is np.ndarray
        assert gpuconv.asarray(a) is a
        torch = pytest.importorskip("torch")
        assert type(gpuconv.asarray(torch.ones(3))) is np.ndarray


def test_show_config_says_what_runs_where_and_why():
    text = io.StringIO()
    gpuconv.show_config(text)
    lines = text.getvalue()
    assert f"gpuconv {gpuconv.__version__} on Python" in lines
    assert f"default backend: {gpuconv.default_backend()}" in lines
    assert f"numpy: {np.__version__}" in lines
    if NO_CUDA:
        assert "no CUDA: " in lines
