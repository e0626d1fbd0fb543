"""The model card of a run: what its files say of how the model was made, and no number that they do
not have."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsmooth.cli.config import Config
from fastsmooth.cli.facts import is_among, row_of
from fastsmooth.cli.flags import flag
from fastsmooth.cli.parse import flags_of
from fastsmooth.export import loading
from fastsmooth.report import groups
from fastsmooth.report.groups import clean, real
from fastsmooth.report.noise import points
from fastsmooth.runfolder.weights import ModelFacts
from fastsmooth.schedule import Smoothing
from fastsmooth.trained import TrainedRun

# what the Hub calls data sets that --dataset names beyond doubt; imagenet may be a part of it
ON_THE_HUB = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "torchvision/MNIST": "ylecun/mnist",
    "torchvision/FashionMNIST": "zalandoresearch/fashion_mnist",
}
MOST_CLASSES = 20  # that are named
CODE = ("model", "optimizer", "loss")  # flags that may name a Python file
FILES = ("labels", "init", "extend")  # flags that name a file or a folder
# what a command line has of a machine, an account or an interruption
LEFT_OUT = ("workers", "device", "resume", "max_time", "tracker", "wandb_mode",
            "wandb_project", "wandb_entity")  # fmt: skip
NOT_MEASURED = "not measured"
Row = tuple[str, ...]


def text(
    run: TrainedRun,
    facts: ModelFacts,
    config: Config,
    environment: dict[str, Any],
    order: str | None,
    repository: str | None,
) -> str:
    """README.md. `facts` are as the folder has them; `environment` is env.json; `order`: the hash
    of the order of the samples; `repository`: where the folder will be on the Hub."""
    parts = [
        front_matter(run, facts, config),
        introduction(run, facts, config),
        use(facts, repository),
        results(run, config, environment),
        training(run, facts, config, environment, order),
        measured(run, config),
    ]
    return "\n".join(part for part in parts if part)


# The head, which the Hub reads


def front_matter(run: TrainedRun, facts: ModelFacts, config: Config) -> str:
    library = loading.library(facts)
    known = ON_THE_HUB.get(config.dataset)
    tags = dict.fromkeys(["image-classification", library, "fastsmooth"])
    head: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": list(tags),
    }
    head |= {"datasets": [known]} if known else {}
    head |= {"metrics": ["accuracy"]}
    accuracy = accuracy_of(run)
    if accuracy is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data_name(config), "type": known or config.dataset},
            "metrics": [{"type": "accuracy", "value": accuracy, "name": "test accuracy"}],
        }
        name = f"{facts.network} on {data_name(config)}"
        head["model-index"] = [{"name": clean(name), "results": [result]}]
    # JSON is YAML
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    licence = "# license: name here the one under which you publish these weights"
    return "\n".join(["---", licence, *lines, "---", ""])


def introduction(run: TrainedRun, facts: ModelFacts, config: Config) -> str:
    names = ", ".join(md(name) for name in facts.class_names[:MOST_CLASSES])
    more = len(facts.class_names) - MOST_CLASSES
    names += f" and {more:,} more, which model.json lists" if more > 0 else ""
    norm = " with GroupNorm in place of BatchNorm" if facts.norm == "group" else ""
    lines = [
        f"# {md(facts.network)} on {md(data_name(config))}",
        "",
        f"{md(facts.network)}{norm} ({facts.parameters:,} parameters), trained by fastsmooth to "
        f"tell {len(facts.classes):,} classes of images apart: {names}.",
    ]
    if loading.own_code(facts):
        lines += [
            "",
            f"The network is made by code that is not in this folder, {md(facts.network)}: without "
            "it the weights cannot be used.",
        ]
    if run.state != "done":
        lines += ["", f"The run had not ended when this was written: it was {md(run.state)}."]
    return "\n".join([*lines, ""])


def use(facts: ModelFacts, repository: str | None) -> str:
    numbers = [", ".join(f"{v:.6g}" for v in values) for values in (facts.mean, facts.std)]
    channels = "RGB" if facts.mode == "RGB" else "grey (L)"
    repeated = f", repeated as {facts.channels} channels" * (
        facts.mode == "L" and facts.channels > 1
    )
    mine = 'run = fs.load_run(".", "model"'
    mine += ", trust_code=True)" if loading.own_code(facts) else ")"
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            *loading.of_folder(facts, ".", repository),
            "```",
            "",
            f"Images are {channels}{repeated}, the shorter side brought to {facts.resize} pixels "
            f"(bilinear, antialiased), the {facts.image_size} x {facts.image_size} of the centre "
            f"kept, values from 0 to 1 less {numbers[0]} over {numbers[1]}.",
            "",
            "fastsmooth does that by itself, in a copy of this folder:",
            "",
            "```python",
            "import fastsmooth as fs",
            mine,
            'print(run.predict("image.png")[0])',
            "```",
            "",
        ]
    )


# What came of it


def results(run: TrainedRun, config: Config, environment: dict[str, Any]) -> str:
    about, rows = run.about_weights, []
    accuracy, loss = accuracy_of(run), real(about.get("test_loss"))
    images = whole(environment.get("test_images"))
    over = f", over {images} test images" if images else ", over the test images"
    if (config.compat, config.dataset) == ("original", "imagenet"):
        over += " as they are augmented in training (--compat original)"
    if accuracy is not None:
        rows.append((f"test accuracy of these weights{over}", f"{accuracy:.2%}"))
    if loss is not None:
        function = "mean cross-entropy"
        if "loss" in config.own_code:
            function = f"mean {without_folder(config.loss)}"
        rows.append((f"test loss of these weights: {function}", figure(loss)))
    final = groups.last(run, "test_acc")
    if final is not None:
        rows.append(("test accuracy after the last epoch of the run", f"{final:.2%}"))
    if not rows:
        return ""
    lines = ["## Results", "", *table(("what", "value"), rows), ""]
    if chosen(run):
        lines += [
            f"These weights ({run.weights}) were chosen on the test images: theirs is the best "
            "accuracy of all epochs on those images, so expect less on others.",
            "",
        ]
    return "\n".join(lines)


def accuracy_of(run: TrainedRun) -> float | None:
    """On the test images, of the weights that are exported; a share."""
    return real(run.about_weights.get("test_acc"))


def chosen(run: TrainedRun) -> str:
    """What to say of weights that were chosen by their accuracy; "" of others."""
    return ", chosen on the test images" if (run.weights or "").startswith("best") else ""


# How it was made


def training(
    run: TrainedRun,
    facts: ModelFacts,
    config: Config,
    environment: dict[str, Any],
    order: str | None,
) -> str:
    env, about = environment, run.about_weights
    counts = [whole(env.get(f"{name}_images")) for name in ("training", "test")]
    sizes = f", {counts[0]} training and {counts[1]} test images" if all(counts) else ""
    rows: list[tuple[str, str | None]] = [
        ("data", data_name(config) + sizes),
        (
            "fingerprint of the data: SHA-256 of its labels, and of its pixels or file names",
            word(env.get("fingerprint")),
        ),
        ("augmentation", config.changes or "none"),
        ("mixing", mixing(config)),
        ("began from", began_from(config)),
        ("method", config.schedule or config.method),
        ("learning rate", first_and_last(run, "lr")),
        ("batch size", first_and_last(run, "batch_size")),
        ("momentum", first_and_last(run, "momentum")),
        ("optimizer", without_folder(config.optimizer)),
        ("weight decay", f"{config.weight_decay:g}"),
        ("loss", without_folder(config.loss_in_words)),
        ("delta of the schedule, computed", first_and_last(run, "delta", config.delta_unit)),
        ("epochs of the run", whole(len(groups.epochs(run)))),
        ("these weights", f"{run.weights}, of {standing(about)}"),
        ("seed", str(config.seed)),
        (
            f"order of the samples: SHA-256 of the {counts[0]} indices of epoch 0 as they come, "
            "64-bit little-endian integers, a function of the seed and their number",
            order,
        ),
        ("precision", word(env.get("precision"))),
        ("computed on", machine(env)),
        ("versions", versions(env)),
    ]  # fmt: skip
    known = [(name, value) for name, value in rows if value]
    command = " ".join(["python -m fastsmooth.train", *words_of(config)])
    return "\n".join(
        [
            "## Training",
            "",
            *table(("what", "value"), known),
            "",
            "Every flag that was not left at its default:",
            "",
            "```sh",
            command,
            "```",
            "",
        ]
    )


def first_and_last(run: TrainedRun, name: str, unit: str = "") -> str | None:
    """A number of the schedule in the first and the last epoch that the run did."""
    values = [groups.first(run, name), groups.last(run, name)]
    said = [f"{figure(v)}{unit}" for v in values if v is not None]
    if len(said) < 2 or said[0] == said[1]:
        return said[0] if said else None
    return f"{said[0]} in the first epoch, {said[1]} in the last"


def began_from(config: Config) -> str | None:
    if config.init is not None:
        pretrained = config.init == "pretrained"
        return "the pretrained weights of its library" if pretrained else Path(config.init).name
    return f"the run {Path(config.extend).name}" if config.extend else "random weights"


def standing(about: dict[str, Any]) -> str:
    epoch, update = (about.get(name) for name in ("epoch", "update"))
    words = [f"epoch {epoch + 1}"] if isinstance(epoch, int) else []
    words += [f"update {update:,}"] if isinstance(update, int) else []
    return ", ".join(words) or "an update that the file does not name"


def machine(env: dict[str, Any]) -> str | None:
    """The GPU or the processor, and how many processes."""
    name = word(env.get("gpu")) or word(env.get("processor"))
    count = env.get("processes")
    several = f", {count} processes" if isinstance(count, int) and count > 1 else ""
    return name and name + several


def versions(env: dict[str, Any]) -> str | None:
    names = {"torch": "PyTorch", "torchvision": "torchvision", "numpy": "NumPy"}
    names = {"fastsmooth": "fastsmooth"} | names | {"python": "Python"}
    said = [f"{name} {env[key]}" for key, name in names.items() if word(env.get(key))]
    commit = word(env.get("commit"))
    return ", ".join(said + [f"commit {commit}"] * bool(commit)) or None


def words_of(config: Config) -> list[str]:
    """The flags that make the run, with folders left out that say where things lay on a machine."""
    words: list[str] = []
    for name, value in flags_of(dataclasses.replace(config, data_dir="DIR")).items():
        if name in LEFT_OUT:
            continue
        if name in CODE + FILES:
            value = without_folder(value)
        words.append(flag(name))
        if not isinstance(value, bool):
            words += [shell(str(v)) for v in (value if isinstance(value, tuple) else (value,))]
    return words


def shell(word: str) -> str:
    """The word as a shell reads it, in a page that is read too."""
    word = clean(word).replace("`", "'")
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII) else shlex.quote(word)


def mixing(config: Config) -> str | None:
    """How training images were mixed."""
    kinds = [(name, getattr(config, name)) for name in ("mixup", "cutmix")]
    return " and ".join(f"{name} {value:g}" for name, value in kinds if value) or None


def without_folder(value: str) -> str:
    """The name of a file, or of a function in one, without the folder on the machine."""
    return Path(value).name if value and (".py:" in value or Path(value).is_absolute()) else value


def data_name(config: Config) -> str:
    """The data set, a folder of images by its own name."""
    if is_among(config.dataset, ("digits", "cifar10", "cifar100")) or "/" in config.dataset:
        return config.dataset
    folder = clean(Path(config.data_dir).name)
    return f"{folder} ({row_of(config.dataset)})" if folder else config.dataset


# What was measured


def measured(run: TrainedRun, config: Config) -> str:
    """C2, noise scale, delta, crossings and sharpness, where the run's files have them."""
    rows = [*of_tracking(run, config), *of_sampling(run), *of_crossings(run), *of_sharpness(run)]
    if not rows:
        return ""
    lines = ["## Measured", ""]
    lines += table(("what", "value", "standard error", "over", "at update"), rows)
    functions = dict.fromkeys(word(point.get("function")) for point in points(run))
    lines += ["", *(f"The full gradient is that of: {md(f)}." for f in functions if f)]
    if (run.weights or "").endswith("-ema"):
        lines += ["", "All of it was measured at the raw weights, not at their average."]
    return "\n".join([*lines, ""])


