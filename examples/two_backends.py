"""The same program on NumPy and on a GPU.

``gpuconv.asarray`` makes an array of the current backend: CuPy's where a CUDA device works, else
NumPy's. Everything after that stays where the array is, so this program has no line for either. To
compare, it runs once per backend under ``use_backend``, and says where the two differ: in the last
bits of a float32, as their sums are in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv import ndimage


def blobs(size: int = 192) -> np.ndarray:
    """Bright spots of several widths, in noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:size, :size]
    image = rng.normal(0, 0.25, (size, size))
    for width in (3, 3, 5, 6, 6, 9):
        row, column = rng.uniform(0.12 * size, 0.88 * size, 2)
        image += np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))
    return image.astype(np.float32)


def steps(image: Any) -> dict[str, Any]:
    """Smooth, find slopes, find spots: the program. It neither knows nor asks where it runs."""
    image = gpuconv.asarray(image)
    smooth = ndimage.gaussian_filter(image, 2.5)
    slope = ndimage.gaussian_gradient_magnitude(image, 3.0)
    spots = -ndimage.gaussian_laplace(image, 4.5)
    return {"image": image, "smooth": smooth, "slope": slope, "spots": spots}


def on(backend: str, image: Any) -> dict[str, np.ndarray]:
    """The results, brought to the host for comparing and drawing."""
    with gpuconv.use_backend(backend):
        results = steps(image)
    with gpuconv.use_backend("numpy"):
        return {name: gpuconv.asarray(array) for name, array in results.items()}


def plot(results: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    titles = {
        "image": "image", "smooth": "gaussian_filter", "slope": "gaussian_gradient_magnitude",
        "spots": "−gaussian_laplace",
    }  # fmt: skip
    for axis, (name, array) in zip(axes, results.items(), strict=True):
        axis.imshow(array, cmap="magma")
        axis.set_title(titles[name], fontsize=11)
        axis.set_axis_off()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main() -> None:
    image = blobs()
    results = {"numpy": on("numpy", image)}
    if gpuconv.default_backend() == "cuda":
        results["cuda"] = on("cuda", image)
        for name, ours in results["numpy"].items():
            print(f"{name:8} differs by {np.abs(results['cuda'][name] - ours).max():.1e}")
    else:
        print("no CUDA device here (gpuconv.show_config() says why): NumPy alone")
    path = Path(__file__).parent / "images" / "two_backends.png"
    plot(results["numpy"], path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
