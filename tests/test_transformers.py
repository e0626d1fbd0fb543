"""NoiseCallback in the Trainer of transformers, against plain loops over the same micro-batches."""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import assert_same_bits, free_port
from torch import nn
from torch.nn import functional as F

import fastsmooth as fs

pytest.importorskip("transformers")
pytestmark = [
    # of the libraries, about each other
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]
IMAGES = 24


class Rows(torch.utils.data.Dataset):
    """Of dicts, as a Trainer's data sets have them."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def digits(count=IMAGES, labels=lambda y: y):
    train = fs.open_data("digits", device="cpu").train
    x, y = next(train.batches(torch.arange(count).split(count)))
    return Rows(pixel_values=x.mean(1, keepdim=True), labels=labels(y))


def sentences(count=24):
    """Of 3 to 8 tokens each."""
    torch.manual_seed(1)
    ids = [torch.randint(1, 50, (3 + i % 6,)) for i in range(count)]
    return Rows(input_ids=ids, labels=torch.randint(2, (count,)))


def padded(rows):
    """A batch of sentences, as long as its longest."""
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def vit(**config):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    facts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    facts |= {"intermediate_size": 64, "image_size": 8, "patch_size": 4, "num_channels": 1}
    return ViTForImageClassification(ViTConfig(**facts, **({"num_labels": 10} | config)))


TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 64, "max_position_embeddings": 16}


def bert(**config):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**TEXT, **still, **config))


def trainer_of(model, data, folder, collator=None, optimizer=None, trainer_class=None, **flags):
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    own = {name: flags.pop(name) for name in ("compute_loss_func",) if name in flags}
    facts = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    facts |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 2}
    flags = facts | {"use_cpu": True, "report_to": [], "disable_tqdm": True} | flags
    sgd = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    args = TrainingArguments(str(folder), **flags)
    return (trainer_class or Trainer)(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        optimizers=(sgd, None),
        **own,
    )


def trained(trainer, every=None, resume=None, **options):
    """(weights, optimizer and random numbers after training, the rows that were logged)."""
    from transformers.trainer_callback import PrinterCallback

    from fastsmooth.adapters.transformers import NoiseCallback

    trainer.remove_callback(PrinterCallback)
    if every:
        trainer.add_callback(NoiseCallback(trainer, every=every, **options))
    trainer.train(resume_from_checkpoint=resume)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    state = [trainer.model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    return state, [row for row in trainer.state.log_history if "noise/c2_sampled" in row]


def seen_by(trainer):
    """What training_step of a trainer gets, as it comes."""
    seen, step = [], trainer.training_step

    def look(model, inputs, *args):
        seen.append(dict(inputs))
        return step(model, inputs, *args)

    trainer.training_step = look
    return seen


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


def plain_rows(model, parts, loss, accumulated=1, dtype=None):
    """Those of a NoiseTracker before every update of a loop of our own over `parts`."""
    net = Logits(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    noise = fs.NoiseTracker(net, optimizer, samples=IMAGES, every=1, loss=loss)
    rows = []
    for start in range(0, len(parts), accumulated):
        micro = parts[start : start + accumulated]
        xs, ys = [p["pixel_values"] for p in micro], [p["labels"] for p in micro]
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            rows.append(noise(xs, ys))
            for x, y in zip(xs, ys, strict=True):
                (loss(net(x).float(), y) * len(y) / sum(map(len, ys))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return rows


SMOOTHED = functools.partial(F.cross_entropy, label_smoothing=0.1)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
CASES = {
    "plain, with evaluations": (EVALUATED, {}, F.cross_entropy),
    "micro-batches": ({"gradient_accumulation_steps": 2}, {"accumulated": 2}, F.cross_entropy),
    "bfloat16": ({"bf16": True}, {"dtype": torch.bfloat16}, F.cross_entropy),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, SMOOTHED),
    "checkpoints": ({"gradient_checkpointing": True}, {}, F.cross_entropy),
    "a compiler": ({"torch_compile": True, "torch_compile_backend": "eager"}, {}, F.cross_entropy),
}


SLOW = ("label smoothing", "checkpoints", "a compiler")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.full] if c in SLOW else []) for c in CASES]
)
def test_c2_is_that_of_a_plain_loop_and_training_keeps_its_bits(case, tmp_path):
    flags, how, loss = CASES[case]
    host = trainer_of(vit(), digits(), tmp_path, **flags)
    parts = seen_by(host)
    alone, none = trained(host)
    assert not none
    state, rows = trained(trainer_of(vit(), digits(), tmp_path, **flags), every=1)
    assert_same_bits(state, alone)
    expected = plain_rows(vit(), parts, loss, **how)
    assert len(rows) == len(expected) >= 2
    for at, (row, want) in enumerate(zip(rows, expected, strict=True)):
        assert row["step"] == at
        for name in ("c2_sampled", "grad_norm", "delta_measured", "noise_scale"):
            assert row.get(f"noise/{name}") == pytest.approx(want[name], rel=1e-6), name


def written_out(model, batch):
    """C2 of a batch of 24 sentences by a backward pass each, and ||g||."""
    grads = []
    for i in range(len(batch["labels"])):
        value = model(**{name: v[i : i + 1] for name, v in batch.items()}).loss
        grads.append(torch.autograd.grad(value, list(model.parameters())))
    rows = torch.stack([torch.cat([g.flatten() for g in own]).double() for own in grads])
    mean = rows.mean(0)
    return fs.estimators.per_sample((rows - mean).square().sum(1), 24).value, mean.norm().item()


def test_inputs_of_several_tensors_and_lengths(tmp_path):
    model = bert()
    alone, _ = trained(trainer_of(bert(), sentences(), tmp_path, padded))
    noisy = trainer_of(bert(), sentences(), tmp_path, padded)
    batches = seen_by(noisy)
    state, rows = trained(noisy, every=1)
    assert_same_bits(state, alone)
    assert len({b["input_ids"].shape for b in batches}) > 1 and len(rows) == 3
    c2, norm = written_out(model, batches[0])
    assert rows[0]["noise/c2_sampled"] == pytest.approx(c2, rel=1e-5)
    assert rows[0]["noise/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_training_that_is_taken_up_again_measures_as_it_would_have(tmp_path):
    """And goes on in the bits in which the Trainer takes it up by itself."""
    flags = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True}
    whole = trainer_of(vit(), digits(), tmp_path, **flags)
    _, rows = trained(whole, every=3)
    assert [row["step"] for row in rows] == [0, 3]
    flags["save_strategy"] = "no"
    checkpoint = str(tmp_path / "checkpoint-2")
    alone, _ = trained(trainer_of(vit(), digits(), tmp_path, **flags), resume=checkpoint)
    again = trainer_of(vit(), digits(), tmp_path, **flags)
    state, more = trained(again, every=3, resume=checkpoint)
    assert_same_bits(state, alone)
    # the first is of the checkpoint, and the largest norm so far came with it
    assert [row["step"] for row in more] == [0, 3] and more[0] == rows[0]
    norms = [row["noise/grad_norm"] for row in more]
    assert more[1]["noise/grad_norm_max"] == max(norms)
    counted = again.state.stateful_callbacks["fastsmooth.noise"]
    assert (counted["update"], counted["epoch"], counted["count"]) == (6, 2, 2)


def softened(outputs, labels, num_items_in_batch=None):
    wanted = F.one_hot(labels, 10).float() * 0.9 + 0.01
    return F.cross_entropy(outputs.logits, wanted, reduction="sum") / num_items_in_batch


def normalised(y):
    return y.float() / 9


def multi(y):
    return torch.stack([(y > 4), (y % 2 == 0)], 1).float()


KINDS = {
    "regression": ({"num_labels": 1}, normalised, lambda o, t: F.mse_loss(o[:, 0], t), {}),
    "several labels": ({"num_labels": 2}, multi, F.binary_cross_entropy_with_logits, {}),
    "a function": (
        {},
        lambda y: y,
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        {"compute_loss_func": softened},
    ),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "a function" else pytest.mark.full) for k in KINDS]
)
def test_the_loss_is_the_trainers(kind, tmp_path):
    config, labels, loss, flags = KINDS[kind]
    trainer = trainer_of(vit(**config), digits(16, labels), tmp_path, **flags)
    parts = seen_by(trainer)
    _, (row,) = trained(trainer, every=2)
    net = Logits(vit(**config))
    found = fs.sample_norms(net, parts[0]["pixel_values"], parts[0]["labels"], loss=EachOf(loss))
    c2 = fs.estimators.per_sample(found.noise, n=16).value
    assert row["noise/c2_sampled"] == pytest.approx(c2, rel=1e-6)


class EachOf(nn.Module):
    """The values of samples of a mean, by hand."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, output, target):
        return torch.stack(
            [self.loss(output[i : i + 1], target[i : i + 1]) for i in range(len(output))]
        )