def of_tracking(run: TrainedRun, config: Config) -> Iterable[Row]:
    """Of --track-noise the last measurement before these weights."""
    until = run.about_weights.get("update")
    rows = [row for row in run.of_kind("measure") if "estimator" in row]
    if isinstance(until, int):
        rows = [row for row in rows if (real(row.get("step")) or 0) <= until]
    if not rows:
        return
    row = rows[-1]
    at, over = update_of(row), word(row.get("se_over")) or "what its row does not say"
    how = f"{word(row.get('estimator'))} estimator, --bn {word(row.get('bn'))}"
    c2, error = real(row.get("c2_sampled")), real(row.get("c2_sampled_se"))
    if c2 is not None:
        yield f"C2, variance of a sample's gradient ({how})", figure(c2), said(error), over, at
    scale = real(row.get("noise_scale"))
    if scale is not None:
        measurements = f"decaying averages over the last of {len(rows)} measurements"
        yield "noise scale C2 / ‖∇f‖², in samples", figure(scale), NOT_MEASURED, measurements, at
    delta = real(row.get("delta_measured"))
    if delta is not None:
        spread = error_of_delta(row, config)
        of_c2 = "the error of C2 alone" if spread is not None else NOT_MEASURED
        yield "delta, with this C2 and K2", figure(delta), said(spread), of_c2, at


