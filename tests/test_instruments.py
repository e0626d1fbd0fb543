"""The loop and its instruments: when they are asked, what becomes of what they say, and that a run
with them has the bits of one without."""

import json
import math
from pathlib import Path

import pytest
import torch
from exact import EXACT
from rows import read_rows

from fastsmooth.noise.instrument import Instrument
from fastsmooth.runfolder.checkpoint import Checkpoints
from fastsmooth.train import main
from fastsmooth.training import modes

RUN = [*EXACT, "--epochs", "1", "--log-every", "100", "--optimizer", "shb", "--lr", "0.02"]


class Cosine(Instrument):
    """That of the angle between a gradient and the one before it, every tenth update."""

    name = "cosine"

    wants_gradient = True

    def __init__(self, last: int = 10**9):
        self.calls: list[tuple[str, int]] = []
        self.previous: torch.Tensor | None = None
        self.values: list[float] = []
        self.last = last  # the update after which it has enough

    def due(self, run):
        return run.update % 10 in (8, 9)

    def before_gradient(self, run, x, y, point):
        self.calls.append(("before_gradient", run.update))

    def before_update(self, run, x, y, point):
        self.calls.append(("before_update", run.update))
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        before, self.previous = self.previous, gradient.clone()
        if run.update % 10 == 9:
            assert before is not None
            self.values.append(torch.cosine_similarity(gradient, before, dim=0).item())
            return {"cosine": self.values[-1]}
        return None

    def after_update(self, run, point):
        self.calls.append(("after_update", run.update))

    def end_epoch(self):
        return {"cosine_mean": math.fsum(self.values) / max(len(self.values), 1)}

    def enough(self):
        return bool(self.calls) and self.calls[-1] == ("after_update", self.last)

    def files(self, run):
        return {"cosine.json": {"values": self.values}}

    def introduction(self):
        return ["the cosine is measured"]

    def conclusion(self, run):
        return [f"{len(self.values)} cosines"]

    def state_dict(self):
        return {"values": self.values, "previous": self.previous}

    def load_state_dict(self, state):
        self.values, self.previous = state["values"], state["previous"]


@pytest.fixture
def with_cosine(monkeypatch):
    """Every run has one; the list has those that were made."""
    made: list[Cosine] = []

    def make(last: int = 10**9):
        def of(parts):
            made.append(Cosine(last))
            return made[-1]

        monkeypatch.setattr("fastsmooth.training.build.INSTRUMENTS", (*modes.INSTRUMENTS, of))
        return made

    return make


def weights(out: Path) -> dict:
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    return torch.load(newest, weights_only=True)


def test_a_new_instrument_is_a_class_and_a_row(with_cosine, tmp_path, capsys):
    assert main([*RUN, "--out", str(tmp_path / "plain")]) == 0
    made = with_cosine()
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 0
    (cosine,) = made
    # it is asked in the loop's order, before and after an update that counts from 0 and from 1
    assert [call for call in cosine.calls if call[1] in (8, 9)] == [
        ("after_update", 8),
        ("before_gradient", 8),
        ("before_update", 8),
        ("after_update", 9),
        ("before_gradient", 9),
        ("before_update", 9),
    ]
    assert [u for name, u in cosine.calls if name == "after_update"] == list(range(1, 46))
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "measure"]
    assert [row["step"] for row in rows] == [9, 19, 29, 39]
    assert [row["cosine"] for row in rows] == cosine.values
    (epoch,) = [row for row in read_rows(tmp_path / "run") if row["kind"] == "epoch"]
    assert epoch["cosine_mean"] == pytest.approx(sum(cosine.values) / 4)
    found = json.loads((tmp_path / "run" / "cosine.json").read_text())
    assert found == {"values": cosine.values}
    said = capsys.readouterr().out
    assert "the cosine is measured" in said and "4 cosines" in said
    for key in ("model", "optimizer", "rng", "meter"):
        ours, plain = weights(tmp_path / "run")[key], weights(tmp_path / "plain")[key]
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_what_it_has_seen_goes_on_with_the_run(with_cosine, tmp_path):
    made = with_cosine()
    flags = [*RUN, "--checkpoint-every", "9"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert main([*flags, "--max-time", "1e-9", "--out", str(tmp_path / "run")]) == 75
    while main(["--resume", "--out", str(tmp_path / "run")]) == 75:
        pass
    assert made[-1].values == made[0].values
    whole, again = ((tmp_path / name / "cosine.json").read_bytes() for name in ("whole", "run"))
    assert whole == again


class Counting(Instrument):
    """Due always; says how often it was asked."""

    name = "counting"

    def __init__(self):
        self.calls = 0

    def due(self, run):
        return True

    def before_gradient(self, run, x, y, point):
        self.calls += 1
        return {"calls": self.calls}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_a_stop_within_a_later_instrument_has_none_asked_twice(tmp_path, monkeypatch):
    made = (lambda parts: Counting(), *modes.INSTRUMENTS)
    monkeypatch.setattr("fastsmooth.training.build.INSTRUMENTS", made)
    flags = [*EXACT, "--mode", "sampling", "--steps", "2", "4", "--draws", "2"]
    flags += ["--optimizer", "shb", "--beta", "0.3", "--lr", "0.02"]
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert main([*flags, "--max-time", "1e-9", "--out", str(tmp_path / "run")]) == 75
    state = weights(tmp_path / "run")
    assert state["update"] == 0 and state["asked"] == ["counting"]  # within the first history
    assert main(["--resume", "--max-time", "1000", "--out", str(tmp_path / "run")]) == 0
    calls, again = (
        [row["calls"] for row in read_rows(tmp_path / name) if "calls" in row]
        for name in ("whole", "run")
    )
    assert calls == again == [1, 2, 3, 4, 5]


def test_a_run_ends_where_an_instrument_has_enough(with_cosine, tmp_path):
    with_cosine(last=12)
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] == 12 and summary["epochs"] == 0


def test_an_older_checkpoint_is_refused_in_words_that_say_what_to_do(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*RUN, "--max-time", "1e-9", "--out", str(out)]) == 75
    (path,) = (out / "checkpoints").glob("*.pt")
    state = torch.load(path, weights_only=True)
    for form in (None, state["format"] + 1):
        changed = {k: v for k, v in state.items() if k != "format"}
        changed |= {} if form is None else {"format": form}
        Checkpoints(out / "checkpoints", print).save(state["update"], changed)
        capsys.readouterr()
        assert main(["--resume", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another version of fastsmooth" in line and "start a new one" in line
    Checkpoints(out / "checkpoints", print).save(state["update"], state)
    assert main(["--resume", "--max-time", "1000", "--out", str(out)]) == 0
