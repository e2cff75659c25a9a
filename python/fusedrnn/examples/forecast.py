# SPDX-License-Identifier: Apache-2.0
"""Many-to-one: an LSTM reads three years of monthly CO2 measurements and forecasts the next year, all months at once.
The data are Mauna Loa's, 1958 to 2001, from statsmodels; the figure is the mean error on the last ten years, which it
has not seen, beside that of the best of three naive forecasts.
"""

import numpy as np

import fusedrnn

from .example import Arrays, Figure, Linear, Options, join, picture, require, train

PAST, FUTURE, YEAR, TEST = 36, 12, 12, 120  # months


class Model:
    """The months so far -> LSTM -> the last step's output -> the change until each of the coming months."""

    def __init__(self, hidden: int, seed: int) -> None:
        self.layer = fusedrnn.LSTM(1, hidden, seed=seed)
        self.head = Linear(hidden, FUTURE, seed)
        self.parameters = join(layer=self.layer.parameters, head=self.head.parameters)

    def __call__(self, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """past (PAST,B) in ppm -> the layer's output, and the forecast (B,FUTURE) in ppm. It sees and gives differences
        from the last measurement, because the level of the test years is higher than any that it trained on."""
        y, _ = self.layer(((past - past[-1]) / 3)[:, :, None])
        return y, past[-1][:, None] + 3 * self.head(y[-1])

    def gradients(self, past: np.ndarray, future: np.ndarray) -> tuple[float, Arrays]:
        """The mean squared error of a batch, in ppm^2, and the gradients of all parameters."""
        y, forecast = self(past)
        error = forecast - future
        head = self.head.backward(y[-1], 3 * 2 * error / error.size)
        dy = np.zeros_like(y)
        dy[-1] = head["x"]  # many-to-one: only the last step is asked for anything
        return float((error**2).mean()), join(layer=self.layer.backward(dy), head=head)


def windows(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every stretch of PAST + FUTURE months: (PAST,N) and (N,FUTURE)."""
    every = np.lib.stride_tricks.sliding_window_view(series, PAST + FUTURE)
    return np.ascontiguousarray(every[:, :PAST].T), np.ascontiguousarray(every[:, PAST:])


def naive(past: np.ndarray) -> dict[str, np.ndarray]:
    """Three forecasts that need no learning, each (N,FUTURE)."""
    last_year = past[-YEAR:][:FUTURE].T
    return {
        "as this month": np.repeat(past[-1][:, None], FUTURE, axis=1),
        "as a year before": last_year,
        "as a year before, plus the year's rise": last_year + (past[-1] - past[-1 - YEAR])[:, None],
    }


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    weeks = require("statsmodels.datasets").co2.load_pandas().data.co2
    months = weeks.resample("MS").mean().interpolate()  # a few are missing
    series = months.to_numpy(np.float32)
    past, future = windows(series[:-TEST])
    test_past, test_future = windows(series[-TEST - PAST :])
    model = Model(hidden=32, seed=options.seed)

    def batch() -> tuple[float, Arrays]:
        chosen = options.rng.integers(len(future), size=64)
        return model.gradients(past[:, chosen], future[chosen])

    def forecast() -> np.ndarray:
        model.layer.eval()
        result = model(test_past)[1]
        model.layer.train()
        return result

    updates = 250 if options.quick else 600
    curve = []
    for update, _ in train(model.parameters, batch, updates):
        if update % (updates // 25) == 0:
            curve.append((update, float(np.abs(forecast() - test_future).mean())))

    forecasts = naive(test_past) | {"LSTM": forecast()}
    errors = {name: np.abs(values - test_future) for name, values in forecasts.items()}
    best = min(naive(test_past), key=lambda name: errors[name].mean())
    reached, naively = float(errors["LSTM"].mean()), float(errors[best].mean())
    figure = Figure("mean error of the forecasts", reached, best, naively, unit="ppm", smaller=True)
    print(figure)
    colors = dict(zip(forecasts, ("0.75", "tab:green", "tab:blue", "tab:red"), strict=True))
    with picture(options.picture, 11, 7) as drawing:
        above, below = drawing.subfigures(2, 1)
        learning, ahead = above.subplots(1, 2)
        learning.plot(*zip(*curve, strict=True), color=colors["LSTM"], label="LSTM")
        learning.axhline(naively, color=colors[best], linestyle=":", label=best)
        learning.set(xlabel="updates", ylabel="mean error (ppm)", ylim=(0, None), title="Learning")
        for name, error in errors.items():
            ahead.plot(range(1, FUTURE + 1), error.mean(axis=0), color=colors[name], label=name)
        ahead.set(xlabel="months ahead", ylabel="mean error (ppm)", ylim=(0, None), title="Near and far")
        course = below.subplots()
        dates = months.index[-TEST:]
        course.plot(dates, series[-TEST:], color="k", linewidth=0.8, label="measured")
        for begin in range(0, len(test_future), 2 * YEAR):
            then = dates[begin : begin + FUTURE]
            for name in (best, "LSTM"):
                course.plot(then, forecasts[name][begin], color=colors[name], label=name if begin == 0 else None)
        course.set(ylabel="CO2 (ppm)", title="Forecasts of a year, in the test years")
        for axes in (learning, ahead, course):
            axes.grid(alpha=0.3)
            axes.legend()
    return figure


if __name__ == "__main__":
    main()
