"""What the flags of the command ask for, and what is refused of them before torch is imported."""

from __future__ import annotations

import importlib.util
import re
from argparse import SUPPRESS
from dataclasses import dataclass
from pathlib import Path

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import command

# form: how the name of its file ends; that of a folder has no ending of its own
ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "hub": ""}
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    run: Path
    to: str
    out: Path | None  # None: in the run folder, by the name of the weights
    weights: str | None
    push: str | None  # a repository of the Hub
    trust_code: bool
    overwrite: bool


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("export"),
        usage="%(prog)s RUN --to FORM [flags]",
        description="Write the trained model of a run in a form that other programs open.",
        add_help=False,
    )
    add = p.add_argument
    # fmt: off
    add("run", nargs="?", metavar="RUN", type=flag_types.text, help="a run folder that fastsmooth.train wrote")
    add("--to", choices=ENDINGS, metavar="FORM", help="safetensors: for torchvision, timm, PyTorch; onnx; torch-export: a .pt2; hub: a folder for the Hugging Face Hub, with a model card")
    add("--out", type=flag_types.text, metavar="PATH", help="the file, or of hub the folder (RUN/export/NAME, by the name of the weights)")
    flag_types.add_model_flags(add, devices=False)
    add("--overwrite", action="store_true", help="replace what an export wrote there before")
    add("--push", type=flag_types.text, metavar="OWNER/NAME", help="hub: upload the folder to this repository, made where there is none")
    add("-h", "--help", action="store_true", default=SUPPRESS, help="this page")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    given = vars(parser().parse_args([flag_types.plain(word) for word in argv]))
    if given.pop("help", False):
        return None
    if given["run"] is None:
        raise ConfigError(
            f"no run is named: {command('export')} RUN, a folder that fastsmooth.train wrote"
        )
    if given["to"] is None:
        raise ConfigError(f"--to is missing: give one of {', '.join(ENDINGS)}")
    run, out = Path(given.pop("run")), given.pop("out")
    request = Request(run=run, out=None if out is None else Path(out), **given)
    check(request)
    return request


def check(request: Request) -> None:
    """Refuse what can be seen to be wrong before the run is opened."""
    form, out, push = request.to, request.out, request.push
    if out is not None and out.name in ("", ".."):
        raise ConfigError(f"--out {out}: name the file or folder that is to be written")
    if push is not None and form != "hub":
        raise ConfigError(f"--push uploads the folder of --to hub, not of --to {form}")
    if push is not None and not re.fullmatch(REPOSITORY, push, re.ASCII):
        raise ConfigError(f"--push {push}: a repository of the Hub is named OWNER/NAME")
    if out is not None and out.suffix != ENDINGS[form] and form != "hub":
        raise ConfigError(
            f"--out {out}: programs know the form by its ending: let it end in {ENDINGS[form]}"
        )
    needed = ["onnx", "onnxscript"] if form == "onnx" else []
    needed += ["huggingface_hub"] if push is not None else []
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        extra = "hub" if push is not None else form
        raise ConfigError(
            f"--to {form} needs {' and '.join(lacking)}: pip install 'fastsmooth[{extra}]'"
        )
