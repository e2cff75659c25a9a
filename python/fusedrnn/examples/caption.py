# SPDX-License-Identifier: Apache-2.0
"""One-to-many: an LSTM is shown the image of a written digit and captions it, letter by letter: 'a bold seven'.
The images are scikit-learn's digits, and their features enter every step as the layer's context; the figure is the
share of held-out images whose caption is right to the last letter.
"""

import string

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, cross_entropy, join, picture, require, train

WORDS = "zero one two three four five six seven eight nine".split()
LETTERS = ". " + string.ascii_lowercase  # a full stop ends a caption, and stands before its first letter
LONGEST = len("a bold seven.")


class Model:
    """Pixels -> features, which are the LSTM's context; the letter before -> LSTM -> a score for each letter."""

    def __init__(self, pixels: int, features: int, hidden: int, seed: int) -> None:
        self.eye = Linear(pixels, features, seed)
        self.layer = fusedrnn.LSTM(len(LETTERS), hidden, context_size=features, seed=seed)
        self.head = Linear(hidden, len(LETTERS), seed)
        self.parameters = join(eye=self.eye.parameters, layer=self.layer.parameters, head=self.head.parameters)

    def gradients(self, images: np.ndarray, captions: np.ndarray) -> tuple[float, Arrays]:
        """images (B,64), captions (T,B) as letters' numbers, -1 past the end; the loss and all gradients."""
        features = np.tanh(self.eye(images))
        before = np.concatenate([np.zeros_like(captions[:1]), np.maximum(captions[:-1], 0)])
        y, _ = self.layer(before, context=features)
        loss, dscores = cross_entropy(self.head(y), captions)
        head = self.head.backward(y, dscores)
        layer = self.layer.backward(head["x"])
        eye = self.eye.backward(images, layer["context"] * (1 - features**2))
        return loss, join(eye=eye, layer=layer, head=head)

    def write(self, images: np.ndarray) -> list[str]:
        """The likeliest letter at every step, which is told to the next, up to the full stop."""
        features = np.tanh(self.eye(images))
        letters, state = [np.zeros(len(images), np.int64)], None
        self.layer.eval()
        for _ in range(LONGEST):
            y, state = self.layer(letters[-1][None], state, context=features)
            letters.append(self.head(y[0]).argmax(axis=1))
        self.layer.train()
        return ["".join(LETTERS[n] for n in row).split(".")[0] for row in np.transpose(letters[1:])]


def captions_of(images: np.ndarray, digits: np.ndarray) -> list[str]:
    """A digit with more ink than most of its kind is bold."""
    ink = images.sum(axis=1)
    usual = np.array([np.median(ink[digits == digit]) for digit in range(10)])
    return [f"a {'bold' if i > usual[d] else 'thin'} {WORDS[d]}" for i, d in zip(ink, digits, strict=True)]


def numbers(captions: list[str]) -> np.ndarray:
    """The letters' numbers (T,B), the full stop after the last one, then -1."""
    ids = np.full((LONGEST, len(captions)), -1)
    for b, caption in enumerate(captions):
        ids[: len(caption) + 1, b] = [LETTERS.index(letter) for letter in caption + "."]
    return ids


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    data = require("sklearn.datasets").load_digits()
    order = options.rng.permutation(len(data.target))
    images = data.data[order].astype(np.float32) / 16
    captions = captions_of(images, data.target[order])
    ids = numbers(captions)
    split = len(images) * 4 // 5
    test_images, test_captions = images[split:], captions[split:]
    model = Model(images.shape[1], features=64, hidden=64, seed=options.seed)

    def batch() -> tuple[float, Arrays]:
        chosen = options.rng.integers(split, size=64)
        return model.gradients(images[chosen], ids[:, chosen])

    def right(written: list[str]) -> float:
        return 100 * float(np.mean([a == b for a, b in zip(written, test_captions, strict=True)]))

    updates = 200 if options.quick else 1000
    curve = []
    for update, _ in train(model.parameters, batch, updates):
        if update % (updates // 25) == 0:
            curve.append((update, right(model.write(test_images))))

    written = model.write(test_images)
    commonest = max(set(captions[:split]), key=captions[:split].count)
    naive, naively = f"always '{commonest}'", right([commonest] * len(test_captions))
    figure = Figure("captions right to the last letter", right(written), naive, naively)
    print(figure)
    with picture(options.picture, 12, 6) as drawing:
        left, gallery = drawing.subfigures(1, 2, width_ratios=[2, 3])
        learning = left.subplots()
        learning.plot(*zip(*curve, strict=True), label="LSTM with the image as context")
        learning.axhline(naively, color="0.5", linestyle=":", label=naive)
        learning.set(xlabel="updates", ylabel="test captions right (%)", ylim=(0, 102), title="Learning")
        learning.grid(alpha=0.3)
        learning.legend(loc="lower right")
        gallery.suptitle("Test images and their captions; in red with the right one where it is another")
        for axes, image, caption, true in zip(
            gallery.subplots(4, 6).flat, test_images, written, test_captions, strict=False
        ):
            axes.imshow(image.reshape(8, 8), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            same = caption == true
            axes.set_title(caption if same else f"{caption}\n({true})", fontsize=8, color="k" if same else "tab:red")
    return figure


if __name__ == "__main__":
    main()
