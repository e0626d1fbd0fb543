"""How an exported network is loaded by the library that it comes from, as lines of Python."""

from __future__ import annotations

import json
from typing import Any

from fastsmooth.runfolder.read import EXPORTED
from fastsmooth.runfolder.weights import ModelFacts

# what builds a network: the line that imports it, and its name
BUILDERS = {
    "timm": ("import timm", "timm.create_model"),
    "torchvision": ("from torchvision.models import get_model", "get_model"),
    "fastsmooth": ("import fastsmooth as fs", "fs.build_model"),
}


def library(facts: ModelFacts) -> str:
    """Which one builds the network as it was trained: timm, torchvision, or fastsmooth, of the
    others' networks with GroupNorm too."""
    origin = facts.network.partition("/")[0]
    return origin if origin in ("timm", "torchvision") and facts.norm == "batch" else "fastsmooth"


def own_code(facts: ModelFacts) -> str:
    """The Python file that the network came from; "" where a library has it."""
    file, _, _ = facts.network.rpartition(":")
    return file if file.endswith(".py") else ""


def of_export(facts: ModelFacts, form: str, path: str) -> list[str]:
    """What was exported in this form to this path."""
    if form == "onnx":
        return [f"import onnxruntime; session = onnxruntime.InferenceSession({quoted(path)})"]
    if form == "torch-export":
        return [f"import torch; model = torch.export.load({quoted(path)}).module()"]
    return of_folder(facts, path) if form == "hub" else of_weights(facts, quoted(path))


def of_folder(facts: ModelFacts, folder: str, repository: str | None = None) -> list[str]:
    """A folder for the Hub, or the repository that it was pushed to."""
    if library(facts) == "timm":
        source = f"hf-hub:{repository}" if repository else f"local-dir:{folder}"
        made = f"timm.create_model({quoted(source)}, pretrained=True)"
        return ["import timm", f"model = {made}.eval()"]
    if own_code(facts):
        made = f'fs.load_run({quoted(folder)}, "model", trust_code=True).model'
        return ["import fastsmooth as fs", f"model = {made}"]
    if repository:
        return [
            "from huggingface_hub import hf_hub_download",
            *of_weights(facts, f"hf_hub_download({quoted(repository)}, {quoted(EXPORTED)})"),
        ]
    return of_weights(facts, quoted(EXPORTED if folder == "." else f"{folder}/{EXPORTED}"))


def of_weights(facts: ModelFacts, path: str) -> list[str]:
    """A safetensors file; `path`: an expression of Python for its path."""
    load = f"model.load_state_dict(load_file({path}))"
    reader = "from safetensors.torch import load_file"
    if own_code(facts):
        made_by = f"{facts.network.rpartition(':')[2]} of {own_code(facts)}"
        return [reader, f"{load}  # model: what {made_by} makes"]
    imported, build = BUILDERS[library(facts)]
    name = facts.network.removeprefix(f"{library(facts)}/")
    said = [quoted(name), *(f"{key}={quoted(v)}" for key, v in arguments(facts).items())]
    return [reader, imported, f"model = {build}({', '.join(said)}).eval()", load]


def arguments(facts: ModelFacts) -> dict[str, Any]:
    """What the network's builder is told beside its name."""
    count, channels = len(facts.classes), facts.channels
    if library(facts) == "timm":
        return {"num_classes": count} | ({} if channels == 3 else {"in_chans": channels})
    if library(facts) == "torchvision":
        from fastsmooth.models import QUIRKS  # with torch

        name = facts.network.removeprefix("torchvision/")
        return {"num_classes": count} | QUIRKS.get(name, {})
    norm = {} if facts.norm == "batch" else {"norm": facts.norm}
    return {"classes": count} | norm | ({} if channels == 3 else {"channels": channels})


def quoted(value: Any) -> str:
    """The value as Python reads it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