def error_of_delta(row: dict[str, Any], config: Config) -> float | None:
    """How far delta moves with C2 by its standard error, half the way from below to above; None
    where delta is not that of the row's own numbers."""
    names = ("c2_sampled", "c2_sampled_se", "k2", "lr", "batch_size", "momentum", "delta_measured")
    values = [real(row.get(name)) for name in names]
    if any(v is None for v in values):
        return None
    c2, error, k2, lr, batch, momentum, delta = (v or 0.0 for v in values)
    nu = real(row.get("nu"))
    nu = config.nu_stages[0].value if nu is None else nu

    def degree(c2: float) -> float:
        form, version = config.optimizer, config.bound_version
        found = Smoothing(form, max(c2, 0.0), k2, nu, version).degree(lr, batch, momentum)
        return math.nan if found is None else found

    try:
        if abs(degree(c2) - delta) > 1e-6 * delta:
            return None
        return (degree(c2 + error) - degree(c2 - error)) / 2
    except (ValueError, ArithmeticError):
        return None


def of_sampling(run: TrainedRun) -> Iterable[Row]:
    """Of --mode sampling, every point."""
    names = {
        "c2_sampled": "C2, from drawn directions",
        "noise_norm": "norm of the noise of the search direction ‖m − ∇f‖",
        "full_grad_norm": "norm of the full gradient ‖∇f‖",
    }
    for point in points(run):
        over = word(point.get("se_over")) or "what noise.json does not say"
        for key, what in names.items():
            value = real(point.get(key))
            if value is not None:
                batch = f"{what}, batch {whole(real(point.get('batch_size')))}"
                yield (
                    batch,
                    figure(value),
                    said(real(point.get(f"{key}_se"))),
                    over,
                    update_of(point),
                )


