# SPDX-License-Identifier: Apache-2.0
"""Every example runs, learns more than a naive way knows, says so, and leaves a picture; what they share is right."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

from fusedrnn import examples
from fusedrnn.examples.example import Linear, cross_entropy

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more, and lose much where other programs run beside."""
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="minutes, and nothing that the other tests do not run")
@pytest.mark.parametrize("name", examples.NAMES)
def test_it_learns_says_so_and_draws(name, tmp_path, capsys):
    for module in ("matplotlib", "sklearn", "statsmodels"):
        pytest.importorskip(module)
    example = importlib.import_module(f"fusedrnn.examples.{name}")
    figure = example.main(["--quick", "--out", str(tmp_path)])
    assert figure.learned, figure
    assert str(figure) in capsys.readouterr().out
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_list_is_complete_and_printed():
    folder = Path(examples.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", "__main__", "example", *examples.NAMES}
    lines = run("fusedrnn.examples").splitlines()
    assert [line.split()[0] for line in lines if line.split(" ")[0] in examples.NAMES] == list(examples.NAMES)


@pytest.mark.parametrize("name", examples.NAMES)
def test_help_explains_it(name, capsys):
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"fusedrnn.examples.{name}").main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m fusedrnn.examples.{name}" in printed and "--quick" in printed
    assert len(printed) > 500  # the sentences are there


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'fusedrnn\[examples\]'"):
        importlib.import_module("fusedrnn.examples.digits").main(["--out", str(tmp_path)])


def test_gradients_of_the_head_and_the_loss():
    rng = np.random.default_rng(0)
    head = Linear(5, 7, seed=0, dtype=np.float64)
    head.parameters["bias"][:] = rng.standard_normal(7)
    x, targets = rng.standard_normal((3, 4, 5)), rng.integers(-1, 7, (3, 4))
    assert (targets < 0).any()
    loss, dlogits = cross_entropy(head(x), targets)
    grads = head.backward(x, dlogits)
    for name, array in {"x": x, **head.parameters}.items():
        for n in rng.integers(array.size, size=5):
            values = []
            for shift in (1e-6, -2e-6):
                array.reshape(-1)[n] += shift
                values.append(cross_entropy(head(x), targets)[0])
            array.reshape(-1)[n] += 1e-6
            assert grads[name].reshape(-1)[n] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8), name
    assert np.all(dlogits[targets < 0] == 0)
    p = np.exp(head(x)) / np.exp(head(x)).sum(axis=2, keepdims=True)
    own = np.take_along_axis(p, np.maximum(targets, 0)[..., None], 2)[..., 0]
    assert loss == pytest.approx(-np.log(own[targets >= 0]).mean())
