"""The command line: pictures against an independent computation, messages and exit codes."""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cli, filters

Image = pytest.importorskip("PIL.Image")

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in an empty folder, on the CPU."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> SimpleNamespace:
        words = [str(a) for a in arguments]
        if words[:1] == ["filter"] and "--backend" not in words:
            words += ["--backend", "numpy"]
        status = cli.main(words)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return call


def picture(shape: tuple[int, ...], dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True
    )


def correlated(
    plane: np.ndarray, kernel: np.ndarray, mode: str | None = "reflect", stride: int = 1
) -> np.ndarray:
    """One plane, correlated in float64 tap by tap, padded by (R-1)/2 unless mode is None."""
    filter_h, filter_w = kernel.shape
    padded = plane.astype(np.float64)
    if mode is not None:
        pads = ((filter_h // 2,) * 2, (filter_w // 2,) * 2)
        padded = np.pad(padded, pads, mode=mode)
    height, width = padded.shape[0] - filter_h + 1, padded.shape[1] - filter_w + 1
    total = np.zeros((height, width))
    for r in range(filter_h):
        for s in range(filter_w):
            total += kernel[r, s] * padded[r : r + height, s : s + width]
    return total[::stride, ::stride]


def clipped(values: np.ndarray, dtype: Any = np.uint8) -> np.ndarray:
    return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def one_error(result: SimpleNamespace, status: int, *parts: str) -> None:
    """The command failed with one line that says all this."""
    assert result.status == status
    assert result.out == ""
    assert result.err.startswith("gpuconv: error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err


# --------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------


def test_the_sample_is_used_where_no_picture_is_named(run: Run) -> None:
    with Image.open(cli.SAMPLE) as sample:
        assert sample.mode == "RGB"
        width, height = sample.size
    assert min(width, height) >= 400
    result = run("filter", "--kernel", "identity")
    assert result.status == 0
    assert result.err == ""
    assert re.fullmatch(
        rf"sample\.jpg {width}x{height} RGB -> sample-identity\.png {width}x{height} "
        r"\(numpy, \w+, [0-9.]+ ms\)\n",
        result.out,
    )
    np.testing.assert_array_equal(read("sample-identity.png"), read(cli.SAMPLE))
    assert os.listdir() == ["sample-identity.png"]


def test_grey(run: Run) -> None:
    image = picture((23, 31))
    Image.fromarray(image).save("a.png")
    assert run("filter", "a.png", "--kernel", "box:5").status == 0
    np.testing.assert_array_equal(
        read("a-box-5.png"), clipped(correlated(image, np.full((5, 5), 1 / 25)))
    )


@pytest.mark.parametrize(
    ("mode", "numpy_mode"),
    [
        ("zeros", "constant"),
        ("reflect", "reflect"),
        ("symmetric", "symmetric"),
        ("replicate", "edge"),
        ("circular", "wrap"),
    ],
)
def test_rgb_in_every_padding_mode(run: Run, mode: str, numpy_mode: str) -> None:
    image = picture((12, 17, 3))
    Image.fromarray(image).save("a.png")
    kernel = np.array([[1, 2, 3], [0, -4, 1], [0, 0, -2]])
    result = run(
        "filter", "a.png", "-k", "1 2 3; 0 -4 1; 0 0 -2", "--padding-mode", mode, "-o", "b.png"
    )
    assert result.status == 0
    for channel in range(3):
        np.testing.assert_array_equal(
            read("b.png")[:, :, channel],
            clipped(correlated(image[:, :, channel], kernel, numpy_mode)),
        )


def test_alpha_is_kept_and_follows_the_geometry(run: Run) -> None:
    image = picture((15, 20, 4))
    Image.fromarray(image).save("a.png")
    assert run("filter", "a.png", "-k", "box:3", "-o", "same.png").status == 0
    same = read("same.png")
    np.testing.assert_array_equal(same[:, :, 3], image[:, :, 3])
    np.testing.assert_array_equal(
        same[:, :, 1], clipped(correlated(image[:, :, 1], np.full((3, 3), 1 / 9)))
    )
    assert run("filter", "a.png", "-k", "box:5", "--padding", "valid", "-o", "v.png").status == 0
    np.testing.assert_array_equal(read("v.png")[:, :, 3], image[2:-2, 2:-2, 3])
    assert run("filter", "a.png", "-k", "box:3", "--stride", "2,3", "--padding", "1", "-o",
               "s.png").status == 0  # fmt: skip
    np.testing.assert_array_equal(read("s.png")[:, :, 3], image[::2, ::3, 3])
    assert run("filter", "a.png", "-k", "box:3", "--padding", "full", "-o", "f.png").status == 0
    np.testing.assert_array_equal(read("f.png")[:, :, 3], np.pad(image[:, :, 3], 1, mode="edge"))


def test_alpha_of_identity_matches_its_colours_in_every_geometry(run: Run) -> None:
    """The pixel under the kernel's middle gives both."""
    grey = picture((14, 19))
    Image.fromarray(np.stack([grey, grey], axis=-1)).save("a.png")
    for stride in ("1", "2", "3,2"):
        for padding in ("same", "same_lower", "valid", "1", "0:1,1:0"):
            options = ("--stride", stride, "--padding", padding)
            assert run("filter", "a.png", "-k", "identity", *options, "-o", "b.png").status == 0
            result = read("b.png")
            assert Image.open("b.png").mode == "LA"
            np.testing.assert_array_equal(result[:, :, 0], result[:, :, 1])


def test_16_bit_grey(run: Run) -> None:
    image = picture((18, 21), np.uint16)
    Image.fromarray(image).save("a.png")
    result = run("filter", "a.png", "-k", "gaussian:5")
    assert result.status == 0
    assert "a.png 21x18 I;16 -> a-gaussian-5.png 21x18" in result.out
    written = read("a-gaussian-5.png")
    assert written.dtype == np.uint16
    expected = correlated(image, filters.gaussian(5))
    assert np.abs(written - expected).max() <= 0.5 + 65535 * 1e-5
    assert run("filter", "a.png", "-k", "sobel-x").status == 0
    assert abs(int(read("a-sobel-x.png").mean()) - 32768) < 2000


def test_16_bit_in_other_orders_and_32_bit_integers(run: Run) -> None:
    image = picture((8, 9), np.uint16)
    Image.fromarray(image.astype(">u2")).save("big.tif")
    Image.fromarray(image.astype(np.int32)).save("wide.tif")
    for name in ("big.tif", "wide.tif"):
        assert run("filter", name, "-k", "identity", "-o", "b.png").status == 0
        np.testing.assert_array_equal(read("b.png"), image)
    Image.fromarray(image.astype(np.int32) - 70000).save("low.tif")
    one_error(run("filter", "low.tif", "-k", "box"), 1, "low.tif: grey values from", "would do")
    Image.fromarray(image.astype(np.float32)).save("float.tif")
    one_error(run("filter", "float.tif", "-k", "box"), 1, "float.tif: floating-point pixels")


def test_palette_bilevel_and_cmyk_are_converted(run: Run) -> None:
    rgb = Image.fromarray(picture((10, 12, 3)))
    palette = rgb.quantize(8)
    palette.save("p.png")
    rgb.convert("1").save("one.png")
    rgb.convert("CMYK").save("c.tif")
    clear = rgb.quantize(8)
    clear.info["transparency"] = 3
    clear.save("t.png", transparency=3)
    for name, mode, expected in (
        ("p.png", "RGB", palette.convert("RGB")),
        ("one.png", "L", rgb.convert("1").convert("L")),
        ("c.tif", "RGB", rgb.convert("CMYK").convert("RGB")),
        ("t.png", "RGBA", Image.open("t.png").convert("RGBA")),
    ):
        result = run("filter", name, "-k", "identity", "-o", "b.png")
        assert result.status == 0
        assert f" {mode} ->" in result.out
        np.testing.assert_array_equal(read("b.png"), np.asarray(expected))


def test_exif_orientation_is_respected(run: Run) -> None:
    image = picture((10, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(image).save("a.png", exif=exif)
    result = run("filter", "a.png", "-k", "identity", "-o", "b.png")
    assert "a.png 10x16 L -> b.png 10x16" in result.out
    np.testing.assert_array_equal(read("b.png"), np.rot90(image, -1))
    assert Image.open("b.png").getexif().get(0x0112, 1) == 1


def test_stride_valid_and_full(run: Run) -> None:
    image = picture((20, 27))
    Image.fromarray(image).save("a.png")
    kernel = np.full((3, 3), 1 / 9)
    for options, expected in (
        (("--stride", "2", "--padding", "1"), correlated(image, kernel, stride=2)),
        (("--padding", "valid"), correlated(image, kernel, None)),
        (("--padding", "full"), correlated(np.pad(image, 1, mode="reflect"), kernel)[:, :]),
    ):
        result = run("filter", "a.png", "-k", "box", *options, "-o", "b.png")
        if "full" in options:
            expected = correlated(np.pad(image, 2, mode="reflect"), kernel, None)
        assert f"-> b.png {expected.shape[1]}x{expected.shape[0]} (" in result.out
        np.testing.assert_array_equal(read("b.png"), clipped(expected))


def test_asymmetric_padding(run: Run) -> None:
    image = picture((9, 9))
    Image.fromarray(image).save("a.png")
    assert run("filter", "a.png", "-k", "1/2 1/2", "--padding", "0:0,0:1", "-o", "b.png",
               "--padding-mode", "zeros").status == 0  # fmt: skip
    padded = np.pad(image.astype(float), ((0, 0), (0, 1)))
    np.testing.assert_array_equal(read("b.png"), clipped((padded[:, 1:] + padded[:, :-1]) / 2))


def test_kernel_files_and_a_minus_sign_in_front(run: Run) -> None:
    image = picture((9, 11))
    Image.fromarray(image).save("a.png")
    Path("mine.csv").write_text("0,0,0\n0,1/2,0\n0,0,0\n")
    assert run("filter", "a.png", "-k", "mine.csv").status == 0
    np.testing.assert_array_equal(read("a-mine.png"), clipped(image / 2))
    for words in (("-k", "-1,0,2"), ("--kernel", "-1 0 2"), ("--kernel=-1,0,2",)):
        assert run("filter", "a.png", *words, "-o", "b.png").status == 0
        np.testing.assert_array_equal(
            read("b.png"), clipped(correlated(image, np.array([[-1, 0, 2]])))
        )


def test_jpeg_out(run: Run) -> None:
    Image.fromarray(np.full((32, 32, 3), 100, np.uint8)).save("a.png")
    assert run("filter", "a.png", "-k", "box", "-o", "b.jpg").status == 0
    with Image.open("b.jpg") as written:
        assert written.format == "JPEG"
    assert np.abs(read("b.jpg").astype(int) - 100).max() <= 2


def test_an_existing_result_is_replaced_and_permissions_follow_the_umask(run: Run) -> None:
    Image.fromarray(picture((8, 8))).save("a.png")
    Path("b.png").write_text("old")
    assert run("filter", "a.png", "-k", "box", "-o", "b.png").status == 0
    assert read("b.png").shape == (8, 8)
    Path("plain").touch()
    assert Path("b.png").stat().st_mode == Path("plain").stat().st_mode


# --------------------------------------------------------------------------------------------
# How results become pixels
# --------------------------------------------------------------------------------------------


def test_slopes_are_shown_around_mid_grey(run: Run) -> None:
    image = np.zeros((16, 40), np.uint8)
    image[:, 10:30] = 100
    Image.fromarray(image).save("a.png")
    result = run("filter", "a.png", "-k", "sobel-x")
    assert (
        "note: signed result: 0 is mid-grey, -400 and below is black, 400 and above" in result.out
    )
    shown = read("a-sobel-x.png")
    assert (shown[:, 9:11] == 255).all()
    assert (shown[:, 29:31] == 1).all()
    assert (shown[:, 12:28] == 128).all()


def test_second_derivatives_are_shown_by_size(run: Run) -> None:
    image = np.full((16, 16), 10, np.uint8)
    image[8, 8] = 60
    Image.fromarray(image).save("a.png")
    result = run("filter", "a.png", "-k", "ridge")
    assert "note: absolute values: 0 is black, " in result.out
    shown = read("a-ridge.png")
    assert shown[8, 8] == 255
    assert (shown[7, 7:10] > 0).all()
    assert (shown[:6] == 0).all()


def test_clipping_is_told(run: Run) -> None:
    image = np.full((10, 10), 100, np.uint8)
    image[0, 0] = 200
    Image.fromarray(image).save("a.png")
    result = run("filter", "a.png", "-k", "2", "-o", "b.png")
    assert "note: 1.0% of the values are outside 0..255: shown as black or white" in result.out
    assert "the kernel sums to 2, divided by that" in result.out
    assert "note" not in run("filter", "a.png", "-k", "box", "-o", "b.png").out
    assert "note" not in run("filter", "a.png", "-k", "1.2", "-o", "b.png").out


def test_show_can_be_chosen(run: Run) -> None:
    image = picture((12, 12))
    Image.fromarray(image).save("a.png")
    exact = correlated(image, filters.named("sobel-y"))
    for show, expected in (
        ("clip", np.clip(exact, 0, 255)),
        ("abs", np.clip(np.abs(exact) * 255 / scale(exact), 0, 255)),
        ("signed", np.clip(128 + exact * 127 / scale(exact), 0, 255)),
    ):
        assert run("filter", "a.png", "-k", "sobel-y", "--show", show, "-o", "b.png").status == 0
        assert np.abs(read("b.png") - expected).max() <= 0.51


def scale(exact: np.ndarray) -> float:
    """The scale of signed results: of what the padding had no part in."""
    size = np.abs(exact[1:-1, 1:-1])
    return max(float(np.percentile(size, 99)), size.max() / 8)


def test_flat_pictures_and_zero_kernels(run: Run) -> None:
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save("a.png")
    for kernel, expected in (("sobel-x", 128), ("ridge", 0), ("0", 0)):
        assert run("filter", "a.png", "-k", kernel, "-o", "b.png").status == 0
        assert (read("b.png") == expected).all()


def test_a_little_detail_does_not_bring_out_the_noise(run: Run) -> None:
    image = np.full((64, 64), 200, np.uint8)
    image[::7, ::7] += 1
    image[30, 30:33] = 0
    Image.fromarray(image).save("a.png")
    assert run("filter", "a.png", "-k", "ridge").status == 0
    assert np.sort(read("a-ridge.png").ravel())[-40] < 20


def test_a_dark_rim_of_zeros_does_not_set_the_scale(run: Run) -> None:
    ramp = np.tile(np.arange(100, 164, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save("a.png")
    result = run("filter", "a.png", "-k", "sobel-x", "--padding-mode", "zeros")
    assert "8 and above is white" in result.out


# --------------------------------------------------------------------------------------------
# Side by side
# --------------------------------------------------------------------------------------------


def test_side_by_side(run: Run) -> None:
    image = picture((60, 96, 3))
    Image.fromarray(image).save("a.png")
    result = run("filter", "a.png", "-k", "identity", "--side-by-side")
    assert "-> a-identity.png 96x60" in result.out
    sheet = read("a-identity.png")
    assert sheet.shape[1] == 2 * 96 + 8
    np.testing.assert_array_equal(sheet[:60, :96], image)
    np.testing.assert_array_equal(sheet[:60, 104:], image)
    assert (sheet[:, 96:104] == 255).all()
    if sheet.shape[0] > 60:  # captions: dark letters on white
        for strip in (sheet[60:, :96], sheet[60:, 104:]):
            assert strip.min() < 100
            assert np.median(strip) == 255


def test_side_by_side_of_a_smaller_and_of_a_larger_result(run: Run) -> None:
    image = picture((60, 96))
    Image.fromarray(image).save("a.png")
    assert run("filter", "a.png", "-k", "0 1; 0 0", "--stride", "2", "--padding", "valid", "-o",
               "b.png", "--side-by-side", "--show", "clip").status == 0  # fmt: skip
    sheet = read("b.png")
    small = image[0:59:2, 1:96:2]
    assert small.shape == (30, 48)
    doubled = small.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(sheet[:60, 104:, 0], doubled)
    assert run("filter", "a.png", "-k", "identity", "--padding", "2", "-o", "c.png",
               "--side-by-side").status == 0  # fmt: skip
    sheet = read("c.png")
    assert sheet.shape[1] == 2 * 98 + 8
    np.testing.assert_array_equal(sheet[1:61, 1:97, 0], image)
    assert (sheet[:62, 0] == 255).all()


def test_side_by_side_of_alpha_and_16_bits(run: Run) -> None:
    rgba = picture((40, 50, 4))
    rgba[:, :, 3] = 255
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save("a.png")
    assert run("filter", "a.png", "-k", "identity", "--side-by-side", "-o", "b.png").status == 0
    assert (read("b.png")[0, 0] == 255).all()
    np.testing.assert_array_equal(read("b.png")[1:40, :50], rgba[1:, :, :3])
    deep = (picture((40, 50)).astype(np.uint16)) * 257
    Image.fromarray(deep).save("d.png")
    assert run("filter", "d.png", "-k", "identity", "--side-by-side", "-o", "b.png").status == 0
    np.testing.assert_array_equal(read("b.png")[:40, :50, 0], deep // 257)


def test_a_long_caption_is_shortened(run: Run) -> None:
    name = "a" * 120 + ".png"
    Image.fromarray(picture((40, 60))).save(name)
    assert run("filter", name, "-k", "box", "--side-by-side", "-o", "b.png").status == 0
    assert (read("b.png")[:, 60:68] == 255).all()


# --------------------------------------------------------------------------------------------
# Several pictures
# --------------------------------------------------------------------------------------------


def test_a_folder_and_a_file(run: Run) -> None:
    Path("in/deeper").mkdir(parents=True)
    for name in ("in/a.png", "in/b.JPG", "in/.hidden.png", "in/deeper/c.png", "d.png"):
        Image.fromarray(picture((9, 9))).save(name)
    Path("in/readme.txt").write_text("no picture")
    result = run("filter", "in", "d.png", "-k", "emboss", "-o", "out/new")
    assert result.status == 0
    assert result.err == ""
    lines = [line for line in result.out.splitlines() if "note" not in line]
    assert [line.split()[0] for line in lines] == ["a.png", "b.JPG", "d.png"]
    assert sorted(os.listdir("out/new")) == ["a-emboss.png", "b-emboss.png", "d-emboss.png"]


def test_one_picture_is_no_place_for_several(run: Run) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(picture((9, 9))).save(name)
    words = ("filter", "a.png", "b.png", "-k", "box", "-o")
    one_error(
        run(*words, "c.png"), 2, "'c.png' is one picture, for 2 results; a folder, or 'c.png/'"
    )
    assert sorted(os.listdir()) == ["a.png", "b.png"]
    assert run(*words, "c.png/").status == 0
    assert run(*words, "c.png").status == 0  # it is a folder now
    assert run(*words, "v1.2").status == 0
    assert sorted(os.listdir("c.png")) == sorted(os.listdir("v1.2")) == ["a-box.png", "b-box.png"]


def test_others_go_on_where_one_fails(run: Run) -> None:
    Image.fromarray(picture((9, 9))).save("a.png")
    Image.fromarray(picture((9, 9))).save("c.png")
    Path("b.png").write_text("no picture")
    result = run("filter", "a.png", "b.png", "missing.png", "c.png", "-k", "box", "-o", "out")
    assert result.status == 1
    assert sorted(os.listdir("out")) == ["a-box.png", "c-box.png"]
    errors = result.err.splitlines()
    assert errors[0] == ("gpuconv: error: b.png: not a picture; a PNG or JPEG file would do")
    assert errors[1].startswith("gpuconv: error: missing.png: No such file or directory")
    assert errors[2] == "gpuconv: error: 2 of 4 inputs failed, 2 pictures were written"


def test_an_empty_folder(run: Run) -> None:
    Path("empty").mkdir()
    one_error(run("filter", "empty", "-k", "box"), 1, "empty: no pictures in this folder")
    Image.fromarray(picture((9, 9))).save("a.png")
    result = run("filter", "empty", "a.png", "-k", "box")
    assert result.status == 1
    assert "1 of 2 inputs failed, 1 pictures were written" in result.err
    assert Path("a-box.png").exists()


def test_two_results_of_one_name(run: Run) -> None:
    Path("x").mkdir()
    Image.fromarray(picture((9, 9))).save("a.png")
    Image.fromarray(picture((9, 9))).save("x/a.jpg")
    one_error(
        run("filter", "a.png", "x/a.jpg", "-k", "box"),
        2,
        f"a.png and {Path('x/a.jpg')} would both be written to a-box.png",
    )


def test_progress_is_shown_where_standard_error_is_a_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    for name in ("a.png", "b.png"):
        Image.fromarray(picture((9, 9))).save(name)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        result = run("filter", "a.png", "b.png", "-k", "box")
    assert result.status == 0
    assert "filter" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    # What goes to a file or a pipe is the lines alone.
    assert len(result.out.splitlines()) == 2
    assert result.out.startswith("a.png 9x9 L -> a-box.png")


# --------------------------------------------------------------------------------------------
# Errors of filter
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("-k", "sobelx"), ("argument -k/--kernel: no kernel is called 'sobelx'", "'sobel-x'")),
        (("-k", "1 2; 3"), ("argument -k/--kernel: the kernel's row 1 has 2 numbers",)),
        (("-k", "1 x"), ("argument -k/--kernel: the kernel has 'x' where a number",)),
        (("-k", "box:2"), ("argument -k/--kernel: kernel 'box:2': the size is '2'",)),
        (("-k", "box", "--stride", "0"), ("stride is at least 1; got 0",)),
        (("-k", "box", "--stride", "1,2,3"), ("stride takes", "(1, 2, 3)")),
        (("-k", "box", "--stride", "fast"), ("argument --stride: 'fast' is no list of numbers",)),
        (("-k", "box", "--padding", "some"), ("argument --padding: 'some' is no padding",)),
        (("-k", "box", "--padding", "1:2:3,1"), ("'1:2:3,1' is no padding; valid, same,",)),
        (("-k", "box", "--padding", "1,2,3"), ("padding takes one integer", "(1, 2, 3)")),
        (("-k", "box", "--padding-mode", "mirror"), ("--padding-mode: invalid choice: 'mirror'",)),
        (("-k", "box", "--backend", "tpu"), ("--backend: invalid choice: 'tpu'",)),
        (("-k", "box", "-o", "b.xyz"), ("-o/--out: 'b.xyz' does not end as a picture", ".png")),
        (("-k", "box", "-o", "b"), ("-o/--out: 'b' does not end as a picture",)),
        (("-k", "box", "-o", "a.png"), ("a.png is an input and would be overwritten",)),
        (("-k", "box", "--wrong"), ("unrecognized arguments: --wrong", "--help explains")),
        ((), ("the following arguments are required: -k/--kernel",)),
    ],
)
def test_wrong_options(run: Run, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    image = picture((9, 9))
    Image.fromarray(image).save("a.png")
    one_error(run("filter", "a.png", *words), 2, *parts)
    assert os.listdir() == ["a.png"]
    np.testing.assert_array_equal(read("a.png"), image)


def test_an_input_is_not_overwritten_by_any_name(run: Run) -> None:
    Path("out").mkdir()
    Image.fromarray(picture((9, 9))).save("a.png")
    Image.fromarray(picture((9, 9))).save("out/a-box.png")
    Path("link.png").symlink_to("a.png")
    parts = ("is an input and would be overwritten; another -o would do",)
    one_error(run("filter", "a.png", "-k", "box", "-o", "link.png"), 2, "link.png", *parts)
    one_error(run("filter", "a.png", "out/a-box.png", "-k", "box", "-o", "out"), 2, *parts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "No such file or directory; a readable picture would do"),
        ("text.png", b"hello", "not a picture; a PNG or JPEG file would do"),
        ("empty.png", b"", "not a picture"),
    ],
)
def test_inputs_that_are_no_pictures(
    run: Run, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    one_error(run("filter", name, "-k", "box"), 1, f"{name}: {message}")
    assert not Path(f"{Path(name).stem}-box.png").exists()


def test_truncated_and_broken_pictures(run: Run) -> None:
    Image.fromarray(picture((64, 64, 3))).save("whole.png")
    whole = Path("whole.png").read_bytes()
    for cut in (20, 60, 3000):
        Path("cut.png").write_bytes(whole[:cut])
        one_error(run("filter", "cut.png", "-k", "box"), 1, "cut.png: ", "would do")
    assert sorted(os.listdir()) == ["cut.png", "whole.png"]


def test_a_picture_too_large_to_be_meant(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture((64, 64))).save("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    one_error(run("filter", "a.png", "-k", "box"), 1, "a.png: a broken picture", "4096 pixels")


def test_missing_kernel_file(run: Run) -> None:
    one_error(run("filter", "-k", "k.csv"), 1, "kernel file k.csv: No such file or directory")


def test_a_kernel_larger_than_the_picture(run: Run) -> None:
    Image.fromarray(picture((4, 9))).save("a.png")
    one_error(
        run("filter", "a.png", "-k", "box:5", "--padding", "valid"),
        1,
        "a.png: plan_conv2d: the output would be empty along H",
        "would do",
    )
    assert run("filter", "a.png", "-k", "box:21").status == 0


def test_outputs_that_cannot_be_written(run: Run) -> None:
    Image.fromarray(picture((9, 9, 4))).save("a.png")
    Path("file").touch()
    Path("folder.png").mkdir()
    before = sorted(os.listdir())
    for out, reason in (
        ("file/b.png", "Not a directory"),
        ("none/b.png", "No such file or directory"),
        ("b.jpg", "JPEG can't hold this picture (cannot write mode RGBA as JPEG); a .png would"),
    ):
        one_error(run("filter", "a.png", "-k", "box", "-o", out), 1, f"{out}: ", reason)
    one_error(run("filter", "a.png", "-k", "box", "-o", "file/"), 1, "file: File exists")
    assert sorted(os.listdir()) == before
    Path("a-box.png").mkdir()
    one_error(run("filter", "a.png", "-k", "box"), 1, "a-box.png: cannot be written: Is a dir")
    assert sorted(os.listdir()) == sorted([*before, "a-box.png"])


def test_nothing_is_left_where_writing_stops(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture((9, 9))).save("a.png")
    Path("b.png").write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    one_error(
        run("filter", "a.png", "-k", "box", "-o", "b.png"),
        1,
        "b.png: cannot be written: No space left on device",
    )
    assert sorted(os.listdir()) == ["a.png", "b.png"]
    assert Path("b.png").read_text() == "old"


def test_a_backend_that_cannot_run_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise gpuconv.BackendError(f"backend {name!r} cannot run here: no driver")

    monkeypatch.setattr(gpuconv, "use_backend", none)
    Image.fromarray(picture((9, 9))).save("a.png")
    one_error(
        run("filter", "a.png", "-k", "box", "--backend", "cuda"),
        1,
        "--backend cuda: backend 'cuda' cannot run here: no driver; numpy works anywhere",
    )
    assert os.listdir() == ["a.png"]


def test_out_of_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any, **__: Any) -> None:
        raise MemoryError

    Image.fromarray(picture((9, 9))).save("a.png")
    monkeypatch.setattr(gpuconv, "conv2d", hungry)
    one_error(run("filter", "a.png", "-k", "box"), 1, "a.png: not enough memory")


def test_without_pillow_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    one_error(run("filter", "-k", "box"), 1, "Pillow", "pip install 'gpuconv[cli]'")


def test_without_rich_there_is_no_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name in ("a.png", "b.png"):
        Image.fromarray(picture((9, 9))).save(name)
    result = run("filter", "a.png", "b.png", "-k", "box")
    assert result.status == 0
    assert result.err == ""


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpuconv, "conv2d", interrupt)
    result = run("filter", "-k", "box")
    assert (result.status, result.out, result.err) == (130, "", "")
    assert os.listdir() == []


# --------------------------------------------------------------------------------------------
# plan, info, and the command as a whole
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        ("--x 8,4,100 --w 16,4,3 --padding 1", lambda: gpuconv.plan_conv1d(
            (8, 4, 100), (16, 4, 3), padding=1, backend="numpy")),
        ("--x 2,8,20,20 --w 8,1,3,3 --groups 8 --stride 2,1 --padding 0:1,2 --dilation 2 "
         "--padding-mode reflect --dtype float64 --workspace-limit 1MiB", lambda:
         gpuconv.plan_conv2d((2, 8, 20, 20), (8, 1, 3, 3), groups=8, stride=(2, 1),
                             padding=((0, 1), 2), dilation=2, padding_mode="reflect",
                             dtype="float64", workspace_limit=1 << 20, backend="numpy")),
        ("--x 2,20,20,8 --w 8,8,3,3 --layout NHWC --padding same --precision ieee "
         "--algorithm auto", lambda: gpuconv.plan_conv2d(
            (2, 20, 20, 8), (8, 8, 3, 3), layout="NHWC", padding="same", backend="numpy")),
        ("--x 1x2x5x6x7 --w 4x2x3x3x3", lambda: gpuconv.plan_conv3d(
            (1, 2, 5, 6, 7), (4, 2, 3, 3, 3), backend="numpy")),
    ],
)  # fmt: skip
def test_plan(run: Run, words: str, plan: Callable[[], Any]) -> None:
    result = run("plan", *words.split(), "--backend", "numpy")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{plan()}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--x 1,2,8,8 --w 4,3,3,3", "x has 2 channels but w (4, 3, 3, 3) with groups=1 needs 3"),
        ("--x 1,2,8,8 --w 4,3", "argument --w: (4, 3) has 2 numbers; 3 (K,C/G,S), 4 (K,C/G,R,S)"),
        ("--x 1,2,8,8", "the following arguments are required: --w"),
        ("--x 1,2,-8,8 --w 4,2,3,3", "argument --x: '1,2,-8,8' is no list of numbers"),
        ("--x 1,2,8,8 --w 4,2,3,3 --workspace-limit 3X", "--workspace-limit: '3X' is no size"),
        ("--x 1,2,8,8 --w 4,2,3,3 --algorithm magic", "magic"),
        ("--x 1,2,8,8 --w 4,2,3,3 --dtype float31", "float31"),
        ("--x 1,2,8,8 --w 4,2,3,3 --layout CHWN", "CHWN"),
        ("--x 1,2,8,8 --w 4,2,9,3", "the output would be empty along H"),
    ],
)
def test_plan_errors(run: Run, words: str, part: str) -> None:
    one_error(run("plan", *words.split(), "--backend", "numpy"), 2, part)


