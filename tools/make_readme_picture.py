"""Make docs/images/filters.png: the sample picture and what some filters make of it.

    PYTHONPATH=. python tools/make_readme_picture.py [--out FILE]

It is also a small example of the library: a picture's three colour planes are a batch of three
one-channel images, and a filter is a convolution with one input and one output channel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import gpuconv
from gpuconv import filters

ROOT = Path(__file__).resolve().parent.parent
PANEL = (372, 248)
GAP, STRIP = 8, 28

# Kernel, what 0 becomes, and how much the result is strengthened.
FILTERS = (
    ("identity", 0, 1.0),
    ("gaussian:15", 0, 1.0),
    ("emboss", 0, 1.0),
    ("ridge", 0, 2.0),
    ("sobel-x", 128, 0.45),
    ("log:9", 128, 0.6),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the picture of filters in the README.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "filters.png")
    args = parser.parse_args()

    sample = np.asarray(Image.open(ROOT / "gpuconv" / "data" / "sample.jpg").convert("RGB"))
    planes = np.moveaxis(sample, -1, 0)[:, None].astype(np.float32)  # (3, 1, H, W)
    columns = 3
    rows = len(FILTERS) // columns
    width = columns * PANEL[0] + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, rows * (PANEL[1] + STRIP)), "white")
    font = ImageFont.load_default(size=16)
    for i, (name, zero, strength) in enumerate(FILTERS):
        kernel = filters.named(name)[None, None]  # (1, 1, R, S)
        result = gpuconv.conv2d(planes, kernel, padding="same", padding_mode="reflect")[:, 0]
        pixels = np.clip(zero + strength * result, 0, 255).astype(np.uint8)
        panel = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
        left, top = i % columns * (PANEL[0] + GAP), i // columns * (PANEL[1] + STRIP)
        sheet.paste(panel.resize(PANEL, Image.Resampling.LANCZOS), (left, top))
        caption = (left + PANEL[0] / 2, top + PANEL[1] + STRIP / 2)
        ImageDraw.Draw(sheet).text(caption, name, fill="black", font=font, anchor="mm")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # 256 colours, chosen well and dithered, are a fifth of the bytes.
    small = sheet.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=8)
    small.save(args.out, optimize=True)
    print(f"{args.out}: {sheet.width}x{sheet.height}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