def refusal(trainer, *, every=1, **options):
    with pytest.raises(ValueError) as refused:
        trained(trainer, every=every, **options)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    facts = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(**facts, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    )


def continued(rows):
    batch = padded(rows)
    ignored = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "labels": ignored}


def test_what_cannot_be_measured_is_refused_in_words(tmp_path):
    from torch.utils.data import IterableDataset

    text = sentences()
    words = refusal(trainer_of(language_model(), text, tmp_path, continued))
    assert "is not the mean over the samples" in words
    assert "every 'often'" in refusal(trainer_of(vit(), digits(), tmp_path), every="often")
    words = refusal(trainer_of(vit(), digits(), tmp_path), estimator="none")
    assert words.startswith("estimator 'none'")
    # gradients of means that are added, not averaged
    flags = {"gradient_accumulation_steps": 2}
    words = refusal(trainer_of(bert(), text, tmp_path, padded, **flags))
    assert "use gradient_accumulation_steps=1" in words

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([digits()[i] for i in range(8)])

    words = refusal(trainer_of(vit(), Stream(), tmp_path, max_steps=1))
    assert words.startswith("samples: a Stream has no length: give NoiseCallback")
    stream = trainer_of(vit(), Stream(), tmp_path, max_steps=1)
    assert len(trained(stream, every=1, samples=100)[1]) == 1