def test_plan_for_a_backend_that_cannot_run_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise gpuconv.BackendError("backend 'cuda' cannot run here: no driver")

    monkeypatch.setattr(gpuconv, "plan_conv2d", none)
    one_error(run("plan", "--x", "1,2,8,8", "--w", "4,2,3,3", "--backend", "cuda"), 1, "no driver")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("3KiB", 3072),
        ("2m", 2 << 20),
        ("64 MiB", 64 << 20),
        ("1G", 1 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli._bytes(text) == size


def test_info_is_show_config(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("info")
    gpuconv.show_config()
    assert (result.status, result.err) == (0, "")
    assert result.out == capsys.readouterr().out


@pytest.mark.parametrize("command", ["filter", "plan", "info"])
def test_every_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"  gpuconv {command}" in out.partition("example")[2]
    if command == "filter":
        for name in filters.NAMED:
            assert f"\n  {name} " in out


def test_no_command_and_a_wrong_one(run: Run) -> None:
    one_error(run(), 2, "the following arguments are required: filter|plan|info")
    one_error(run("paint"), 2, "invalid choice: 'paint'")


def in_a_process(
    *words: str, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "gpuconv", *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=Path(cli.__file__).resolve().parents[1],
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_version_and_errors_in_a_process() -> None:
    done = in_a_process("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.split() == [b"gpuconv", gpuconv.__version__.encode()]
    done = in_a_process("filter", "-k", "nothing")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"gpuconv: error: ")


def test_a_terminal_that_knows_few_letters() -> None:
    done = in_a_process("plan", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--stride" in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind here")
def test_a_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = in_a_process("info", stdout=writer)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_standard_output_that_is_full() -> None:
    with Path("/dev/full").open("wb") as full:
        done = in_a_process("info", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == b"gpuconv: error: standard output: No space left on device\n"


def test_standard_streams_that_are_closed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture((9, 9))).save("a.png")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # as Python finds it then
        assert cli.main(["filter", "a.png", "-k", "box"]) == 0
    assert Path("a-box.png").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert cli.main(["filter"]) == 2
    assert capsys.readouterr().out == ""
