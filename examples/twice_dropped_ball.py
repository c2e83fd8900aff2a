"""A ball is dropped twice: how far does it get?

Dropped from one height it rolls 0, 1, 2, ... metres with probabilities f; from another, with
probabilities g. It gets c metres in all if it first rolls a metres and then the c - a that are
left, for whatever a, so

    P(c) = sum over a of  f(a) g(c - a)

That sum is the convolution of f and g, ``gpuconv.signal.convolve(f, g)``. In the picture every cell
of the table is one pair of rolls; the pairs that make the same total lie on one diagonal, and their
sum is a bar of the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpuconv import signal

FIRST = np.array([0.05, 0.15, 0.30, 0.25, 0.15, 0.10])  # P(0 m), P(1 m), ...
SECOND = np.array([0.20, 0.40, 0.25, 0.10, 0.05])


def total_written_out(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """sum over a of f(a) g(c - a), for every total c."""
    total = np.zeros(len(f) + len(g) - 1)
    for c in range(len(total)):
        for a in range(len(f)):
            if 0 <= c - a < len(g):
                total[c] += f[a] * g[c - a]
    return total


def total(f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The same, in one call."""
    return signal.convolve(f, g)


def plot(path: Path) -> None:
    import matplotlib.pyplot as plt

    both = total(FIRST, SECOND)
    blue, orange, highlight = "#4477aa", "#ee8866", 5
    fig, axes = plt.subplots(
        1, 3, figsize=(13, 3.9), width_ratios=(1, 1.25, 1.5), layout="constrained"
    )
    drops, table, sums = axes
    drops.bar(np.arange(len(FIRST)) - 0.2, FIRST, 0.4, color=blue, label="first drop, f")
    drops.bar(np.arange(len(SECOND)) + 0.2, SECOND, 0.4, color=orange, label="second drop, g")
    drops.set(title="Two drops", xlabel="metres", ylabel="probability")
    drops.legend(frameon=False)

    pairs = np.outer(FIRST, SECOND)
    table.imshow(pairs, cmap="Greys", vmax=0.2, origin="lower")
    for a, b in np.ndindex(pairs.shape):
        hit = a + b == highlight
        table.text(
            b, a, f"{pairs[a, b]:.3f}", ha="center", va="center", fontsize=8,
            color="white" if pairs[a, b] > 0.09 and not hit else "black",
            bbox={"boxstyle": "round", "fc": "#eecc66", "ec": "none"} if hit else None,
        )  # fmt: skip
    table.set(title=f"f(a) g(b); a + b = {highlight} on the diagonal", xlabel="b, second drop")
    table.set(ylabel="a, first drop", xticks=range(len(SECOND)), yticks=range(len(FIRST)))

    colours = ["#eecc66" if c == highlight else "#555555" for c in range(len(both))]
    sums.bar(range(len(both)), both, color=colours)
    for c, p in enumerate(both):
        sums.text(c, p + 0.003, f"{p:.3f}", ha="center", fontsize=8)
    sums.set(title="Both: signal.convolve(f, g)", xlabel="c = a + b metres")
    for axis in (drops, sums):
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main() -> None:
    both = total(FIRST, SECOND)
    print("metres     ", *range(len(both)), sep="\t")
    print("written out", *total_written_out(FIRST, SECOND).round(4), sep="\t")
    print("convolve   ", *both.round(4), sep="\t")
    path = Path(__file__).parent / "images" / "twice_dropped_ball.png"
    plot(path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
