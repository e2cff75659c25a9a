# SPDX-License-Identifier: Apache-2.0
"""CTC: a bidirectional LSTM reads a line of handwritten digits column by column and learns which digits stand there,
though nobody tells it where one ends and the next begins. The lines are made of scikit-learn's digits with gaps between
them; the figure is the share of lines of held-out images that are read with a mistake.
"""

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, join, picture, require, softmax, train

BLANK, CLASSES = 0, 11  # class d + 1 is the digit d


class Model:
    """Columns -> LSTM in both directions -> log-probabilities of nothing new and of each digit, at every column."""

    def __init__(self, height: int, hidden: int, seed: int) -> None:
        self.layer = fusedrnn.LSTM(height, hidden, bidirectional=True, seed=seed)
        self.head = Linear(2 * hidden, CLASSES, seed)
        # Training begins with a long stay at "nothing anywhere"; scores that differ more at the start shorten it.
        self.head.parameters["weight"] *= 3
        self.parameters = join(layer=self.layer.parameters, head=self.head.parameters)

    def __call__(self, x: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, _ = self.layer(x, lengths=widths)
        return y, np.log(softmax(self.head(y)))

    def gradients(self, x: np.ndarray, widths: np.ndarray, digits: list[np.ndarray]) -> tuple[float, Arrays]:
        """x (T,B,8) lines of so many columns each, and the digits that stand on them; the mean loss of a line."""
        y, log_probs = self(x, widths)
        labels, counts = np.concatenate(digits) + 1, np.array([len(line) for line in digits])
        loss, dlog_probs = fusedrnn.ctc_loss_backward(log_probs, labels, widths, counts, 1 / len(digits), blank=BLANK)
        head = self.head.backward(y, dlog_probs)  # the gradient in the scores, before the softmax, is the same
        return float(loss.mean()), join(layer=self.layer.backward(head["x"]), head=head)

    def read(self, x: np.ndarray, widths: np.ndarray, beam: int = 0) -> list[np.ndarray]:
        """The digits on each line: what the likeliest classes spell, or the likeliest of so many beginnings."""
        self.layer.eval()
        _, log_probs = self(x, widths)
        self.layer.train()
        if beam:
            found = [labels for labels, _ in fusedrnn.ctc_beam(log_probs, widths, beam_width=beam, blank=BLANK)]
        else:
            found = fusedrnn.ctc_greedy(log_probs, widths, blank=BLANK)
        return [labels - 1 for labels in found]


def lines(images: np.ndarray, chosen: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The chosen images of every line side by side, with up to four empty columns between them: (T,B,8), widths (B)."""
    pieces = []
    for line in chosen:
        parts = [np.zeros((rng.integers(1, 4), 8), np.float32)]
        for n in line:
            parts += [images[n].T, np.zeros((rng.integers(5), 8), np.float32)]
        pieces.append(np.concatenate(parts))
    widths = np.array([len(piece) for piece in pieces])
    x = np.zeros((widths.max(), len(pieces), 8), np.float32)
    for b, piece in enumerate(pieces):
        x[: len(piece), b] = piece
    return x, widths


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    rng = options.rng
    data = require("sklearn.datasets").load_digits()
    order = rng.permutation(len(data.target))
    images, digits = data.images[order].astype(np.float32) / 16, data.target[order]
    split = len(digits) * 4 // 5

    def choose(first: int, stop: int, count: int) -> list[np.ndarray]:
        return [rng.integers(first, stop, rng.integers(3, 7)) for _ in range(count)]

    test = choose(split, len(digits), 400)
    test_x, test_widths = lines(images, test, rng)
    model = Model(8, hidden=64, seed=options.seed)

    def batch() -> tuple[float, Arrays]:
        chosen = choose(0, split, 32)
        return model.gradients(*lines(images, chosen, rng), [digits[line] for line in chosen])

    def wrong(beam: int = 0) -> float:
        read = model.read(test_x, test_widths, beam)
        return 100 * float(np.mean([list(a) != list(digits[line]) for a, line in zip(read, test, strict=True)]))

    updates = 300 if options.quick else 800
    curve = []
    for update, _ in train(model.parameters, batch, updates, rate=2e-2):
        if update % (updates // 20) == 0:
            curve.append((update, wrong()))

    # a naive reader, which even is told where every digit stands: the most similar mean image
    means = np.stack([images[:split][digits[:split] == digit].mean(axis=0) for digit in range(10)])
    naive = ((images[:, None] - means) ** 2).sum(axis=(2, 3)).argmin(axis=1) == digits
    naively = 100 * float(np.mean([not naive[line].all() for line in test]))
    figure = Figure("lines read wrongly", wrong(), "most similar mean images, told the borders", naively, smaller=True)
    print(figure)
    print(f"the same with a beam of 10: {wrong(beam=10):.4g} %")
    with picture(options.picture, 12, 6) as drawing:
        left, right = drawing.subfigures(1, 2, width_ratios=[2, 3])
        learning = left.subplots()
        learning.plot(*zip(*curve, strict=True), label="LSTM with CTC, greedy decoding")
        learning.axhline(naively, color="0.5", linestyle=":", label=figure.naive)
        learning.set(xlabel="updates", ylabel="test lines read wrongly (%)", ylim=(0, 102), title="Learning")
        learning.grid(alpha=0.3)
        learning.legend()
        read, p = model.read(test_x, test_widths), np.exp(model(test_x, test_widths)[1])
        right.suptitle("What it sees, and what it believes at every column")
        rows = right.subplots(4, height_ratios=[1, 2] * 2).reshape(2, 2)
        for b, (image, belief) in enumerate(rows):
            width = test_widths[b]
            image.imshow(test_x[:width, b].T, cmap="gray_r", aspect="auto")
            image.set(xticks=[], yticks=[], title=f"it reads {' '.join(map(str, read[b]))}")
            belief.imshow(p[:width, b].T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            belief.set(yticks=range(CLASSES), yticklabels=["none", *range(10)], ylabel="digit", xlabel="column")
            belief.tick_params(axis="y", labelsize=7)
    return figure


if __name__ == "__main__":
    main()
