# SPDX-License-Identifier: Apache-2.0
"""Multi-layer and bidirectional: GRUs of one to four layers, in one direction and in both, read images of handwritten
digits row by row; the picture shows how well each names the digit. The data are scikit-learn's digits, 1797 images of 8
by 8; the figure is the share of held-out images that the best of them names rightly, beside that of the plainest.
"""

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, accuracy, cross_entropy, join, load_digits, picture, train

HIDDEN = 16


class Model:
    """Image rows -> GRU -> the top layer's last state, of both directions where there are two -> a score a digit."""

    def __init__(self, layers: int, bidirectional: bool, seed: int) -> None:
        self.layer = fusedrnn.GRU(8, HIDDEN, layers, bidirectional=bidirectional, seed=seed)
        self.directions = 2 if bidirectional else 1
        self.head = Linear(self.directions * HIDDEN, 10, seed)
        self.parameters = join(layer=self.layer.parameters, head=self.head.parameters)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (T,B,I) -> all last states (L*D,B,H), and those of the top layer side by side (B,D*H)."""
        _, states = self.layer(x)
        return states, np.concatenate(list(states[-self.directions :]), axis=1)

    def gradients(self, x: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        """The loss of a batch and the gradients of all parameters."""
        states, top = self(x)
        loss, dscores = cross_entropy(self.head(top), targets)
        head = self.head.backward(top, dscores)
        dstates = np.zeros_like(states)
        dstates[-self.directions :] = np.split(head["x"], self.directions, axis=1)
        return loss, join(layer=self.layer.backward(None, dstates), head=head)


def learn(layers: int, bidirectional: bool, seed: int, updates: int) -> float:
    """Train one model; its test accuracy in %."""
    rng = np.random.default_rng(seed)
    x, targets, test_x, test_targets = load_digits(rng, pixels=8)
    model = Model(layers, bidirectional, seed)

    def batch() -> tuple[float, Arrays]:
        chosen = rng.integers(len(targets), size=32)
        return model.gradients(x[:, chosen], targets[chosen])

    for _ in train(model.parameters, batch, updates):
        pass
    return accuracy(model.head(model(test_x)[1]), test_targets)


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    depths = (1, 2) if options.quick else (1, 2, 3, 4)
    runs, updates = (1, 120) if options.quick else (2, 400)
    found: dict[str, list[list[float]]] = {"one direction": [], "both directions": []}
    for way, of in found.items():
        for layers in depths:
            seeds = range(options.seed, options.seed + runs)
            of.append([learn(layers, way == "both directions", seed, updates) for seed in seeds])
            print(f"{layers} layer{'s'[: layers - 1]}, {way}: {np.mean(of[-1]):.1f} % of the test images", flush=True)

    means = {way: np.mean(of, axis=1) for way, of in found.items()}
    best = max((float(mean), layers, way) for way in means for layers, mean in zip(depths, means[way], strict=True))
    name = f"test accuracy, {best[1]} layer{'s'[: best[1] - 1]}, {best[2]}"
    figure = Figure(name, best[0], "1 layer, one direction", float(means["one direction"][0]))
    print(figure)
    with picture(options.picture, 7, 4.5) as drawing:
        axes = drawing.subplots()
        for (way, of), mark in zip(found.items(), ("o-", "s-"), strict=True):
            (line,) = axes.plot(depths, means[way], mark, label=way)
            for layers, reached in zip(depths, of, strict=True):
                axes.plot([layers] * runs, reached, ".", color=line.get_color(), alpha=0.4)
        axes.set(xlabel="layers", ylabel="test accuracy (%)", xticks=depths)
        axes.set(title=f"Digits read row by row, {HIDDEN} units a layer; dots: {runs} runs")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    fusedrnn.set_num_threads(1)  # on models this small more threads only wait for one another
    main()
