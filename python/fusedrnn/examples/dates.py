# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder: one LSTM reads a date as people write it, 'Tuesday, 5 March 1974', and its last state starts another
one that writes '1974-03-05'. The dates are made with Python's datetime in six ways of writing; the figure is the share
of dates never met in training that are written without any mistake.
"""

import calendar
import datetime
import string

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, cross_entropy, join, picture, softmax, train

FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
WAYS = {
    "{weekday}, {day} {month} {year}": "Tuesday, 5 March 1974",
    "{month} {day}, {year}": "March 5, 1974",
    "{day} {month:.3} {year}": "5 Mar 1974",
    "{day:02}.{number:02}.{year}": "05.03.1974",
    "{number}/{day}/{year}": "3/5/1974",
    "{weekday:.3} the {day}{ending} of {month}, {year}": "Tue the 5th of March, 1974",
}
LETTERS = "0123456789- ,./" + string.ascii_letters
OUT = 11  # the digits and '-': what an ISO date is written with
BEGIN = OUT  # tells the decoder to begin


def written(date: datetime.date, way: str) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10 if date.day // 10 != 1 else 0, "th")
    weekday, month = calendar.day_name[date.weekday()], calendar.month_name[date.month]
    return way.format(weekday=weekday, day=date.day, ending=ending, month=month, number=date.month, year=date.year)


def numbers(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The letters' numbers (T,B), padded with 0, and the texts' lengths (B)."""
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((lengths.max(), len(texts)), np.int64)
    for b, text in enumerate(texts):
        ids[: len(text), b] = [LETTERS.index(letter) for letter in text]
    return ids, lengths


class Model:
    """Letters -> LSTM -> its last state -> LSTM, told what it wrote last -> a score for each digit."""

    def __init__(self, hidden: int, seed: int) -> None:
        self.encoder = fusedrnn.LSTM(len(LETTERS), hidden, seed=seed)
        self.decoder = fusedrnn.LSTM(OUT + 1, hidden, seed=seed + 1)
        self.head = Linear(hidden, OUT, seed)
        encoder, decoder, head = self.encoder.parameters, self.decoder.parameters, self.head.parameters
        self.parameters = join(encoder=encoder, decoder=decoder, head=head)

    def gradients(self, texts: list[str], isos: list[str]) -> tuple[float, Arrays]:
        ids, lengths = numbers(texts)
        targets, _ = numbers(isos)
        before = np.concatenate([np.full((1, len(texts)), BEGIN), targets[:-1]])  # what it should have written so far
        _, state = self.encoder(ids, lengths=lengths)
        y, _ = self.decoder(before, state)
        loss, dscores = cross_entropy(self.head(y), targets)
        head = self.head.backward(y, dscores)
        decoder = self.decoder.backward(head["x"])
        encoder = self.encoder.backward(None, decoder["state"])  # all that the encoder is asked for is its last state
        return loss, join(encoder=encoder, decoder=decoder, head=head)

    def write(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        """The likeliest digit at every step, which is told to the next; and how likely each was, (10,B,OUT)."""
        ids, lengths = numbers(texts)
        self.encoder.eval()
        _, state = self.encoder(ids, lengths=lengths)
        self.encoder.train()
        last, scores = np.full(len(texts), BEGIN), []
        for _ in range(len("1974-03-05")):
            y, state = self.decoder.step(last, state)
            scores.append(self.head(y))
            last = scores[-1].argmax(axis=1)
        p = softmax(np.stack(scores))
        return ["".join(LETTERS[n] for n in row) for row in p.argmax(axis=2).T], p


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    rng = options.rng
    days = [FIRST + datetime.timedelta(n) for n in range((LAST - FIRST).days + 1)]
    days = [days[n] for n in rng.permutation(len(days))]
    ways = ["{day:02}.{number:02}.{year}"] if options.quick else list(WAYS)
    test, seen = days[:600], days[600:]
    test_texts = [written(date, ways[n % len(ways)]) for n, date in enumerate(test)]
    model = Model(64 if options.quick else 128, seed=options.seed)

    def batch() -> tuple[float, Arrays]:
        dates = [seen[n] for n in rng.integers(len(seen), size=64)]
        texts = [written(date, ways[n]) for date, n in zip(dates, rng.integers(len(ways), size=64), strict=True)]
        return model.gradients(texts, [date.isoformat() for date in dates])

    def right() -> np.ndarray:
        texts, _ = model.write(test_texts)
        return np.array([100.0 * (text == date.isoformat()) for text, date in zip(texts, test, strict=True)])

    updates = 400 if options.quick else 1000
    curve = []
    for update, _ in train(model.parameters, batch, updates):
        if update % (updates // 20) == 0:
            curve.append((update, right().mean()))

    places = zip(*(date.isoformat() for date in seen), strict=True)
    commonest = "".join(max(set(place), key=place.count) for place in places)
    naive = 100 * np.mean([date.isoformat() == commonest for date in test])
    figure = Figure("dates without a mistake", float(right().mean()), f"always {commonest}", float(naive))
    print(figure)
    with picture(options.picture, 12, 6) as drawing:
        left, right_half = drawing.subfigures(1, 2)
        learning, by_way = left.subplots(2)
        learning.plot(*zip(*curve, strict=True))
        learning.set(xlabel="updates", ylabel="test dates right (%)", ylim=(0, 102), title="Learning")
        by_way.barh([WAYS[way] for way in ways], [right()[n :: len(ways)].mean() for n in range(len(ways))])
        by_way.set(xlabel="test dates right (%)", xlim=(0, 102), title="Ways of writing")
        texts, p = model.write(test_texts)
        right_half.suptitle("What the decoder holds likely, place by place")
        for n, axes in enumerate(right_half.subplots(2, 2).flat):
            axes.imshow(p[:, n].T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            axes.set(xticks=range(10), xticklabels=test[n].isoformat(), xlabel="right answer, place by place")
            axes.set(yticks=range(OUT), yticklabels=LETTERS[:OUT], ylabel="written", title=test_texts[n])
    return figure


if __name__ == "__main__":
    main()
