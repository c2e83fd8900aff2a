"""Kernels by name, from text and from files: values, and every error's message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuconv import filters
from gpuconv.filters import KernelError


@pytest.mark.parametrize("name", filters.NAMED)
def test_every_named_kernel_is_float32_with_a_middle(name: str) -> None:
    label, kernel = filters.resolve(name)
    assert label == name
    assert kernel.dtype == np.float32
    assert kernel.ndim == 2
    assert kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1
    assert np.isfinite(kernel).all()


@pytest.mark.parametrize("name", ["identity", "box", "gaussian", "disk", "motion-blur", "sharpen"])
def test_kernels_that_keep_brightness_sum_to_1(name: str) -> None:
    assert filters.named(name).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    ["sobel-x", "sobel-y", "scharr-x", "scharr-y", "prewitt-x", "prewitt-y", "laplacian", "ridge"],
)
def test_derivatives_sum_to_0_exactly(name: str) -> None:
    assert filters.named(name).sum() == 0


def test_slopes_are_positive_where_brightness_grows() -> None:
    """Correlation: the kernel multiplies the picture as both lie."""
    rightwards = np.tile(np.arange(3.0), (3, 1))
    for name in ("sobel", "scharr", "prewitt"):
        assert (filters.named(f"{name}-x") * rightwards).sum() > 0
        assert (filters.named(f"{name}-x") * rightwards.T).sum() == 0
        assert (filters.named(f"{name}-y") * rightwards.T).sum() > 0


def test_known_kernels() -> None:
    np.testing.assert_array_equal(filters.named("ridge"), 9 * np.eye(9)[4].reshape(3, 3) - 1)
    np.testing.assert_array_equal(filters.named("emboss"), [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    np.testing.assert_array_equal(filters.named("box:5"), np.full((5, 5), np.float32(1 / 25)))
    np.testing.assert_array_equal(filters.named("motion-blur:3"), np.eye(3, dtype=np.float32) / 3)


def test_gaussian_has_the_sigma_asked_for() -> None:
    kernel = filters.named("gaussian:31:2.5").astype(np.float64)
    at = np.arange(31) - 15
    assert (kernel.sum(axis=0) * at**2).sum() == pytest.approx(2.5**2, rel=1e-3)
    np.testing.assert_allclose(kernel, kernel.T)
    # The default sigma of size 7 is 0.3*((7-1)/2 - 1) + 0.8 = 1.4.
    np.testing.assert_array_equal(filters.named("gaussian:7"), filters.named("gaussian:7:1.4"))


def test_disk_is_round_and_log_sums_to_0() -> None:
    disk = filters.named("disk:9")
    np.testing.assert_array_equal(disk, disk[::-1])
    np.testing.assert_array_equal(disk, disk.T)
    assert disk[0, 0] == 0 < disk[0, 4]
    log = filters.named("log:13")
    assert abs(log.sum()) < 1e-5
    assert log[6, 6] < 0 < log[6, 0]


def test_unsharp_is_twice_the_picture_minus_its_blur() -> None:
    identity = np.zeros((7, 7))
    identity[3, 3] = 1
    np.testing.assert_allclose(
        filters.named("unsharp:7"), 2 * identity - filters.named("gaussian:7"), atol=1e-7
    )


def test_labels() -> None:
    assert filters.resolve("gaussian:9:2.5")[0] == "gaussian-9-2.5"
    assert filters.resolve("1 0 -1")[0] == "kernel"


@pytest.mark.parametrize(
    "text",
    [
        "1 0 -1; 2 0 -2; 1 0 -1",
        "1,0,-1;2,0,-2;1,0,-1",
        "1, 0, -1\n2, 0, -2\n1, 0, -1\n",
        " 1\t0 -1 ,; 2e0 , 0. -2/1;;1.0 0/7 -1",
    ],
)
def test_parse(text: str) -> None:
    kernel = filters.parse(text)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, [[1, 0, -1], [2, 0, -2], [1, 0, -1]])


def test_parse_fractions_rows_and_single_numbers() -> None:
    np.testing.assert_array_equal(filters.parse("1/9 -2/3"), np.float32([[1 / 9, -2 / 3]]))
    assert filters.parse("1;2;3").shape == (3, 1)
    assert filters.parse("2").shape == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the kernel is empty; rows of numbers"),
        (" ; \n", "the kernel is empty; rows of numbers"),
        ("1 2 3; 4 5", "row 1 has 3 numbers but row 2 has 2; all rows take the same count"),
        ("1 two 3", "has 'two' where a number should be"),
        ("1,,3", "has '' where a number should be"),
        ("1/2/3", "has '1/2/3' where a number should be"),
        ("1/0", "has '1/0', a division by zero"),
        ("1 nan; 2 3", "has nan at row 1, column 2; finite numbers within float32 would do"),
        ("1; inf", "has inf at row 2, column 1"),
        ("1e300", "has 1e+300 at row 1, column 1"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(KernelError) as error:
        filters.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sobelx", "no kernel is called 'sobelx' (did you mean 'sobel-x'?); names are identity,"),
        ("zzz", "no kernel is called 'zzz'; names are identity,"),
        ("box:4", "the size is '4'; an odd number from 1 to 1001 would do"),
        ("box:-3", "the size is '-3'; an odd number"),
        ("box:1003", "the size is '1003'; an odd number"),
        ("box:", "the size is ''; an odd number"),
        ("log:1", "the size is '1'; an odd number from 3 to"),
        ("box:3:1", "box is written 'box:SIZE', nothing more"),
        ("ridge:3", "ridge is written 'ridge', nothing more"),
        ("gaussian:5:0", "sigma is '0'; a number from 0.01 up would do"),
        ("gaussian:5:wide", "sigma is 'wide'; a number from 0.01 up would do"),
        ("gaussian:5:nan", "sigma is 'nan'; a number from 0.01 up would do"),
    ],
)
def test_name_errors(spec: str, message: str) -> None:
    with pytest.raises(KernelError) as error:
        filters.resolve(spec)
    assert message in str(error.value)


def test_kernel_files(tmp_path: Path) -> None:
    expected = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1.5]])
    np.savetxt(tmp_path / "a.txt", expected, header="made by numpy.savetxt")
    np.savetxt(tmp_path / "b.csv", expected, delimiter=",")
    np.save(tmp_path / "c.npy", expected)
    (tmp_path / "d.csv").write_bytes("\ufeff1,0,-1\r\n2,0,-2\r\n1,0,-1.5\r\n".encode())
    (tmp_path / "noext").write_text("1 0 -1  # first\n2 0 -2\n1 0 -3/2\n")
    for name in ("a.txt", "b.csv", "c.npy", "d.csv", "noext"):
        label, kernel = filters.resolve(str(tmp_path / name))
        assert label == Path(name).stem
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, expected)


def test_npy_of_integers_bool_and_fortran_order(tmp_path: Path) -> None:
    path = tmp_path / "k.npy"
    for array in (np.arange(6).reshape(2, 3), np.eye(3, dtype=bool), np.eye(2, 3, order="F")):
        np.save(path, array)
        kernel = filters.load(path)
        np.testing.assert_array_equal(kernel, array)
        assert kernel.flags.c_contiguous


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3), "the array is 1-D, of shape (3,); a kernel is 2-D"),
        (np.ones((1, 3, 3)), "the array is 3-D, of shape (1, 3, 3)"),
        (np.ones((0, 3)), "the array is empty, of shape (0, 3)"),
        (np.ones((2, 2), complex), "is of type complex128; real numbers would do"),
        (np.array([["a"]]), "is of type <U1; real numbers would do"),
        (np.array([[np.nan, 1]]), "has nan at row 1, column 1"),
    ],
)
def test_npy_errors(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "k.npy"
    np.save(path, array)
    with pytest.raises(KernelError) as error:
        filters.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_broken_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.npy", b"hello", "not a .npy array of numbers"),
        ("b.npy", b"", "not a .npy array of numbers"),
        ("c.txt", b"\xff\xfe\x00", "not text; rows of numbers, or an array in .npy, would do"),
        ("d.txt", b"", "the kernel is empty"),
        ("e.csv", b"1,2\n3\n", "row 1 has 2 numbers but row 2 has 1"),
        ("f.csv", b"x,y\n1,2\n", "has 'x' where a number should be"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(KernelError) as error:
            filters.resolve(str(path))
        assert message in str(error.value)
        assert str(path) in str(error.value)
    np.save(tmp_path / "g.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(KernelError, match=r"not a \.npy array"):
        filters.resolve(str(tmp_path / "g.npy"))
    with pytest.raises(FileNotFoundError):
        filters.resolve(str(tmp_path / "missing.csv"))
