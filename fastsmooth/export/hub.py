"""The folder that the Hugging Face Hub holds of a model: weights, what they are, a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fastsmooth import __version__
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import read_saved
from fastsmooth.data.order import permutation
from fastsmooth.export import card, loading
from fastsmooth.export.graphs import words_of
from fastsmooth.messages import one_line
from fastsmooth.runfolder.files import finite, read_object
from fastsmooth.runfolder.read import EXPORTED
from fastsmooth.runfolder.weights import MODEL, OURS, ModelFacts, packed
from fastsmooth.trained import TrainedRun

FILES = {EXPORTED, "config.json", MODEL, "README.md"}  # of every such folder
# what a config.json says of a machine, an account or a person's folders
PRIVATE = (
    "out", "data_dir", "labels", "init", "extend", "resume", "max_time", "device", "workers",
    "tracker", "wandb_mode", "wandb_project", "wandb_entity",
)  # fmt: skip
MOST_IMAGES = 10**8  # whose order is computed: it takes seconds


def to_safetensors(model: nn.Module, run: TrainedRun) -> bytes:
    """The weights by the names that the network gives them. In the metadata is what model.json
    says, and what was said about the weights."""
    words = words_of(run.facts) | {"format": "pt", OURS: json.dumps(run.about_weights)}
    return packed(model.state_dict(), words)


def of_weights(run: TrainedRun) -> str:
    """Which weights these are, in words."""
    about = run.about_weights
    words = [f"weights {run.weights}"]
    if isinstance(about.get("epoch"), int):
        words.append(f"epoch {about['epoch'] + 1}")
    accuracy = card.accuracy_of(run)
    if accuracy is not None:
        words.append(f"test accuracy {accuracy:.2%}{card.chosen(run)}")
    return ", ".join(words)


def files_of(model: nn.Module, run: TrainedRun, repository: str | None) -> dict[str, bytes]:
    """The content of each of FILES. Raises ConfigError where the run's config.json is damaged."""
    config = read_saved(run.path)
    facts, code = run.facts, loading.own_code(run.facts)
    if code:  # whoever has the folder puts the file beside it
        here = facts.network.removeprefix(code)
        facts = dataclasses.replace(facts, network=Path(code).name + here)
    if loading.library(facts) == "timm":
        about = timm_config(model, facts)
    else:
        about = {"fastsmooth": __version__} | public(config)
    environment = read_object(run.path / "env.json") or {}
    images = environment.get("training_images")
    # of a run that goes on from another one the first epoch has another number
    order = None if config.extend else order_hash(config.seed, images)
    text = card.text(run, facts, config, environment, order, repository)
    contents = {"config.json": about, MODEL: facts.to_json()}
    files = {EXPORTED: to_safetensors(model, run)}
    for name, values in contents.items():
        files[name] = json.dumps(finite(values)[0], indent=1, ensure_ascii=False).encode() + b"\n"
    return files | {"README.md": text.encode()}


def public(config: Config) -> dict[str, Any]:
    """The run's flags, less what is of one machine alone, and of files by their names."""
    values = {name: v for name, v in config.to_json().items() if name not in PRIVATE}
    return values | {name: card.without_folder(values[name]) for name in card.CODE}


def order_hash(seed: int, images: Any) -> str | None:
    """The SHA-256 of the order of epoch 0: the indices of the training images as they come, each a
    little-endian 64-bit integer. None where it is not known how many there were."""
    if type(images) is not int or not 0 < images <= MOST_IMAGES:
        return None
    order = permutation(seed, 0, images).numpy()
    return hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()


def timm_config(model: nn.Module, facts: ModelFacts) -> dict[str, Any]:
    """config.json as timm writes it, with the images as this model was trained on them."""
    from timm.models._hub import save_config_for_hf

    labels: dict[str, Any] = {"label_names": list(facts.classes)}
    if facts.class_names != facts.classes:
        names = zip(facts.classes, facts.class_names, strict=True)
        labels["label_descriptions"] = dict(names)
    channels = {} if facts.channels == 3 else {"in_chans": facts.channels}
    # else timm warns that those of its own weights are of three channels
    model.pretrained_cfg |= {"mean": facts.mean, "std": facts.std}  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_config=dict(labels), model_args=channels)
        written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # of the architecture; all else that timm's default says is of weights that are not these
    kept = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    seen = {name: v for name, v in written["pretrained_cfg"].items() if name in kept}
    side = facts.image_size
    seen |= {
        "input_size": [facts.channels, side, side],
        "interpolation": "bilinear",
        "crop_mode": "center",
        "crop_pct": crop_share(side, facts.resize),
        "mean": list(facts.mean),
        "std": list(facts.std),
        "num_classes": len(facts.classes),
    }
    return written | labels | {"pretrained_cfg": seen}


def crop_share(size: int, resize: int) -> float:
    """The crop_pct with which timm brings the shorter side to `resize` pixels: it takes the floor
    of size / crop_pct."""
    share = size / resize
    while math.floor(size / share) < resize:
        share = math.nextafter(share, 0)
    return share


def push(folder: Path, repository: str) -> str:
    """Upload the folder; a line that says where it is now. Raises ConfigError."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi(library_name="fastsmooth", library_version=__version__)
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=f"Model trained by fastsmooth {__version__}",
        )
    except Exception as error:  # of the network, the Hub and its client: of many kinds
        raise ConfigError(
            f"--push {repository}: {one_line(error)[:300]}: the folder {folder} is written; log in "
            "with `hf auth login`, and push again with --overwrite"
        ) from None
    return f"pushed to https://huggingface.co/{repository}"
