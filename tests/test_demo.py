# SPDX-License-Identifier: Apache-2.0
"""The demo: its optimizer, loss and training against torch's, resuming, Ctrl-C, and what it prints."""

import importlib.util
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import fusedrnn
from fusedrnn import files
from fusedrnn.__main__ import main
from fusedrnn.demo.adam import Adam
from fusedrnn.demo.model import CharacterModel, shapes
from fusedrnn.demo.options import Options
from fusedrnn.demo.text import OTHER, Text, read, rows
from fusedrnn.demo.train import Trainer

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]
SMALL = dict(hidden=16, layers=2, batch=8, chunk=16, seconds=None)


def bench_module():
    spec = importlib.util.spec_from_file_location("demo_vs_torch", ROOT / "bench" / "demo_vs_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from more, and lose much where other programs run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(read(None))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adam_equals_torch(dtype):
    rng = np.random.default_rng(0)
    shapes = [(300, 70), (5,), (1, 1), (2, 20000)]
    ours = {str(n): rng.standard_normal(shape).astype(dtype) for n, shape in enumerate(shapes)}
    ours["strided"] = rng.standard_normal((40, 30)).astype(dtype).T[:, ::2]
    theirs = {name: torch.nn.Parameter(torch.from_numpy(array.copy())) for name, array in ours.items()}
    adam, reference = Adam(ours), torch.optim.Adam(theirs.values(), lr=1.0)
    for step in range(25):
        scale = 10.0 ** (step % 5 - 2)
        grads = {name: (rng.standard_normal(a.shape) * scale).astype(dtype) for name, a in ours.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(grads[name].copy())
        for group in reference.param_groups:
            group["lr"] = 0.01 + 0.001 * step
        adam.step(grads, 0.01 + 0.001 * step)
        reference.step()
    tolerance = 2e-6 if dtype == np.float32 else 1e-13
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name].detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_loss_and_all_gradients_equal_torch(cell):
    model = CharacterModel(37, cell, 24, 2, seed=1)
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 30, (2, 11, 6), dtype=np.int32)  # characters 30..36 do not occur
    chunk = next(fusedrnn.tbptt.chunks(model.layer, model.embed(ids), k1=11))
    loss, grads = model.gradients(chunk, ids, targets)
    net = bench_module().TorchModel(model, cell)
    logits, _ = net(torch.from_numpy(ids), None)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in net.named_parameters():
        reference = parameter.grad.numpy()
        np.testing.assert_allclose(grads[name], reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_torchs_loss_curve_is_followed_over_200_updates(cell, text):
    bench = bench_module()
    model = CharacterModel(len(text.vocabulary), cell, 48, 2, seed=0)
    rival = bench.TorchModel(model, cell)
    columns = rows(text.train, 16)

    def losses(make):
        source = bench.batches(columns, 24)
        return np.array([loss for _, loss in zip(range(200), make(source), strict=False)])

    ours = losses(lambda source: bench.ours(model, source, 24, 2e-3, 1.0))
    theirs = losses(lambda source: bench.theirs(rival, source, 2e-3, 1.0))
    assert len(ours) == len(theirs) == 200
    assert theirs[-20:].mean() < theirs[:5].mean() - 1.0  # something is learnt
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("stop", [1, 13, 29])
def test_resuming_changes_no_bit(cell, stop, tmp_path, text):
    # rows of 59 steps: an epoch has four chunks, the last one shorter, so both runs pass several ends
    options = Options(cell=cell, steps=30, **SMALL)
    short_text = text.decode(text.train[:500])
    short = Text(short_text)
    whole = Trainer(options, short)
    for _ in whole.steps():
        if whole.progress.step % 10 == 0:
            whole.evaluate(), whole.sample(5)  # these must not disturb training
    first = Trainer(options, short)
    for _ in first.steps():
        if first.progress.step == stop:
            break
    first.save(tmp_path / "checkpoint.npz")
    second = Trainer.load(tmp_path / "checkpoint.npz", lambda path: short_text)
    for _ in second.steps():
        pass
    assert second.progress.losses == whole.progress.losses
    assert len(set(whole.progress.losses)) == 30
    for name, array in whole.model.parameters.items():
        np.testing.assert_array_equal(array, second.model.parameters[name], err_msg=name)


def run(*arguments):
    command = [sys.executable, "-m", "fusedrnn", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)


SIZES = ("--hidden", "16", "--layers", "1")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses_in(checkpoint: Path) -> list[float]:
    with np.load(checkpoint) as file:
        return json.loads(str(file["meta"]))["progress"]["losses"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a POSIX signal")
def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    arguments = (*SIZES, "--steps", "120", "--seed", "7", "--out")
    command = [sys.executable, "-u", "-m", "fusedrnn", "demo", *arguments, str(tmp_path / "a")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    seen = ""
    while "bits/char held out" not in seen:  # the first evaluation, after 15 updates
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    seen += process.communicate(timeout=120)[0]
    assert process.returncode == 130, seen
    assert "--resume" in seen and "Traceback" not in seen
    checkpoint = tmp_path / "a" / "checkpoint.npz"
    done = len(losses_in(checkpoint))
    assert 15 <= done < 120
    resumed = run("--resume", "--out", tmp_path / "a")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed after step {done}" in resumed.stdout
    assert run(*arguments, tmp_path / "b").returncode == 0
    assert losses_in(checkpoint) == losses_in(tmp_path / "b" / "checkpoint.npz")
    # done: nothing is left to train, the results are given again
    again = run("--resume", "--out", tmp_path / "a")
    assert again.returncode == 0 and "what it writes" in again.stdout


def test_it_learns_a_text_by_heart_and_leaves_its_results(tmp_path, capsys):
    verse = "the quick brown fox jumps over the lazy dog; \n"
    (tmp_path / "verse.txt").write_text(verse * 120)
    out = tmp_path / "out"
    arguments = ["demo", "--text", tmp_path / "verse.txt", "--cell", "gru", "--hidden", 48, "--layers", 1]
    assert main([str(a) for a in [*arguments, "--steps", 250, "--out", out]]) == 0
    printed = capsys.readouterr().out
    assert verse.strip() in printed
    assert float(re.search(r"held out: ([\d.]+) bits per character", printed)[1]) < 0.2
    assert re.search(r"250 updates, [\d,]+ characters in [\d.]+ s of training \([\d,]+ characters/s\)", printed)
    assert verse.strip() in (out / "sample.txt").read_text()
    assert {path.name for path in out.iterdir()} >= {"checkpoint.npz", "sample.txt"}


def test_without_the_extra_it_prints_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("fusedrnn.demo.display.PLAIN_SECONDS", 0.0)
    assert main(["demo", *SIZES, "--steps", "12", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "for a progress bar" in printed and "loss.png needs matplotlib" in printed
    assert re.search(r"step 12/12  loss [\d.]+ bits/char  [\d,]+ chars/s  0m00s left", printed)


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["demo", *SIZES, "--steps", "9", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_seconds_set_the_number_of_updates(tmp_path):
    begun = time.monotonic()
    assert main(["demo", *SIZES, "--seconds", "3", "--out", str(tmp_path)]) == 0
    assert len(losses_in(tmp_path / "checkpoint.npz")) > Trainer.WARM
    assert time.monotonic() - begun < 60


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    def said(*arguments) -> str:
        with pytest.raises(SystemExit) as left:
            main(["demo", *map(str, arguments)])
        assert left.value.code == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "--resume needs the checkpoint" in said("--resume", "--out", out)
    assert "nowhere.txt" in said("--text", tmp_path / "nowhere.txt", "--out", out)
    (tmp_path / "tiny.txt").write_text("too short")
    assert "expected at least 1000" in said("--text", tmp_path / "tiny.txt", "--out", out)
    assert "not a positive number" in said("--hidden", 0)
    assert not out.exists()
    (tmp_path / "some.txt").write_text("abcdefgh " * 200)
    assert main(["demo", *SIZES, "--steps", "2", "--text", str(tmp_path / "some.txt"), "--out", str(out)]) == 0
    assert "--hidden is 32, but the checkpoint was made with 16" in said("--resume", "--hidden", 32, "--out", out)
    (tmp_path / "some.txt").write_text("hgfedcba " * 200)
    assert "the text is not the one" in said("--resume", "--out", out)


def small_checkpoint(folder: Path, cell: str = "gru") -> tuple[Path, Trainer]:
    """A checkpoint after 5 of 9 updates, and the trainer that wrote it."""
    (folder / "text.txt").write_text("hello world, how are you?\n" * 50)
    sizes = dict(hidden=3, layers=1, batch=4, chunk=8, seconds=None, steps=9)
    options = Options(text=str(folder / "text.txt"), cell=cell, **sizes)
    trainer = Trainer(options, Text(read(options.text)))
    for _ in trainer.steps():
        if trainer.progress.step == 5:
            break
    trainer.save(folder / "checkpoint.npz")
    return folder / "checkpoint.npz", trainer


def everything(trainer: Trainer) -> list:
    arrays = (trainer.model.parameters, trainer.adam.m, trainer.adam.v)
    state = trainer.state if trainer.state_is_pair else (trainer.state,)
    plain = [trainer.options, trainer.progress, trainer.adam.count, trainer.rng.bit_generator.state]
    return [*plain, *(a.tobytes() for kind in arrays for a in kind.values()), *(s.tobytes() for s in state)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path, cell):
    """Bits flipped, bytes lost, beginnings, ends: wherever it happens."""
    path, trainer = small_checkpoint(tmp_path, cell)
    good, expected = path.read_bytes(), everything(trainer)
    rng = np.random.default_rng(0)
    directory = good.index(b"PK\x01\x02")  # the list of the arrays, at the end
    damaged = [good[:at] for at in [0, 1, 30, directory, len(good) - 1, *rng.integers(len(good), size=60)]]
    for at in [*rng.integers(len(good), size=250), *rng.integers(directory, len(good), size=250)]:
        damaged.append(good[:at] + bytes([good[at] ^ (1 << rng.integers(8))]) + good[at + 1 :])
    for _ in range(60):
        a, b = sorted(rng.integers(len(good), size=2))
        damaged += [good[:a] + good[b:], good[:a] + good[a:b][::-1] + good[b:]]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert everything(Trainer.load(path, read)) == expected
        except ValueError as error:
            assert str(error).startswith("demo: ") and str(path) in str(error)
            refused += 1
    assert 400 < refused < len(damaged)  # a date in the directory may be any


def rewritten(path: Path, change) -> None:
    """The checkpoint with its contents changed: a whole file of wrong values."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    meta, arrays = change(meta, arrays) or (meta, arrays)
    if meta is not None:
        arrays["meta"] = np.array(meta if isinstance(meta, str) else json.dumps(meta))
    np.savez(path, **arrays)


WRONG = [None, True, -1, 1.5, 10**7, 10**300, math.nan, math.inf, "x", "", [], [1], {}, {"a": 1}]


def test_wrong_values_in_a_checkpoint_are_refused_or_harmless(tmp_path, capsys):
    path, trainer = small_checkpoint(tmp_path)
    good = path.read_bytes()
    places = [(key,) for key in ("options", "progress", "text", "rng", "adam")]
    places += [
        (key, name) for key in ("options", "progress", "rng") for name in json.loads(str(np.load(path)["meta"]))[key]
    ]
    places += [("rng", "state", "state"), ("rng", "state", "inc"), ("progress", "losses", 0)]
    harmless = {"chunk", "rate", "clip", "seed", "characters", "seconds", "shift", "position", "text", "backend"}
    harmless |= {"state", "inc", "uinteger", "has_uint32", 0}  # numbers that might have been these
    for place in places:
        for value in WRONG:

            def change(meta, arrays, place=place, value=value):
                at = meta
                for key in place[:-1]:
                    at = at[key]
                at[place[-1]] = value

            if (place[-1], value) in (("seconds", None), ("backend", None), ("held_out", [])):
                continue  # as it is
            path.write_bytes(good)
            rewritten(path, change)
            begun = time.monotonic()
            try:
                Trainer.load(path, read)
            except ValueError as error:
                assert str(error).startswith("demo: ") and len(str(error)) < 600, (place, value, error)
            else:
                assert place[-1] in harmless, (place, value)
            assert time.monotonic() - begun < 2, (place, value)


def cut(meta, arrays):
    arrays["p/output.weight"] = arrays["p/output.weight"][:1]  # would be broadcast


def other_cell(meta, arrays):
    meta["options"]["cell"] = "lstm"


def not_a_number(meta, arrays):
    arrays["p/layer.weight_hh_l0"][1, 2] = np.nan


def below_zero(meta, arrays):
    arrays["v/output.bias"][0] = -1e-9


def doubles(meta, arrays):
    arrays["m/output.bias"] = arrays["m/output.bias"].astype(np.float64)


def objects(meta, arrays):
    arrays["m/output.bias"] = np.array([{"a": 1}], object)  # a pickle


def one_more(meta, arrays):
    arrays["p/more"] = np.zeros(3, np.float32)


def one_less(meta, arrays):
    del arrays["state/0"]


def no_meta(meta, arrays):
    return None, arrays


def deep_meta(meta, arrays):
    return "[" * 10**5, arrays


def other_rows(meta, arrays):
    meta["options"]["batch"] = 5


def divergent(meta, arrays):
    for array in arrays.values():
        array[...] = 3e38


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, r"p/output.weight is float32 \(1, 3\); expected float32 \(\d+, 3\)"),
        (other_cell, r"is damaged \(it has no 'state/1'\)"),
        (not_a_number, "p/layer.weight_hh_l0 has numbers that no training gives"),
        (below_zero, "v/output.bias has numbers that no training gives"),
        (doubles, "m/output.bias is float64"),
        (objects, "an array has dtype object"),
        (one_more, "it has 'p/more'"),
        (one_less, "it has no 'state/0'"),
        (no_meta, "it has no meta"),
        (deep_meta, "recursion"),
        (other_rows, r"state/0 is float32 \(1, 4, 3\); expected float32 \(1, 5, 3\)"),
        (divergent, "training has left the finite numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_resuming_from_wrong_arrays_ends_with_a_sentence(tmp_path, capsys, change, words):
    path, _ = small_checkpoint(tmp_path)
    rewritten(path, change)
    with pytest.raises(SystemExit) as left:
        main(["demo", "--resume", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert left.value.code == 2 and re.search(words, said) and said.startswith("demo: "), said
    assert said.count("\n") == 1


def test_files_that_are_no_checkpoint_or_text(tmp_path, capsys):
    def said(*arguments) -> str:
        begun = time.monotonic()
        with pytest.raises(SystemExit) as left:
            main(["demo", *SIZES, "--steps", "1", *map(str, arguments)])
        assert left.value.code == 2 and time.monotonic() - begun < 5
        found = capsys.readouterr().err
        assert found.startswith("demo: ") and found.count("\n") == 1
        return found

    checkpoint, text = tmp_path / "checkpoint.npz", tmp_path / "text"
    resume = ("--resume", "--out", tmp_path)
    checkpoint.mkdir()
    assert "is a directory; expected a file" in said(*resume)
    checkpoint.rmdir()
    for write, words in (
        (lambda: checkpoint.write_bytes(b""), "is damaged (File is not a zip file)"),
        (lambda: np.save(checkpoint.open("wb"), np.zeros(3)), "File is not a zip file"),
        (lambda: checkpoint.write_bytes(pickle.dumps([1])), "File is not a zip file"),
        (lambda: np.savez_compressed(checkpoint, meta=np.zeros(10**7)), "its arrays are compressed"),
        (lambda: promise(checkpoint, (10**12,)), "an array's header and its length do not fit"),
        (lambda: promise(checkpoint, (-1, 0)), "an array's header and its length do not fit"),
        (lambda: checkpoint.symlink_to(checkpoint), "cannot be opened"),
    ):
        checkpoint.unlink(missing_ok=True)
        write()
        assert words in said(*resume), words
    assert "is a directory" in said("--text", tmp_path, "--out", tmp_path / "out")
    assert "is no regular file" in said("--text", os.devnull, "--out", tmp_path / "out")
    with open(text, "wb") as file:
        file.truncate(10**12)  # takes no room
    assert "has 1,000,000,000,000 bytes" in said("--text", text, "--out", tmp_path / "out")
    text.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "is no text (holds zero bytes)" in said("--text", text, "--out", tmp_path / "out")
    text.write_bytes(np.random.default_rng(0).bytes(5000).replace(b"\0", b"\xff"))
    assert "is no text (is no UTF-8)" in said("--text", text, "--out", tmp_path / "out")
    assert "weights at most" in said("--hidden", 10**7, "--out", tmp_path / "out")
    assert "layers is 1000000; expected an integer from 1 to 1000" in said("--layers", 10**6, "--out", tmp_path / "out")
    assert "seed is -1" in said("--seed", -1, "--out", tmp_path / "out")
    assert "cannot be written" in said("--out", text)
    assert not (tmp_path / "out").exists()


def promise(path: Path, shape: tuple[int, ...]) -> None:
    """A small file with an array whose header tells of another."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.npy", header.getvalue())


def test_arrays_are_read_by_name_and_up_to_a_size(tmp_path):
    np.savez(tmp_path / "a.npz", small=np.zeros(3), large=np.zeros(10**5))
    assert list(files.arrays("demo", tmp_path / "a.npz", only=("small",), largest=1000)) == ["small"]
    with pytest.raises(ValueError, match=r"is damaged \(its arrays have 800,\d+ bytes, more than 1,000\)"):
        files.arrays("demo", tmp_path / "a.npz", largest=1000)


def test_an_accent_of_an_old_encoding_is_one_strange_character(tmp_path):
    (tmp_path / "old.txt").write_bytes("Ein schöner Text.\r\n".encode("latin-1") * 100)
    text = read(str(tmp_path / "old.txt"))
    assert text.startswith("Ein sch\ufffdner Text.\nEin")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_the_shapes_of_a_model_are_known_without_it(cell):
    made = CharacterModel(37, cell, 5, 2, seed=0).parameters
    assert shapes(37, cell, 5, 2) == {name: array.shape for name, array in made.items()}


def test_the_text_has_no_paragraph_twice(text):
    paragraphs = [" ".join(p.split()) for p in read(None).split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert len(text.train) > 15 * len(text.held_out) > 100_000


def test_characters_and_numbers():
    many = Text("".join(map(chr, range(0x4E00, 0x4E00 + 2000))) + "ab" * 500)
    assert len(many.vocabulary) == 256 and OTHER in many.vocabulary
    assert many.decode(list(many.encode("ba\u4fff"))) == "ba" + OTHER
    few = Text("hello world " * 100)
    assert few.decode(list(few.encode("hold"))) == "hold"
    columns = rows(np.arange(23, dtype=np.int32), 4)
    np.testing.assert_array_equal(columns, [[t + 5 * b for b in range(4)] for t in range(6)])


def test_the_front_door(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "bench" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert fusedrnn.__version__ in capsys.readouterr().out


def test_the_readmes_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.strip().splitlines()) <= 12
        exec(compile(block, "README.md", "exec"), {})
