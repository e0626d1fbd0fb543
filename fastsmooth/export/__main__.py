"""A trained model for other programs: python -m fastsmooth.export RUN --to FORM [flags]

Forms: safetensors (torchvision, timm and PyTorch load it), onnx, torch-export (a .pt2 of
torch.export) and hub (a folder as the Hugging Face Hub holds it, with a model card).
"""

from __future__ import annotations

import sys

from fastsmooth.cli.flags import ConfigError
from fastsmooth.export.request import parse, parser
from fastsmooth.messages import DONE, end_with, exit_code, show
from fastsmooth.runfolder.read import RunError
from fastsmooth.trained import load_run


def main(argv: list[str] | None = None) -> int:
    """Export the model of a run; the exit code. A failure is one line on stderr."""
    return exit_code(
        lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunError)
    )


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    run = load_run(request.run, request.weights, "cpu", request.trust_code)
    from fastsmooth.export import work  # with torch, once there is a run: it takes seconds

    for line in work.export(request, run):
        show(line)
    return DONE


if __name__ == "__main__":
    end_with(main)
