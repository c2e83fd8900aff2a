"""What a 3x3 filter does to a photo.

The filter is laid over every pixel; each of its nine weights is multiplied by the pixel under it,
and the sum is the new pixel. The one below is 8 in the middle and -1 around: on an even surface the
nine products cancel and the result is 0, black. Where a pixel is unlike its neighbours something is
left over, so what remains of a photo are its edges and its texture.

Near the border the filter reaches beyond the photo; ``boundary="symm"`` mirrors it there, so that
the border does not turn into an edge of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import gpuconv
from gpuconv import signal

RIDGE = np.array([
    [-1, -1, -1],
    [-1,  8, -1],
    [-1, -1, -1],
], np.float32)  # fmt: skip


def sample_photo() -> np.ndarray:
    """The photo that ships with gpuconv, grey, 0 to 1."""
    from PIL import Image

    with Image.open(Path(gpuconv.__file__).parent / "data" / "sample.jpg") as photo:
        return np.asarray(photo.convert("L"), np.float32) / 255


def edges(photo: np.ndarray) -> np.ndarray:
    return signal.convolve2d(photo, RIDGE, mode="same", boundary="symm")


def plot(photo: np.ndarray, path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, (before, weights, after) = plt.subplots(
        1, 3, figsize=(13, 4.4), width_ratios=(5, 1.4, 5), layout="constrained"
    )
    before.imshow(photo, cmap="gray", vmin=0, vmax=1)
    before.set_title("photo")
    weights.imshow(np.where(RIDGE > 0, 0.75, 0.25), cmap="coolwarm", vmin=0, vmax=1, alpha=0.6)
    for row, column in np.ndindex(RIDGE.shape):
        weights.text(
            column, row, f"{RIDGE[row, column]:+.0f}", ha="center", va="center", fontsize=13
        )
    weights.set_title("filter")
    after.imshow(np.abs(edges(photo)), cmap="gray", vmin=0, vmax=0.6)
    after.set_title('convolve2d(photo, filter, "same", "symm")')
    for axis in (before, weights, after):
        axis.set_axis_off()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main() -> None:
    photo = sample_photo()
    print(f"photo {photo.shape}, filter {RIDGE.shape}, result {edges(photo).shape}")
    path = Path(__file__).parent / "images" / "photo_filter.png"
    plot(photo, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
