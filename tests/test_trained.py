"""The model of a run folder, built again and shown images (fastsmooth.load_run)."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastsmooth as fs
from fastsmooth.cli import config as configs
from fastsmooth.data import read_set
from fastsmooth.runfolder.read import RunError
from fastsmooth.train import main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on the digits, of which the second is not the best."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["--epochs", "3", "--keep", "all", "--seed", "3", "--out", str(out)]) == 0
    return out


def test_the_model_has_the_test_accuracy_that_its_weights_say(run_folder):
    x, y = next(fs.open_data("digits").test.batches([torch.arange(360)]))
    for weights in ("best", "last", "epoch-1", "epoch-3", None):
        run = fs.load_run(run_folder, weights)
        assert not run.model.training
        accuracy = (run.model(x).argmax(dim=1) == y).double().mean().item()
        assert accuracy == pytest.approx(run.about_weights["test_acc"], abs=1e-12)
    tested = [row["test_acc"] for row in fs.load_run(run_folder).of_kind("epoch")]
    assert fs.load_run(run_folder, "best").about_weights["test_acc"] == max(tested)
    assert fs.load_run(run_folder, "last").about_weights["test_acc"] == tested[-1]


def test_an_image_is_shown_as_the_run_tests_it(run_folder, tmp_path):
    run = fs.load_run(run_folder)
    x, _ = next(fs.open_data("digits").test.batches([torch.arange(8)]))
    split = read_set(configs.resolve({})).test
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        split.image(i).save(path)
        assert torch.equal(run.transform(path), x[i])
        assert torch.equal(run.transform(Image.open(path)), x[i])
    probabilities = run.model(x).softmax(dim=1)
    for i, found in enumerate(run.predict(paths, top=3)):
        assert found.path == str(paths[i]) and len(found.likely) == 3
        place = int(probabilities[i].argmax())
        assert found.name == run.classes[place]
        assert found.probability == pytest.approx(probabilities[i, place].item(), rel=1e-6)
    assert run.predict(split.image(0), top=99)[0].likely[0] == run.predict(paths[0])[0].likely[0]
    assert len(run.predict(paths[0], top=99)[0].likely) == 10


def test_weights_are_those_of_the_network_itself(run_folder):
    found = load_file(run_folder / "last.safetensors")
    model = fs.build_model("resnet8", 10)
    model.load_state_dict(found)
    state = torch.load(next((run_folder / "checkpoints").glob("*-135.pt")), weights_only=True)
    assert found.keys() == state["model"].keys()
    assert all(torch.equal(found[name], state["model"][name]) for name in found)


DAMAGED = "no safetensors file, or damaged"


def damaged(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


FAULTS = {
    "no model.json": (lambda f: (f / "model.json").unlink(), "the run has none"),
    "model.json cut": (lambda f: damaged(f, "model.json", lambda b: b[:40]), "it is damaged"),
    "another form": (
        lambda f: damaged(f, "model.json", lambda b: b.replace(b'"format": 1', b'"format": 9')),
        "another version",
    ),
    "a class less": (
        lambda f: damaged(f, "model.json", lambda b: b.replace(b'"9"', b'"8", "9"', 1)),
        "11 classes have 10 names",
    ),
    "a wrong type": (
        lambda f: damaged(f, "model.json", lambda b: b.replace(b': 3,', b': "3",')),
        "its channels is '3'",
    ),
    "weights cut": (
        lambda f: damaged(f, "best.safetensors", lambda b: b[:-9]), DAMAGED,
    ),
    "weights of nothing": (
        lambda f: damaged(f, "best.safetensors", lambda b: b""), DAMAGED,
    ),
    "weights of another network": (
        lambda f: damaged(f, "model.json", lambda b: b.replace(b"resnet8", b"resnet20")),
        "has not the weights of resnet20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_in_words(fault, run_folder, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(RunError, match=words) as error:
        _ = fs.load_run(folder).model
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_named(run_folder):
    with pytest.raises(RunError, match=r"no weights 'epoch-9': it has best, epoch-1, epoch-2"):
        _ = fs.load_run(run_folder, "epoch-9").model


def test_keep_last_keeps_no_others(tmp_path):
    out = tmp_path / "run"
    assert main(["--epochs", "2", "--keep", "last", "--out", str(out)]) == 0
    assert [path.name for path in out.glob("*.safetensors")] == ["last.safetensors"]
    last = fs.load_run(out).of_kind("epoch")[-1]
    about = fs.load_run(out).about_weights
    assert all(about[name] == last[name] for name in ("epoch", "test_acc", "test_loss"))


def test_the_last_weights_claim_no_test_that_was_before_them(tmp_path):
    """Of a run that ends inside an epoch."""
    out = tmp_path / "run"
    assert main(["--budget", "updates=60", "--out", str(out)]) == 0
    tested = fs.load_run(out, "last").about_weights  # the end of a budget is tested
    assert (tested["update"], tested["test_acc"] is None) == (60, False)
    flags = [
        "--mode",
        "sampling",
        "--steps",
        "50",
        "--draws",
        "2",
        "--out",
        str(tmp_path / "other"),
    ]
    assert main(flags) == 0
    untested = fs.load_run(tmp_path / "other", "last").about_weights
    assert untested["update"] == 50 and untested["test_acc"] is None


def test_what_is_no_image_is_refused_in_words(run_folder):
    for thing in (torch.zeros(3, 8, 8), 3, None):
        with pytest.raises(ValueError, match="give a PIL image, or the path of a file"):
            fs.load_run(run_folder).predict([thing])