def of_crossings(run: TrainedRun) -> Iterable[Row]:
    """Of --mode critical, each threshold that was crossed."""
    criterion = word(run.critical.get("criterion")) or "criterion"
    crossings = run.critical.get("crossings")
    for eps, entry in crossings.items() if isinstance(crossings, dict) else ():
        samples = whole(real(entry.get("samples"))) if isinstance(entry, dict) else None
        if samples is None or entry.get("censored"):
            continue
        what = f"first time that {criterion} of the gradient is at most {clean(eps)}"
        yield what, f"{samples} samples", "exact", "this run", update_of(entry)


def of_sharpness(run: TrainedRun) -> Iterable[Row]:
    """Every entry of sharpness.json."""
    entries = run.sharpness.get("results")
    for entry in entries if isinstance(entries, list) else ():
        value = real(entry.get("value")) if isinstance(entry, dict) else None
        if value is None:
            continue
        adaptive = "adaptive " if entry.get("adaptive") is True else ""
        what = f"sharpness, {adaptive}{word(entry.get('algorithm'))}, rho {entry.get('rho')}"
        for name in ("augment", "normalize_logits", "random_start"):
            what += f", --{name.replace('_', '-')}" if entry.get(name) is True else ""
        images, batch = (whole(real(entry.get(name))) for name in ("samples", "batch"))
        over = f"batches of {batch} of {images} images ({word(entry.get('split'))})"
        yield what, figure(value), said(real(entry.get("error"))), over, update_of(entry)


# Words and numbers of files that anybody may have written


def update_of(row: dict[str, Any]) -> str:
    return whole(real(row.get("step"))) or "unknown"


def figure(value: float) -> str:
    return f"{value:.4g}"


def said(error: float | None) -> str:
    return NOT_MEASURED if error is None else f"{float(f'{error:.2g}'):g}"


def whole(value: Any) -> str | None:
    """A count, with its thousands apart."""
    number = real(value)
    return None if number is None else f"{number:,.0f}"


def word(value: Any) -> str | None:
    """A word or a line of text."""
    return clean(value) or None if isinstance(value, str) else None


def md(value: str) -> str:
    """Text that is no Markdown and no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", clean(value))


def table(names: Row, rows: Iterable[tuple[Any, ...]]) -> list[str]:
    lines = [names, ("---",) * len(names), *(map(md, map(str, row)) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
