"""The average of the weights: beside timm's and torch's, evaluated in the weights' place, saved."""

import copy
import json

import pytest
import torch
from forks import assert_same_bits, final_state
from rows import read_rows
from said import refused, said
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastsmooth import data, models
from fastsmooth.cli.config import resolve
from fastsmooth.optim import NoisySGD
from fastsmooth.train import main
from fastsmooth.training.ema import Ema
from fastsmooth.training.step import Step
from fastsmooth.training.update import Update

CPU = torch.device("cpu")
DECAY = 0.9


def network() -> nn.Module:
    """With BatchNorm, whose statistics are floating and whose count is not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


def updated(model: nn.Module, ema: Ema | None = None) -> Update:
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    return Update(Step(model, optimizer, CPU, "fp32", False), CPU, [], ema)


def batches(count: int):
    numbers = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(6, 3, 4, 4, generator=numbers), torch.randint(5, (6,), generator=numbers)


def test_it_is_the_average_of_timm_and_of_torch_over_twenty_updates():
    model = network()
    theirs = ModelEmaV3(model, decay=DECAY)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    torchs.update_parameters(model)  # its first call copies
    ema = Ema(model, DECAY)
    update = updated(model, ema)
    for images in batches(20):
        update(images, 6)
        theirs.update(model)
        torchs.update_parameters(model)
        found = ema.state_dict()
        assert list(found) == list(model.state_dict())
        assert_same_bits(found, dict(theirs.module.state_dict()))
        for name, value in torchs.module.state_dict().items():
            if value.is_floating_point():  # of whole numbers torch averages too
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    assert found["1.num_batches_tracked"] == 20
    far = (found["4.weight"] - model.state_dict()["4.weight"]).abs().max()
    assert far > 1e-3  # or nothing was averaged


def test_it_begins_at_the_weights_that_there_are():
    model = network()
    ema = Ema(model, DECAY)
    assert_same_bits(ema.state_dict(), dict(model.state_dict()))
    with torch.no_grad():
        model[4].weight.add_(1)
    assert not torch.equal(ema.state_dict()["4.weight"], model[4].weight)


def test_in_place_the_model_is_the_average_and_then_itself_to_the_last_bit():
    model, images = network(), list(batches(3))
    ema = Ema(model, DECAY)
    update = updated(model, ema)
    for batch in images:
        update(batch, 6)
    own = {name: t.clone() for name, t in model.state_dict().items()}
    averages = {name: t.clone() for name, t in ema.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    other = network()
    other.load_state_dict(averages)
    x = images[0][0]
    with pytest.raises(RuntimeError, match="stop"), ema.in_place():
        assert_same_bits(dict(model.state_dict()), averages)
        assert torch.equal(model.eval()(x), other.eval()(x))
        raise RuntimeError("stop")
    assert_same_bits(dict(model.state_dict()), own)
    assert_same_bits(ema.state_dict(), averages)
    assert places == [p.data_ptr() for p in model.parameters()]


def test_a_weight_of_two_names_is_averaged_and_exchanged_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    ema = Ema(model, 0.5)
    began = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    for name in ("0.weight", "1.weight"):
        torch.testing.assert_close(ema.state_dict()[name], began + 0.5)
    with ema.in_place():
        torch.testing.assert_close(model[1].weight.detach(), began + 0.5)
    torch.testing.assert_close(model[1].weight.detach(), began + 1)


def test_the_average_of_another_model_is_not_taken_up():
    ema, others = Ema(network(), DECAY), nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match="another model"):
        ema.load_state_dict(others)
    wrong = copy.deepcopy(ema.state_dict()) | {"4.weight": torch.zeros(5, 1)}
    with pytest.raises(ValueError, match=r"4\.weight is \[5, 1\]"):
        ema.load_state_dict(wrong)


RUN = ["--epochs", "2", "--batchsize", "128", "--log-every", "4"]


def test_a_run_tests_the_average_beside_its_weights_which_go_on_as_without(tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "run"
    assert main([*RUN, "--out", str(plain)]) == 0
    shown = said(main, [*RUN, "--ema", "0.8", "--top5", "--out", str(out)])
    assert shown.code == 0, shown
    with_, without = final_state(out), final_state(plain)
    for name in ("model", "optimizer", "rng", "best_test_acc", "meter"):
        assert_same_bits(with_[name], without[name], name)
    assert with_.keys() - without.keys() == {"ema", "best_ema_test_acc"}
    rows, others = (
        [row for row in read_rows(folder) if row["kind"] == "epoch"] for folder in (out, plain)
    )
    assert [row["test_acc"] for row in rows] == [row["test_acc"] for row in others]
    # the average at the end, tested by a model of its own
    model = models.build("resnet8", 10)
    model.load_state_dict(with_["ema"])
    images = data.open_data(resolve({}), CPU)
    step = Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, "fp32", False, top5=True)
    tested = step.evaluate(images.test.batches(torch.arange(360).split(250)))
    summary = json.loads((out / "summary.json").read_text())
    for place, names in ((rows[-1], "ema_test_{}"), (summary, "final_ema_test_{}")):
        assert place[names.format("acc")] == tested.accuracy
        assert place[names.format("loss")] == pytest.approx(tested.loss, rel=1e-6)
        assert place[names.format("top5")] == tested.top5
    best = max(row["ema_test_acc"] for row in rows)
    assert summary["best_ema_test_acc"] == with_["best_ema_test_acc"] == best
    assert summary["best_test_acc"] == max(row["test_acc"] for row in rows)
    assert f"ema acc {rows[-1]['ema_test_acc']:.2%}" in shown.out
    assert f"of the averaged weights (--ema) {tested.accuracy:.2%}, best {best:.2%}" in shown.out


@pytest.mark.parametrize("value", ["1", "0", "nan", "-0.1"])
def test_a_decay_that_averages_nothing_is_refused(value, tmp_path):
    assert refused(main, ["--ema", value, "--out", str(tmp_path / "run")]).startswith("--ema: ")
