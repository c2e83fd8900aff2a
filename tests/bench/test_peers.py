"""Every peer computes what gpuconv computes, or says why it cannot."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest

from bench.check import Check
from bench.peers import CPU_PEERS, CUDA_PEERS, Unable, algorithms, gpuconv_contestant
from bench.suites import Row

ROWS = {
    "network": Row("s", "a", (2, 6, 13, 15), (8, 6, 3, 3), padding=1),
    "strided": Row("s", "b", (2, 3, 23, 23), (8, 3, 7, 7), stride=2, padding=3),
    "depthwise": Row("s", "c", (2, 6, 12, 12), (6, 1, 3, 3), padding=1, groups=6),
    "dilated": Row("s", "d", (1, 4, 17, 17), (4, 4, 3, 3), padding=6, dilation=6),
    "picture": Row("s", "e", (1, 1, 40, 33), (1, 1, 7, 7), padding=3),
    "gaussian": Row("s", "f", (1, 1, 40, 33), (1, 1, 15, 15), padding=7, separable=True),
    "bytes": Row("s", "g", (1, 1, 40, 33), (1, 1, 5, 5), padding=2, x_dtype="uint8"),
    "stack": Row("s", "h", (7, 1, 14, 12), (1, 1, 3, 3), padding=1),
    "signal": Row("s", "i", (1, 1, 300), (1, 1, 31), padding=15),
    "audio": Row("s", "j", (2, 4, 90), (6, 4, 5), stride=2),
    "transposed": Row("s", "k", (2, 6, 9, 7), (6, 5, 4, 4), 2, 1, transposed=True),
    "dgrad": Row("s", "l", (2, 6, 23, 21), (8, 3, 3, 3), 2, 1, groups=2, operation="dgrad"),
    "wgrad": Row("s", "m", (3, 6, 23, 21), (8, 3, 3, 3), 2, 1, groups=2, operation="wgrad"),
    "dilated dgrad": Row("s", "n", (2, 4, 17, 17), (4, 4, 3, 3), 1, 4, 4, operation="dgrad"),
    "dilated wgrad": Row("s", "o", (2, 4, 17, 17), (4, 4, 3, 3), 1, 4, 4, operation="wgrad"),
    "audio dgrad": Row("s", "p", (2, 4, 90), (6, 4, 5), stride=2, operation="dgrad"),
    "audio wgrad": Row("s", "q", (2, 4, 90), (6, 4, 5), stride=2, operation="wgrad"),
    "depthwise wgrad": Row(
        "s", "r", (2, 6, 12, 12), (6, 1, 3, 3), padding=1, groups=6, operation="wgrad"
    ),
}
ABLE = {
    "network": "torch torch_last jax",
    "strided": "torch torch_last jax",
    "depthwise": "torch torch_last jax",
    "dilated": "torch torch_last jax",
    "picture": "torch opencv convolve2d fftconvolve ndimage jax",
    "gaussian": "torch opencv opencv_sep convolve2d fftconvolve ndimage ndimage_sep jax",
    "bytes": "torch opencv convolve2d fftconvolve ndimage",
    "stack": "torch opencv convolve2d fftconvolve ndimage jax",
    "signal": "torch fftconvolve ndimage np.correlate jax",
    "audio": "torch jax",
    "transposed": "torch torch_last jax",
    "dgrad": "torch torch_last jax",
    "wgrad": "torch torch_last jax",
    "dilated dgrad": "torch torch_last jax",
    "dilated wgrad": "torch torch_last jax",
    "audio dgrad": "torch jax",
    "audio wgrad": "torch jax",
    "depthwise wgrad": "torch torch_last jax",
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", CPU_PEERS)
def test_a_peer_is_right_or_unable(kind: str, name: str) -> None:
    peer, row = CPU_PEERS[name], ROWS[kind]
    if not peer.installed:
        pytest.skip(f"{name} is not installed")
    data = row.data()
    if name not in ABLE[kind].split():
        with pytest.raises(Unable):
            peer.build(row, data)
        return
    contestant = peer.build(row, data)
    contestant.before()
    Check(row, data)(contestant.to_host(contestant.run()), contestant.c)


@pytest.mark.parametrize("name", ["torch", "ndimage", "opencv", "jax"])
def test_peers_in_float64(name: str) -> None:
    peer = CPU_PEERS[name]
    if not peer.installed:
        pytest.skip(f"{name} is not installed")
    row = replace(ROWS["picture"], x_dtype="float64", w_dtype="float64")
    try:
        contestant = peer.build(row, row.data())
        Check(row, row.data())(contestant.to_host(contestant.run()), contestant.c)
    finally:
        if name == "jax":  # the peer told the whole process
            import_module("jax").config.update("jax_enable_x64", False)


@pytest.mark.parametrize("kind", ["network", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_in_16_bits(dtype: str, kind: str) -> None:
    pytest.importorskip("torch")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    row = replace(ROWS[kind], x_dtype=dtype, w_dtype=dtype)
    contestant = CPU_PEERS["torch"].build(row, row.data())
    Check(row, row.data())(contestant.to_host(contestant.run()), contestant.c)


@pytest.mark.parametrize("kind", ROWS)
def test_gpuconv_with_every_algorithm_and_in_both_memory_orders(kind: str) -> None:
    row = ROWS[kind]
    data = row.data()
    check = Check(row, data)
    names = list(algorithms(row, "numpy"))
    assert names
    for name in ["auto", *names]:
        contestant = gpuconv_contestant(row, data, "numpy", name)
        assert contestant.info["algorithm"] == name or name == "auto"
        try:
            y = contestant.run()
        except ValueError:  # it looked at w and refused: separable on what is not
            assert name not in ("auto", gpuconv_contestant(row, data, "numpy").info["algorithm"])
            continue
        # An FFT's error is relative to the whole tile, which these bounds are too tight for.
        check(contestant.to_host(y), contestant.c if name != "fft" else 64)
    if row.single_plane:
        with pytest.raises(Unable):
            gpuconv_contestant(row, data, "numpy", channels_last=True)
    else:
        last = gpuconv_contestant(row, data, "numpy", channels_last=True)
        check(last.to_host(last.run()))


def test_gpu_peers_are_named_once_and_need_their_packages() -> None:
    assert {"torch", "torch_bm", "torch_last", "torch_last_bm"} <= CUDA_PEERS.keys()
    assert {"cupyx_ndimage", "cupyx_fftconvolve", "cupyx_convolve2d", "jax"} <= CUDA_PEERS.keys()
    assert all(peer.needs for peer in CUDA_PEERS.values())


def test_torch_on_a_gpu_that_is_not_there_is_unable() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    row = ROWS["network"]
    with pytest.raises(Unable, match="no CUDA device"):
        CUDA_PEERS["torch_bm"].build(row, row.data())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind",
    ["network", "depthwise", "gaussian", "stack", "signal", "transposed", "dgrad", "wgrad"],
)
@pytest.mark.parametrize("name", CUDA_PEERS)
def test_a_gpu_peer_is_right_or_unable(kind: str, name: str) -> None:
    peer, row = CUDA_PEERS[name], ROWS[kind]
    if not peer.installed:
        pytest.skip(f"{name} is not installed")
    data = row.data()
    try:
        contestant = peer.build(row, data)
    except Unable:
        return
    contestant.before()
    Check(row, data)(contestant.to_host(contestant.run()), contestant.c)
