# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: every library that is installed computes the same, and tables say what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedrnn.bench import machine, plot, report, run
from fusedrnn.bench.rivals import OURS, RIVALS
from fusedrnn.bench.timing import BUDGET, Team, WorkerError, summary
from fusedrnn.bench.workloads import BOTH, CELLS, GRID, NAMED, PASSES, Data, Workload, errors, grid, truth

TINY = [
    *(Workload("plain", cell, 3, 5, 6, 4) for cell in CELLS),
    *(Workload("stack", cell, 3, 5, 6, 4, L=2, D=2, lengths=0.4) for cell in CELLS),
    *(Workload("resets", cell, 3, 9, 6, 4, reset=0.3) for cell in CELLS),
    *(Workload("models", cell, 3, 5, 6, 4, E=3) for cell in CELLS),
    *(Workload("cell", cell, 3, 1, 6, 4, module="cell") for cell in CELLS),
    *(Workload("bfloat16", cell, 3, 5, 6, 4, bf16=True) for cell in CELLS),
]


@pytest.mark.parametrize("title", [t if t == OURS else pytest.param(t, marks=pytest.mark.slow) for t in RIVALS])
def test_answers(title: str) -> None:
    if RIVALS[title].version() is None:
        pytest.skip(f"{title} is not installed")
    takes = RIVALS[title].takes
    todo = [(w, which) for w in TINY for which in PASSES if RIVALS[title].refuses(w, which) is None]
    assert {w.cell for w, _ in todo} == set(CELLS)
    with Team([title], 1) as team:
        for w, which in todo:
            truths = {takes(w): truth(Data(takes(w)), which)}
            found = team.measure([title], w, which, truths, rounds=1, seconds=0.001)[title]
            assert "failed" not in found, f"{w}, {which}: {found['failed']}"
            assert found["error"] <= BUDGET[which]
            assert 0 < found["best"] <= found["q1"] <= found["median"] <= found["q3"]


def test_wrong_answers_have_no_time() -> None:
    w = Workload("plain", "lstm", 3, 5, 6, 4)
    wrong = truth(Data(w), "infer")
    wrong["y"][2, 1, 3] += 0.01
    with Team(["numpy loop"], 1) as team:
        found = team.measure(["numpy loop"], w, "infer", {w: wrong}, rounds=1, seconds=0.001)["numpy loop"]
    assert found["failed"].startswith("wrong: y is off by")
    assert "median" not in found


def test_not_a_number_is_wrong() -> None:
    w = Workload("plain", "rnn", 3, 5, 6, 4)
    right = truth(Data(w), "infer")
    assert errors({"y": np.where(right["y"] == right["y"].max(), np.nan, right["y"])}, right, np.arange(3)) == {
        "y": float("inf")
    }


