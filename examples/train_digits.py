"""Train a small convolutional network from scratch, with gpuconv and nothing else.

    python examples/train_digits.py                 # on a GPU where there is one, else on the CPU
    python examples/train_digits.py --backend numpy --plot examples/images/train_digits.png

The digits are scikit-learn's (1797 images of 8x8 pixels, they come with the package); it does
nothing but load them. Everything else is arrays: NumPy's or CuPy's, by the same lines.

    8x8 --conv 3x3, 16--> relu --conv 3x3/2, 32--> relu --conv 3x3/2, 64--> relu --mean--> 10
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv import grad

LAYERS = (  # filters (K, C, R, S), and how they are laid over the image
    ((16, 1, 3, 3), {"padding": 1}),
    ((32, 16, 3, 3), {"padding": 1, "stride": 2}),
    ((64, 32, 3, 3), {"padding": 1, "stride": 2}),
    ((10, 64, 1, 1), {}),
)


class Network:
    """Convolutions with ReLU between them, and the mean over the pixels of the last."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.parameters: list[Any] = []
        for shape, _ in LAYERS:
            scale = np.sqrt(2 / np.prod(shape[1:]))  # He et al.: keeps the signal's size
            self.parameters += [
                gpuconv.asarray((scale * rng.standard_normal(shape)).astype(np.float32)),
                gpuconv.asarray(np.zeros(shape[0], np.float32)),
            ]

    def forward(self, x: Any) -> tuple[Any, list[Any]]:
        """The ten scores (N, 10) of images (N, 1, 8, 8), and every layer's input."""
        inputs = []
        for i, (_, options) in enumerate(LAYERS):
            inputs.append(x)
            x = gpuconv.conv2d(x, *self.parameters[2 * i : 2 * i + 2], **options)
            if i < len(LAYERS) - 1:
                x = x * (x > 0)
        inputs.append(x)
        return x.mean(axis=(2, 3)), inputs

    def gradients(self, scores_gradient: Any, inputs: list[Any]) -> list[Any]:
        """The loss's gradient by every parameter: backpropagation."""
        last = inputs[-1]
        dy = scores_gradient[:, :, None, None] / np.float32(last.shape[2] * last.shape[3])
        dy = dy * np.ones_like(last)  # the mean's gradient is the same at every pixel
        found: list[Any] = []
        for i in reversed(range(len(LAYERS))):
            shape, options = LAYERS[i]
            x, w = inputs[i], self.parameters[2 * i]
            found = [grad.conv2d_weight(x, shape, dy, **options), grad.conv2d_bias(dy), *found]
            if i:
                dy = grad.conv2d_input(x.shape, w, dy, **options) * (x > 0)
        return found


def cross_entropy(scores: Any, labels: Any) -> tuple[float, Any]:
    """The mean of -log(softmax(scores)[label]), and its gradient by the scores."""
    chances = scores - scores.max(axis=1)[:, None]
    chances = np.exp(chances)  # of CuPy's arrays it is CuPy's exp
    chances = chances / chances.sum(axis=1)[:, None]
    hit = labels[:, None] == gpuconv.asarray(np.arange(10))[None]
    loss = -np.log((chances * hit).sum(axis=1)).mean()
    return float(loss), (chances - hit).astype(np.float32) / np.float32(len(labels))


class Adam:
    """Kingma and Ba, 2014."""

    def __init__(self, parameters: list[Any], rate: float) -> None:
        self.parameters, self.rate, self.step = parameters, rate, 0
        self.mean = [0 * p for p in parameters]
        self.square = [0 * p for p in parameters]

    def update(self, gradients: list[Any]) -> None:
        self.step += 1
        for p, g, m, v in zip(self.parameters, gradients, self.mean, self.square, strict=True):
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.001) * (g * g - v)
            unbiased = np.sqrt(v / np.float32(1 - 0.999**self.step)) + np.float32(1e-8)
            p -= np.float32(self.rate / (1 - 0.9**self.step)) * m / unbiased


def digits(test_every: int = 5) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Training and test images (N, 1, 8, 8) with their labels; every fifth is for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[:, None] / 8 - 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order]
    test = np.arange(len(images)) % test_every == 0
    return (images[~test], labels[~test]), (images[test], labels[test])


def train(epochs: int = 20, batch: int = 64, rate: float = 3e-3) -> dict[str, list[float]]:
    """Train on the current backend; the loss and the test accuracy after every epoch."""
    (images, labels), test = digits()
    x_test, y_test = map(gpuconv.asarray, test)
    network = Network()
    optimiser = Adam(network.parameters, rate)
    rng = np.random.default_rng(1)
    history: dict[str, list[float]] = {"loss": [], "accuracy": []}
    start = time.perf_counter()
    for epoch in range(epochs):
        optimiser.rate = rate * (1 - epoch / epochs)
        losses = []
        order = rng.permutation(len(images))
        for first in range(0, len(images) - batch + 1, batch):
            chosen = order[first : first + batch]
            x, y = gpuconv.asarray(images[chosen]), gpuconv.asarray(labels[chosen])
            scores, inputs = network.forward(x)
            loss, scores_gradient = cross_entropy(scores, y)
            optimiser.update(network.gradients(scores_gradient, inputs))
            losses.append(loss)
        scores, _ = network.forward(x_test)
        accuracy = float((scores.argmax(axis=1) == y_test).mean())
        history["loss"].append(float(np.mean(losses)))
        history["accuracy"].append(accuracy)
        print(
            f"epoch {epoch + 1:2}  loss {history['loss'][-1]:.4f}  "
            f"test accuracy {accuracy:6.2%}  {time.perf_counter() - start:5.1f} s"
        )
    return history


def plot(history: dict[str, list[float]], path: Path) -> None:
    """Loss and test error by epoch, each on a scale that starts at its foot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = range(1, len(history["loss"]) + 1)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    axes[0].semilogy(epochs, history["loss"], "o-", ms=3, color="tab:blue")
    axes[0].set_title("training loss (cross entropy)")
    axes[1].plot(epochs, [100 * a for a in history["accuracy"]], "o-", ms=3, color="tab:green")
    axes[1].axhline(97, color="gray", lw=0.8, ls="--")
    axes[1].set_title(f"test accuracy, %  (last: {100 * history['accuracy'][-1]:.1f})")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description="Train a small network on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--backend", choices=("numpy", "cuda"), default=gpuconv.default_backend())
    parser.add_argument("--plot", type=Path, help="where to draw loss and accuracy (a .png)")
    options = parser.parse_args(arguments)
    with gpuconv.use_backend(options.backend):
        print(f"on the backend {options.backend}")
        history = train(options.epochs)
    if options.plot:
        plot(history, options.plot)
        print(f"drawn: {options.plot}")
    return history


if __name__ == "__main__":
    main()
