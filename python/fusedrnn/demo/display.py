# SPDX-License-Identifier: Apache-2.0
"""What the user sees: a progress bar (or plain lines), and a picture of the loss curve."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .options import BITS, Progress

PLAIN_SECONDS = 5.0  # between two plain lines


class Bar:
    """A tqdm bar on a terminal; one plain line every few seconds where there is no terminal or no tqdm."""

    def __init__(self, step: int = 0) -> None:
        self.bar: Any = None
        self.first, self.begun = step, time.monotonic()
        self.last = self.begun
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                print("(pip install tqdm for a progress bar)")
            else:
                layout = "{percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
                self.bar = tqdm(initial=step, bar_format=layout, dynamic_ncols=True)

    def update(self, step: int, total: int | None, text: Callable[[], str]) -> None:
        """`step` of `total` is done; `text` is asked only when it is shown."""
        now = time.monotonic()
        if now - self.last >= (0.2 if self.bar is not None else PLAIN_SECONDS):
            self.last = now
            if self.bar is not None:
                self.bar.set_postfix_str(text(), refresh=False)
            else:
                print(f"step {step}/{total or '?'}  {text()}  {self.left(step, total)}", flush=True)
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(step - self.bar.n)

    def left(self, step: int, total: int | None) -> str:
        if total is None:
            return "measuring the speed"
        seconds = (total - step) * (time.monotonic() - self.begun) / max(step - self.first, 1)
        return f"{seconds // 60:.0f}m{seconds % 60:02.0f}s left"

    def line(self, text: str) -> None:
        """Print above the bar."""
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


class Display(Bar):
    """The demo's bar: loss and speed."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.step)
        self.progress = progress
        self.mark = (progress.seconds, progress.characters)

    def show(self) -> None:
        self.update(self.progress.step, self.progress.total, self.text)

    def text(self) -> str:
        progress = self.progress
        seconds, characters = progress.seconds - self.mark[0], progress.characters - self.mark[1]
        self.mark = (progress.seconds, progress.characters)
        speed = characters / seconds if seconds else 0.0
        return f"loss {np.mean(progress.losses[-20:]) * BITS:.3f} bits/char  {speed:,.0f} chars/s"


def picture(progress: Progress, path: Path, title: str) -> bool:
    """The loss curve as an image; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = np.array(progress.losses) * BITS
    width = max(len(losses) // 100, 1)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="0.85", linewidth=0.8)
    axes.plot(np.arange(len(smooth)) + (width + 1) / 2, smooth, label="training")
    if progress.held_out:
        axes.plot(*zip(*progress.held_out, strict=True), "o-", label="held out")
    axes.set(title=title, xlabel="updates", ylabel="bits per character")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
