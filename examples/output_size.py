"""How large is the result? The formula, against real results, and in pictures.

Along each axis

    out = (in + pad_lo + pad_hi - dilation*(filter - 1) - 1) // stride + 1

The padded input has in + pad_lo + pad_hi elements; the filter spans dilation*(filter - 1) + 1 of
them, so its first weight can lie in so many places, of which every stride-th is taken.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np

import gpuconv


def out_extent(n: int, filter: int, stride: int, pad: tuple[int, int], dilation: int) -> int:
    return (n + sum(pad) - dilation * (filter - 1) - 1) // stride + 1


PADS = ((0, 0), (1, 1), (0, 1), (3, 3))
CASES = [
    case
    for case in product((5, 7, 8, 224), (1, 2, 3, 7), (1, 2, 3), PADS, (1, 2))
    if out_extent(*case) > 0
]
SHOWN = [  # (in, filter, stride, pad, dilation)
    (7, 3, 1, (0, 0), 1), (7, 3, 1, (1, 1), 1), (7, 3, 2, (1, 1), 1), (8, 3, 2, (0, 1), 1),
    (8, 3, 3, (0, 0), 2), (224, 7, 2, (3, 3), 1),
]  # fmt: skip


def real_extent(n: int, filter: int, stride: int, pad: tuple[int, int], dilation: int) -> int:
    """How large the result of a real call is."""
    x, w = np.ones((1, 1, n), np.float32), np.ones((1, 1, filter), np.float32)
    return gpuconv.conv1d(x, w, stride=stride, padding=(pad,), dilation=dilation).shape[-1]


def draw(axis, n: int, filter: int, stride: int, pad: int) -> None:
    """An n x n input in its padding, the places of the filter, and the output that they make."""
    from matplotlib.patches import Rectangle

    out = out_extent(n, filter, stride, (pad, pad), 1)
    size = n + 2 * pad
    left = size + 1.5
    for row, column in np.ndindex(size, size):
        inside = pad <= row < pad + n and pad <= column < pad + n
        axis.add_patch(Rectangle(
            (column, row), 1, 1, fc="#cfe0f1" if inside else "white", ec="#8899aa",
            lw=0.8, ls="-" if inside else ":",
        ))  # fmt: skip
    top = (size - out) / 2
    colours = ["#ee6677", "#228833", "#ccbb44"]
    for row, column in np.ndindex(out, out):
        axis.add_patch(Rectangle((left + column, top + row), 1, 1, fc="#f0f0f0", ec="#8899aa"))
    for i, colour in enumerate(colours[:out]):  # the first places of the first row
        inset = 0.07 * (i + 1)  # so that none hides another
        axis.add_patch(Rectangle(
            (i * stride + inset, inset), filter - 2 * inset, filter - 2 * inset,
            fc="none", ec=colour, lw=2.5,
        ))  # fmt: skip
        axis.add_patch(Rectangle((left + i, top), 1, 1, fc=colour, alpha=0.6, ec="#8899aa"))
    axis.set(xlim=(-0.4, 13.9), ylim=(size / 2 + 3.8, size / 2 - 3.8), aspect="equal")
    axis.set_title(
        f"in {n}, filter {filter}, stride {stride}, pad {pad}\n"
        f"({n} + {pad} + {pad} - {filter - 1} - 1) // {stride} + 1 = {out}", fontsize=10,
    )  # fmt: skip
    axis.set_axis_off()


def plot(path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(10, 6.2), layout="constrained")
    for axis, case in zip(axes.flat, [(5, 3, 1, 0), (5, 3, 1, 1), (5, 3, 2, 0), (5, 3, 2, 1)],
                          strict=True):  # fmt: skip
        draw(axis, *case)
    fig.suptitle(
        "Input (blue) in its padding (dotted), the first places of the filter, and the output"
    )
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main() -> None:
    print("  in  filter  stride      pad  dilation  formula  real")
    for n, filter, stride, pad, dilation in SHOWN:
        case = (n, filter, stride, pad, dilation)
        print(
            f"{n:4} {filter:7} {stride:7} {pad!s:>8} {dilation:9} "
            f"{out_extent(*case):8} {real_extent(*case):5}"
        )
    agree = sum(out_extent(*case) == real_extent(*case) for case in CASES)
    print(f"formula and real result agree in {agree} of {len(CASES)} cases")
    path = Path(__file__).parent / "images" / "output_size.png"
    plot(path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
