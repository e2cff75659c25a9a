# SPDX-License-Identifier: Apache-2.0
"""Many-to-one: an LSTM reads images of handwritten digits row by row and names the digit after the last row. The data
are scikit-learn's digits, 1797 images of 8 by 8; the figure is the share of held-out images that it names rightly.
"""

import numpy as np

import fusedrnn

from .example import (
    Arrays,
    Figure,
    Linear,
    Options,
    accuracy,
    cross_entropy,
    join,
    load_digits,
    picture,
    softmax,
    train,
)


class Model:
    """Image rows -> LSTM -> the last step's output -> a score for each digit."""

    def __init__(self, rows: int, hidden: int, seed: int) -> None:
        self.layer = fusedrnn.LSTM(rows, hidden, seed=seed)
        self.head = Linear(hidden, 10, seed)
        self.parameters = join(layer=self.layer.parameters, head=self.head.parameters)

    def gradients(self, x: np.ndarray, digits: np.ndarray) -> tuple[float, Arrays]:
        """The loss of a batch and the gradients of all parameters; x (T,B,I), digits (B)."""
        y, _ = self.layer(x)
        loss, dscores = cross_entropy(self.head(y[-1]), digits)
        head = self.head.backward(y[-1], dscores)
        dy = np.zeros_like(y)
        dy[-1] = head["x"]  # many-to-one: only the last step is asked for anything
        return loss, join(layer=self.layer.backward(dy), head=head)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """(T,B,10): what it would answer after every row."""
        self.layer.eval()
        y, _ = self.layer(x)
        self.layer.train()
        return self.head(y)


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    x, targets, test_x, test_digits = load_digits(options.rng, pixels=8)  # (8,N,8): row by row
    model = Model(rows=8, hidden=64, seed=options.seed)

    def batch() -> tuple[float, Arrays]:
        chosen = options.rng.integers(len(targets), size=64)
        return model.gradients(x[:, chosen], targets[chosen])

    updates = 150 if options.quick else 800
    curve = []
    for update, _ in train(model.parameters, batch, updates):
        if update % (updates // 50) == 0:
            curve.append((update, accuracy(model.scores(test_x)[-1], test_digits)))

    scores = model.scores(test_x)
    commonest = 100 * float(np.bincount(test_digits).max()) / len(test_digits)
    figure = Figure("test accuracy", accuracy(scores[-1], test_digits), "always the commonest digit", commonest)
    print(figure)
    with picture(options.picture, 11, 5.5) as drawing:
        learning, reading = drawing.subfigures(1, 2, width_ratios=[2, 3])
        over_time, over_rows = learning.subplots(2)
        over_time.plot(*zip(*curve, strict=True))
        over_time.set(xlabel="updates", title="After the last row")
        over_rows.plot(range(1, 9), [accuracy(after, test_digits) for after in scores], "o-")
        over_rows.set(xlabel="rows read", title="After every row (training asks only after the last)")
        for axes in (over_time, over_rows):
            axes.axhline(commonest, color="0.5", linestyle=":", label="always the commonest digit")
            axes.set(ylabel="test accuracy (%)", ylim=(0, 102))
            axes.grid(alpha=0.3)
        over_time.legend(loc="lower right")
        reading.suptitle("What it believes after every row")
        # the first image of each of four digits; its rows stand beside what is believed after them
        pairs = reading.subplots(2, 4, width_ratios=[4, 5] * 2).reshape(-1, 2)
        for digit, (image, belief) in zip((0, 3, 4, 9), pairs, strict=True):
            n = int(np.argmax(test_digits == digit))
            image.imshow(test_x[:, n], cmap="gray_r", aspect="auto")
            image.set(xticks=[], yticks=range(8), yticklabels=range(1, 9), ylabel="row", xlabel=f"a {digit}")
            belief.imshow(softmax(scores[:, n]), vmin=0, vmax=1, cmap="Blues", aspect="auto")
            belief.set(xticks=range(10), yticks=[], xlabel="digit believed")
    return figure


if __name__ == "__main__":
    main()