class Own(nn.Module):
    """A network of one's own in the form that a Trainer takes."""

    def __init__(self, name="logits"):
        super().__init__()
        self.layer, self.name = nn.Linear(64, 10), name

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values.flatten(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, self.name: logits}


def test_a_network_of_ones_own(tmp_path):
    words = refusal(trainer_of(Own(), digits(), tmp_path))
    assert words.startswith("loss: of a Own it is not known what it makes of logits and labels")
    _, rows = trained(trainer_of(Own(), digits(), tmp_path), every=2, loss=F.cross_entropy)
    assert len(rows) == 2
    words = refusal(trainer_of(Own("scores"), digits(), tmp_path), loss=F.cross_entropy)
    assert "a dict without logits" in words
    # a loss that is not what is trained on
    half = functools.partial(F.cross_entropy, label_smoothing=0.5)
    words = refusal(trainer_of(Own(), digits(), tmp_path), loss=half)
    assert "the Trainer trains on a loss of" in words and "give NoiseCallback the loss" in words


def test_the_trainers_step_is_its_own_but_while_it_trains(tmp_path):
    from fastsmooth.adapters.transformers import NoiseCallback

    trainer = trainer_of(vit(), digits(16), tmp_path)
    callback = NoiseCallback(trainer, every=1)
    assert "training_step" not in vars(trainer)
    trained(trainer)  # without the callback, which was not added
    trainer.add_callback(callback)
    plain, trainer.data_collator = trainer.data_collator, None
    with pytest.raises(TypeError):  # an exception of the host's
        trainer.train()
    trainer.data_collator = plain
    callback.parts.append("left by it")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "noise/c2_sampled" in row]
    assert len(rows) == 2 and "training_step" not in vars(trainer)
    trainer.data_collator = None
    with pytest.raises(TypeError):
        trainer.train()
    trainer.data_collator = plain
    trainer.remove_callback(callback)
    trainer.train()
    assert callback.watch.noise.count == 0 and not callback.watch.kept
    trainer.add_callback(callback)
    assert "two NoiseCallbacks" in refusal(trainer)