def test_a_process_that_ends_is_reported_and_started_anew() -> None:
    w = Workload("plain", "gru", 3, 5, 6, 4)
    right = truth(Data(w), "infer")
    with Team(["numpy loop"], 1) as team:
        worker = team.workers["numpy loop"]
        worker.ask("drop")
        worker.process.kill()
        with pytest.raises(WorkerError, match="process ended with -9"):
            worker.ask("drop")
        found = team.measure(["numpy loop"], w, "infer", {w: right}, rounds=2, seconds=0.001)["numpy loop"]
        assert len(found["rounds"]) == 2


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """One small size, everything that is installed, then the page and the picture from the file it leaves."""
    arguments = ["--size", "2,5,8,6", "--threads", "1", "--seconds", "0.01", "--rounds", "2", "--machine", "here"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    path = tmp_path / "here" / "bench.json"
    document = json.loads(path.read_text())
    assert document["finished"] and document["versions"][OURS]
    assert len(document["records"]) == 2 * len(CELLS) * len(BOTH)  # the size, and a call
    for record in document["records"]:
        assert record["limit"] > 0
        for title in (set(record["results"]) | set(record["refused"])) & {"torch", OURS}:
            assert record["results"][title]["median"] > 0
    assert document["overhead"]["calls"]["lstm"]["step"] > 0
    assert plot.main([str(path)]) == 0
    assert (path.parent / "speed.png").stat().st_size > 10_000
    page = (path.parent / "README.md").read_text()
    assert page.count("| 2,5,8,6 |") >= len(CELLS) * len(BOTH)
    assert "here/bench.json" in capsys.readouterr().out.replace("\n", "")


def test_command_line_errors(capsys: Any) -> None:
    for arguments, message in (
        (["--size", "2,5"], "B,T,I,H"),
        (["--size", "0,1,1,1"], "positive"),
        (["--groups", "all"], "not one of grid"),
        (["--threads", "4096"], "cores"),
        (["--threads", "2", "--clock", "cpu"], "one thread only"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


# From the document to tables.


def result(median: float, spread: float = 0.02) -> dict[str, Any]:
    return summary([[median * (1 - spread), median, median * (1 + spread)]]) | {"busy": median, "error": 1e-7}


def document() -> dict[str, Any]:
    """LSTM inference at two sizes: 2x and 4x torch; the best rival is slower at one and faster at the other."""
    records = []
    for (B, T, I, H), ours, torch, other in (((1, 100, 64, 64), 1.0, 2.0, 1.5), ((16, 100, 128, 128), 1.0, 4.0, 0.8)):
        w = Workload(f"lstm {B}", "lstm", B, T, I, H)
        records.append(
            {"group": "grid", "pass": "infer", "threads": 1, "size": w.size, "name": w.name, "cell": "lstm"}
            | {"B": B, "T": T, "I": I, "H": H, "limit": 0.9 * ours, "refused": {}}
            | {
                "results": {
                    OURS: result(ours),
                    "torch": result(torch),
                    "onnxruntime": result(other),
                    "jax": {"failed": "x"},
                }
            }
        )
    return {
        "machine": {"cpu": "Some CPU", "cores": 2, "simd": ["avx2"], "python": "3.11"},
        "date": "2026-01-01T00:00",
        "versions": {OURS: "0", "torch": "2.13.0"},
        "settings": {"clock": "wall"},
        "limits": {"1": {"method": "compiled probe", "flops": 9e10, "bandwidth": {"16384": 1e11}}},
        "records": records,
    }


def test_summary() -> None:
    (one,) = report.summaries(document())
    assert one.over_torch == pytest.approx(8**0.5)
    assert one.over_best == pytest.approx((1.5 * 0.8) ** 0.5)
    assert one.least == pytest.approx(0.8)
    assert one.least_torch == pytest.approx(2.0)
    assert one.share_batched == one.share_single == pytest.approx(0.9)
    assert [line.record["B"] for line in one.behind] == [16]
    assert "LSTM inference 16,100,128,128, 1 thread (onnxruntime needs 80% of our time)" in report.behind(document())


def test_within_the_spread_is_not_behind() -> None:
    data = document()
    for record in data["records"]:
        record["results"]["onnxruntime"] = result(0.99, spread=0.05)
    assert report.summaries(data)[0].behind == []
    assert report.behind(data) == (
        "No rival is faster, beyond the spread, in any of the 2 cases. "
        "Within the spread one has the lower median in 2 more, at most to 99% of ours."
    )


def test_targets_of_the_torch_modules() -> None:
    data = document()
    assert report.targets(data) == []
    for record, ours in zip(data["records"], (2.5, 2.0), strict=True):
        record["group"], record["ours"] = "resets", "fusedrnn.torch"
        record["results"]["fusedrnn.torch"] = result(ours)
        record["results"]["fusedrnn.torch plain"] = result(2.0)
    plain, torch = report.targets(data)
    assert (plain.against, plain.reached, plain.met) == ("fusedrnn.torch plain", pytest.approx(0.8), False)
    assert (torch.against, torch.reached, torch.met) == ("torch", pytest.approx(0.8), False)
    for record in data["records"]:
        record["results"]["fusedrnn.torch"] = result(0.4)
    assert all(one.met for one in report.targets(data))
    assert "| resets, training | torch | 5.00x | 5.00x | 5.00x |  |" in report.page(data)
    # where libraries of others ran, ours are no rivals
    assert all(line.best == "onnxruntime" and line.ours["median"] == 0.4 for line in report.lines(data))


def test_our_failure_is_shown() -> None:
    data = document()
    data["records"][0]["results"][OURS] = {"failed": "wrong: y is off by 1.0e+00"}
    assert "wrong: y is off" in report.page(data)
    assert len(report.summaries(data)) == 1  # from the size that is left


def test_readme_block(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results" / "m"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(document()))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    for _ in range(2):  # filling again changes nothing
        plot.main([str(folder / "bench.json"), "--readme", str(readme)])
        text = readme.read_text()
        assert text.startswith(f"before\n{plot.BEGIN}\n")
        assert text.endswith(f"{plot.END}\nafter\n")
        assert text.count("| LSTM inference, 1 thread | 2.83x | 2.00x | 1.10x | 0.80x | 90% | 90% | 1 |") == 1
        assert "old" not in text
        assert (tmp_path / "bench/results/m/speed.png").exists() and "(bench/results/m/speed.png)" in text
    readme.write_text("nothing here")
    with pytest.raises(ValueError, match="speed:begin"):
        plot.fill(readme, "block")


def damage(data: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        data = data[key]
    if value is KeyError:
        del data[place[-1]]
    else:
        data[place[-1]] = value


WRONG = {
    "number": (True, [], {}, "x", -1, 0, math.nan, math.inf, 10**400),
    "text": (None, 3, [], {}),
    "object": (None, [], "x", 3),
    "list": (None, {}, "x", 3, [None], [[]]),
    "whole number": (None, 1.5, KeyError),
    "needed": (KeyError,),
}
PLACES = {
    "number": ["records 1 limit", "records 1 results torch median", "limits 1 flops", "limits 1 bandwidth 16384"],
    "text": [
        "machine cpu",
        "date",
        "versions torch",
        "settings clock",
        "records 1 name",
        "records 1 results jax failed",
    ],
    "object": ["machine", "versions", "limits", "limits 1", "records 0", "records 1 results torch", "overhead"],
    "list": ["machine simd", "records"],
    "whole number": ["machine cores", "records 1 threads", "records 1 B", "records 0 H"],
    "needed": ["date", "records", "limits 1 flops", "records 1 pass", "records 0 results torch q1", "overhead imports"],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_wrong_values_is_refused_before_anything_is_drawn(tmp_path: Path, capsys: Any, kind: str) -> None:
    path = tmp_path / "bench.json"
    imports = {"fusedrnn": 0.1, "first layer": 0.1, "numpy": 0.1}
    for place in PLACES[kind]:
        for value in WRONG[kind]:
            data = document() | {"overhead": {"calls": {}, "tapes": {}, "imports": imports}}
            keys = [int(key) if key in "01" and place.startswith("records") else key for key in place.split()]
            damage(data, tuple(keys), value)
            path.write_text(json.dumps(data))
            with pytest.raises(SystemExit) as left:
                plot.main([str(path)])
            said = capsys.readouterr().err
            assert left.value.code == 2 and said.count("\n") == 1 and "is not whole (" in said, (place, value, said)
            assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_files_that_are_no_results(tmp_path: Path, capsys: Any) -> None:
    path, readme = tmp_path / "bench.json", tmp_path / "README.md"
    whole = json.dumps(document())
    readme.write_text(f"{plot.END} {plot.BEGIN}")  # the wrong way round
    for content, words in (
        (whole[:-20].encode(), "is no JSON"),
        (b"", "is no JSON"),
        (b"[]", "holds a JSON list; expected a JSON object"),
        (b"[" * 10**5, "is no JSON"),
        (b"\0" * 100, "is no text"),
        (whole.replace('"records": [', '"records": [], "others": [').encode(), "records is empty"),
        (whole.replace('"16384"', '"many"').encode(), "bandwidth has the key 'many'"),
        (whole.encode(), "README.md has no <!-- speed:begin -->"),
    ):
        path.write_bytes(content)
        with pytest.raises(SystemExit) as left:
            plot.main([str(path), "--readme", str(readme)])
        said = capsys.readouterr().err
        assert left.value.code == 2 and words in said and said.count("\n") == 1, said
    for missing, words in ((tmp_path / "nowhere.json", "is not there"), (tmp_path, "is a directory")):
        with pytest.raises(SystemExit):
            plot.main([str(missing)])
        assert words in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "bench.json"]


# Workloads and limits.


def test_flops() -> None:
    assert Workload("", "lstm", 1, 100, 64, 64).flops("infer") == 2 * 100 * 4 * 64 * (64 + 64)
    assert Workload("", "gru", 2, 10, 8, 4, L=2, D=2).flops("train") == 3 * 2 * 20 * 3 * 4 * 2 * ((8 + 4) + (8 + 4))
    assert Workload("", "rnn", 4, 10, 8, 4, lengths=0.5).flops("infer") == 2 * 30 * 4 * (8 + 4)


def test_sizes_are_told_apart() -> None:
    names = [w.name for w in (*grid(), *NAMED)]
    assert len(grid()) == 3 * len(GRID) == 30
    assert len(set(names)) == len(names)
    assert all(w.source and set(w.passes) <= set(PASSES) for w in NAMED)


def test_data_is_the_same_in_every_process_and_masked_rows_have_no_gradient() -> None:
    w = Workload("wide", "lstm", 64, 100, 512, 512)
    data, again = Data(w), Data(w)
    assert all(np.array_equal(data.params[name], again.params[name]) for name in data.params)
    assert np.array_equal(data.x, again.x) and not np.array_equal(
        data.x, Data(Workload("other", "lstm", 64, 100, 512, 512)).x
    )
    rows = data.checked_rows
    masked = data.masked().dy
    assert rows.tolist() == [0, 21, 42, 63]
    assert np.array_equal(masked[:, rows], data.dy[:, rows]) and not np.delete(masked, rows, axis=1).any()
    assert Data(Workload("small", "lstm", 5, 9, 4, 4)).checked_rows.tolist() == [0, 1, 2, 3, 4]


def test_limit_has_two_parts() -> None:
    measured = {"flops": 1e9, "bandwidth": {str(1 << k): 1e9 for k in range(14, 27)}}
    w = Workload("", "rnn", 1, 10, 64, 128)
    inputs, recurrent = 2 * 10 * 128 * 64 / 1e9, 10 * 4 * 128 * 128 / 1e9
    assert machine.limit_seconds(w, "infer", 1, measured) == pytest.approx(inputs + recurrent)
    batched = Workload("", "rnn", 16, 10, 64, 128)
    assert machine.limit_seconds(batched, "infer", 1, measured) == pytest.approx(batched.flops("infer") / 1e9)
    assert machine.limit_seconds(batched, "train", 1, measured) == pytest.approx(batched.flops("train") / 1e9)


def test_bandwidth_is_that_of_the_size_each_thread_reads() -> None:
    measured = {"flops": 1e15, "bandwidth": {str(1 << k): 1e9 * k for k in range(14, 27)}}
    w = Workload("", "rnn", 1, 1, 1, 128)  # R has 2^16 bytes
    assert machine.limit_seconds(w, "infer", 1, measured) == pytest.approx(65536 / 16e9, rel=1e-3)
    assert machine.limit_seconds(w, "infer", 2, measured) == pytest.approx(65536 / 15e9, rel=1e-3)


@pytest.mark.slow
def test_measured_limits_are_plausible() -> None:
    measured = machine.measure(1)
    assert 1e8 < measured["flops"] < 1e13
    assert set(measured["bandwidth"]) == {str(1 << k) for k in range(14, 27)}
    assert all(1e7 < value < 1e14 for value in measured["bandwidth"].values())
    better = machine.merge(measured, measured | {"flops": measured["flops"] * 2})
    assert better["flops"] == 2 * measured["flops"] and better["bandwidth"] == measured["bandwidth"]


def test_machine_name() -> None:
    assert machine.name().startswith("cpu-") and machine.name().endswith(f"-{len(machine.cores())}c")
    assert machine.name() == machine.name().lower() and " " not in machine.name()
