# SPDX-License-Identifier: Apache-2.0
"""Gradient flow: how large the gradient is that reaches a state so many steps before the loss, in RNN, LSTM and GRU,
with and without clipping at every step, before and after training. They read handwritten digits two pixels a step and
name the digit at the end. The data are scikit-learn's digits, 1797 images of 8 by 8; the figure is the share of
held-out images that the best of the three names rightly, once its gradients reach the first pixels.
"""

import copy
from typing import Any

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, accuracy, cross_entropy, join, load_digits, picture, train

CELLS: dict[str, Any] = {"RNN": fusedrnn.RNN, "LSTM": fusedrnn.LSTM, "GRU": fusedrnn.GRU}
HIDDEN, PIXELS = 48, 2
STEPS = 64 // PIXELS
GAIN = 4.0  # times the usual recurrent weights: where gradients explode
CLIP = 0.01  # the largest element of a state's gradient, with clipping


class Model:
    """Pixels -> RNN, LSTM or GRU -> the last step's output -> a score for each digit."""

    def __init__(self, cell: str, seed: int) -> None:
        self.layer = CELLS[cell](PIXELS, HIDDEN, seed=seed)
        self.head = Linear(HIDDEN, 10, seed)
        self.parameters = join(layer=self.layer.parameters, head=self.head.parameters)

    def gradients(self, x: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        """The loss of a batch and the gradients of all parameters."""
        y, _ = self.layer(x)
        loss, dscores = cross_entropy(self.head(y[-1]), targets)
        head = self.head.backward(y[-1], dscores)
        dy = np.zeros_like(y)
        dy[-1] = head["x"]
        return loss, join(layer=self.layer.backward(dy), head=head)

    def flow(self, x: np.ndarray, targets: np.ndarray, clip: float | None) -> np.ndarray:
        """(T,): the size of the loss's gradient in the state (h, and c) 0, 1, 2, ... steps before the loss: the mean
        over images of its Euclidean norm, times the images in the batch. One call a step, so that every state shows."""
        runs, state = [], None
        for x_t in x:
            run = copy.copy(self.layer)  # the same weights, a tape of its own
            run.clip_grad = clip
            y, state = run(x_t[None], state)
            runs.append(run)
        _, dscores = cross_entropy(self.head(y[0]), targets)
        dy = len(targets) * self.head.backward(y, dscores[None])["x"]
        dstate: Any = runs.pop().backward(dy)["state"]
        sizes = [np.linalg.norm(dy[0], axis=1).mean()]
        while runs:
            parts = dstate if isinstance(dstate, tuple) else (dstate,)
            sizes.append(np.sqrt(sum((part[0] ** 2).sum(axis=1) for part in parts)).mean())
            dstate = runs.pop().backward(None, dstate)["state"]
        return np.array(sizes)


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    x, targets, test_x, test_targets = load_digits(options.rng, PIXELS)
    shown, shown_targets = test_x[:, :100], test_targets[:100]
    titles = ("New", f"New, recurrent weights times {GAIN:g}", "Trained")
    flows: dict[tuple[str, str, float | None], np.ndarray] = {}
    reached: dict[str, float] = {}

    def measure(title: str, cell: str, model: Model) -> None:
        for clip in (None, CLIP):
            flows[title, cell, clip] = model.flow(shown, shown_targets, clip)

    for cell in CELLS:
        model = Model(cell, options.seed)
        measure(titles[0], cell, model)
        model.layer.parameters["weight_hh_l0"] *= np.float32(GAIN)
        measure(titles[1], cell, model)
        model.layer.parameters["weight_hh_l0"] /= np.float32(GAIN)

        def batch(model: Model = model) -> tuple[float, Arrays]:
            chosen = options.rng.integers(len(targets), size=64)
            return model.gradients(x[:, chosen], targets[chosen])

        for _ in train(model.parameters, batch, 60 if options.quick else 300):
            pass
        measure(titles[2], cell, model)
        reached[cell] = accuracy(model.head(model.layer(test_x)[0][-1]), test_targets)
        sizes = [flows[title, cell, None] for title in titles]
        print(
            f"{cell}: of the last state's gradient the first state gets {sizes[0][-1] / sizes[0][0]:.1e} when new, "
            f"{sizes[1][-1] / sizes[1][0]:.1e} with recurrent weights times {GAIN:g}, "
            f"{sizes[2][-1] / sizes[2][0]:.1e} when trained; test accuracy {reached[cell]:.1f} %",
            flush=True,
        )

    best = max(reached, key=lambda cell: reached[cell])
    commonest = 100 * float(np.bincount(test_targets).max()) / len(test_targets)
    figure = Figure(f"test accuracy, {best}", reached[best], "always the commonest digit", commonest)
    print(figure)
    with picture(options.picture, 12, 4.5) as drawing:
        panels = drawing.subplots(1, 3, sharey=True)
        for axes, title in zip(panels, titles, strict=True):
            for n, cell in enumerate(CELLS):
                trained = f" ({reached[cell]:.0f} % right)" if title == titles[2] else ""
                axes.plot(flows[title, cell, None], color=f"C{n}", label=cell + trained)
                axes.plot(flows[title, cell, CLIP], color=f"C{n}", linestyle="--")
            axes.plot([], color="0.4", linestyle="--", label=f"clipped to {CLIP:g} at every step")
            axes.set(title=title, xlabel="steps before the loss", yscale="log")
            axes.grid(alpha=0.3)
        panels[1].legend(loc="lower left")
        panels[2].legend(loc="lower left")
        panels[0].set_ylabel("size of the gradient in the state")
    return figure


if __name__ == "__main__":
    fusedrnn.set_num_threads(1)  # on models this small more threads only wait for one another
    main()