def test_micro_batches_that_count_the_same_at_several_sizes_are_left_to_the_next(tmp_path):
    """A network of one's own takes no num_items_in_batch: the means of 8 and 4 samples are averaged
    in the last update of an epoch."""
    flags = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = trainer_of(Own(), digits(28), tmp_path, **flags)
    _, rows = trained(trainer, every=1, loss=F.cross_entropy)
    assert [row["step"] for row in rows] == [0, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_tensors_come_back_from_their_bytes(count):
    from fastsmooth.adapters.transformers import OneInput

    class Echo(nn.Module):
        def forward(self, **inputs):
            self.seen = inputs
            return {"logits": inputs["b"]}

    inputs = {
        "a": torch.tensor([True, False, True])[:count],
        "b": torch.randn(count, 2, 5, dtype=torch.float64).mT,
        "c": torch.arange(2 * count).view(count, 2),
        "d": torch.randn(count, 3).bfloat16(),
        "labels": torch.arange(count),
        "flag": None,
    }
    model = OneInput(Echo(), scaled=False)
    x, y = model.taken(inputs, ["labels", "start_positions"])
    assert x.shape == (count, 1 + 80 + 16 + 6) and torch.equal(y, inputs["labels"])
    model(x)
    back = model.model.seen
    assert back.pop("flag") is None and list(back) == ["a", "b", "c", "d"]
    assert all(torch.equal(inputs[name], value) for name, value in back.items())
    assert all(inputs[name].dtype == value.dtype for name, value in back.items())


def test_under_float16_gradients_are_those_of_float32():
    """As accelerate sets the forward() of a model that it prepares; its own way needs a GPU."""
    from fastsmooth.adapters.transformers import OneInput

    class Tiny(Own):
        """Whose gradients float16 has no numbers for."""

        def forward(self, **inputs):
            return {"logits": super().forward(**inputs)["logits"] * 2.0**-20}

    model = Tiny()
    inputs = {"pixel_values": torch.randn(8, 64), "labels": torch.arange(8)}

    def noise(scaled):
        net = OneInput(model, scaled)
        x, y = net.taken(inputs, ["labels"])
        return fs.sample_norms(net, x, y).squares

    expected = noise(False)
    model._original_forward = model.forward
    model.forward = torch.autocast("cpu", torch.float16)(model.forward)
    assert torch.equal(noise(True), expected)
    assert not torch.allclose(noise(False), expected, rtol=1e-3, atol=0)


SHARED = """
import sys
import torch
from test_transformers import digits, seen_by, trained, trainer_of, vit
out, every = sys.argv[1], int(sys.argv[2]) or None
trainer = trainer_of(vit(), digits(32), out, ddp_backend="gloo")
parts = seen_by(trainer)
state, rows = trained(trainer, every=every)
rank = torch.distributed.get_rank()
torch.save({"state": state, "rows": rows, "part": parts[0]}, f"{out}.{rank}.{sys.argv[2]}")
"""


@pytest.mark.full
def test_two_processes_measure_the_whole_batch(tmp_path):
    """Each has half of every batch: all log the row of both, and training keeps its bits."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for every in "02":
        start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        command = [
            sys.executable,
            *start,
            str(free_port()),
            str(script),
            str(tmp_path / "o"),
            every,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, _, found, other = (
        torch.load(tmp_path / f"o.{rank}.{every}", weights_only=False)
        for every in "02"
        for rank in "01"
    )
    assert_same_bits(found["state"], alone["state"])
    assert found["rows"] == other["rows"] and len(found["rows"]) == 1
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    noise = fs.NoiseTracker(Logits(model.train()), optimizer, samples=32, every=1)
    parts = [found["part"], other["part"]]
    row = noise([p["pixel_values"] for p in parts], [p["labels"] for p in parts])
    for name in ("c2_sampled", "grad_norm", "delta_measured"):
        assert found["rows"][0][f"noise/{name}"] == pytest.approx(row[name], rel=1e-6)
