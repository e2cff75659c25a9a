# SPDX-License-Identifier: Apache-2.0
"""Training methods: backpropagation through time, the same truncated, and real-time recurrent learning, exact and
diagonal, in one training loop. A GRU reads a stream of handwritten digits, four pixels a step, and names each after its
last pixels. The data are scikit-learn's digits, 1797 images of 8 by 8; the figure is the share of held-out images that
exact RTRL has learned to name, beside that of always naming the commonest digit.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import fusedrnn
from fusedrnn import rtrl, tbptt
from fusedrnn.clip import clip_grad_norm_

from ..demo.adam import Adam
from ..demo.display import Bar
from .example import Figure, Linear, Options, accuracy, cross_entropy, join, load_digits, picture

HIDDEN, BATCH, PIXELS = 16, 16, 4
STEPS = 64 // PIXELS  # of one image
BACK = STEPS // 4  # as far as truncated backpropagation looks

METHODS: dict[str, Callable[..., Any]] = {
    "BPTT": partial(tbptt.chunks, k1=STEPS),
    f"TBPTT, {BACK} steps back": partial(tbptt.chunks, k1=STEPS, k2=BACK),
    "RTRL": partial(rtrl.chunks, k1=STEPS),
    "RTRL, diagonal": partial(rtrl.chunks, k1=STEPS, approximation="diagonal"),
}


def learn(name: str, seed: int, updates: int, every: int) -> Iterator[tuple[int, float, float]]:
    """Train by one method; gives (updates, seconds of training, test accuracy in %) every so many updates."""
    rng = np.random.default_rng(seed)
    x, targets, test_x, test_targets = load_digits(rng, PIXELS)
    # float64, so that rounding does not lead two methods with the same gradient to different weights
    x, test_x = x.astype(np.float64), test_x.astype(np.float64)
    layer, head = fusedrnn.GRU(PIXELS, HIDDEN, seed=seed, dtype=np.float64), Linear(HIDDEN, 10, seed, np.float64)
    parameters = join(layer=layer.parameters, head=head.parameters)
    adam, bar = Adam(parameters), Bar()
    images = rng.integers(len(targets), size=(updates, BATCH))
    begins = np.zeros((STEPS, BATCH), bool)
    begins[0] = True  # every row begins a new image

    seconds, since = 0.0, time.perf_counter()
    stream = ((x[:, chosen], begins) for chosen in images)
    for chunk in METHODS[name](layer, stream):
        dy, update = None, chunk.stop // STEPS
        if chunk.update:  # the last step of an image: the only one that is asked for anything
            _, dscores = cross_entropy(head(chunk.y[-1]), targets[images[update - 1]])
            of_head = head.backward(chunk.y[-1], dscores)
            dy = np.zeros_like(chunk.y)
            dy[-1] = of_head["x"]
        of_layer = chunk.backward(dy)
        if chunk.update:
            grads = join(layer={kind: of_layer[kind] for kind in layer.parameters}, head=of_head)
            grads = {kind: grads[kind] for kind in parameters}
            clip_grad_norm_(grads, 1.0)
            adam.step(grads, 1e-2)
            seconds += time.perf_counter() - since
            bar.update(update, updates, lambda: name)
            if update % every == 0:
                yield update, seconds, accuracy(head(layer(test_x)[0][-1]), test_targets)
            since = time.perf_counter()
    bar.close()


def main(arguments: list[str] | None = None) -> Figure:
    options = Options(__file__, __doc__, arguments)
    updates = 120 if options.quick else 600
    curves: dict[str, np.ndarray] = {}
    for name in METHODS:
        curves[name] = np.array(list(learn(name, options.seed, updates, every=updates // 40)))
        _, seconds, reached = curves[name][-1]
        print(f"{name}: {reached:.1f} % of the test images after {updates} updates in {seconds:.1f} s", flush=True)
    apart = np.abs(curves["RTRL"][:, 2] - curves["BPTT"][:, 2]).max()
    print(f"BPTT and RTRL have the same gradients: at no point are the two more than {apart:.1f} % apart")

    test_targets = load_digits(np.random.default_rng(options.seed), PIXELS)[3]
    commonest = 100 * float(np.bincount(test_targets).max()) / len(test_targets)
    figure = Figure("test accuracy of RTRL", float(curves["RTRL"][-1, 2]), "always the commonest digit", commonest)
    print(figure)
    with picture(options.picture, 11, 4.5) as drawing:
        by_update, by_time = drawing.subplots(1, 2, sharey=True)
        for name, curve in curves.items():
            style = {"linewidth": 4, "alpha": 0.5} if name == "BPTT" else {}  # RTRL's line lies on it
            by_update.plot(curve[:, 0], curve[:, 2], label=name, **style)
            by_time.plot(curve[:, 1], curve[:, 2], **style)
        by_update.set(xlabel="updates", ylabel="test accuracy (%)", title=f"A digit in {STEPS} steps, {HIDDEN} units")
        by_time.set(xlabel="seconds of training", xscale="log", title="The same against time")
        for axes in (by_update, by_time):
            axes.axhline(commonest, color="0.5", linestyle=":", label="always the commonest digit")
            axes.grid(alpha=0.3)
        by_update.legend()
    return figure


if __name__ == "__main__":
    fusedrnn.set_num_threads(1)  # on models this small more threads only wait for one another
    main()
