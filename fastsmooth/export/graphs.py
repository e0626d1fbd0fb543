"""A network as a graph that needs none of its code: ONNX, and the programs of torch.export. Each is
compared with the network before it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import one_line
from fastsmooth.runfolder.weights import MODEL, ModelFacts

BATCHES = (1, 5)  # images that the graph and the network are both shown
# Of the largest logit: float32 sums in another order differ by far less, a wrong graph by far more.
TOLERANCE = 1e-3
LARGEST_ONNX = 2**31 - 2**24  # bytes: protobuf holds 2 GiB, and the graph needs some of them
INPUT, OUTPUT = "images", "logits"
Logits = Callable[[Tensor], Tensor]


def to_onnx(model: nn.Module, facts: ModelFacts) -> tuple[bytes, str]:
    """(an ONNX file, how it was checked): input images float32 [batch, C, S, S], output logits
    [batch, classes]; what model.json says is in its metadata. Raises ConfigError."""
    import onnx

    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise ConfigError(
            f"--to onnx: the {size / 1e9:.1f} GB of {facts.network} are more than the 2 GB that an "
            "ONNX file holds: use --to torch-export or safetensors"
        )
    with exporting("onnx", facts):
        program = torch.onnx.export(
            model,
            (example(facts, 2),),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        assert program is not None  # with dynamo=True
        program.model.metadata_props.update(words_of(facts))
        data = program.model_proto.SerializeToString()
        onnx.checker.check_model(data)
    if find_spec("onnxruntime") is None:
        return data, (
            "onnx.checker finds it sound; its logits were not compared, which needs onnxruntime: "
            "pip install 'fastsmooth[onnx]'"
        )
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])

    def logits(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return data, compared(logits, model, facts, "onnxruntime")


def to_torch_export(model: nn.Module, facts: ModelFacts) -> tuple[bytes, str]:
    """(a .pt2 file of torch.export.save, how it was checked): images float32 [batch, C, S, S] to
    logits [batch, classes]; model.json is in it. Raises ConfigError."""
    with exporting("torch-export", facts):
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(model, (example(facts, 2),), dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={MODEL: json.dumps(facts.to_json())})
        again = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), compared(again, model, facts, "the file loaded again")


@contextlib.contextmanager
def exporting(form: str, facts: ModelFacts) -> Iterator[None]:
    """Inside, what PyTorch says of the inner works of an export is not shown, and what it cannot
    export is a ConfigError."""
    # PyTorch asks for one setting of all cuDNN, and fastsmooth changes that of convolutions alone
    cudnn: Any = torch.backends.cudnn
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"--to {form}: PyTorch cannot make a graph of {facts.network} for any number of images "
            f"({type(error).__name__}: {one_line(error)[:200]}): use --to safetensors"
        ) from error
    finally:
        cudnn.conv.fp32_precision = before


def example(facts: ModelFacts, count: int) -> Tensor:
    """Random images float32 [count, C, S, S], the same every time."""
    numbers = torch.Generator().manual_seed(count)
    side = facts.image_size
    return torch.randn(count, facts.channels, side, side, generator=numbers)


@torch.inference_mode()
def compared(logits: Logits, model: nn.Module, facts: ModelFacts, by: str) -> str:
    """In words: how far the logits of random images are from the network's. Raises ConfigError
    where that is more than rounding."""
    apart, largest = [], []
    for count in BATCHES:
        x = example(facts, count)
        wanted, found = model(x), logits(x)
        if not wanted.isfinite().all():
            raise ConfigError(
                f"the logits of {facts.network} are not finite with these weights: name others by "
                "--weights"
            )
        if found.shape != wanted.shape:
            raise ConfigError(
                f"{by} gives logits {list(found.shape)} of {count} images, not "
                f"{list(wanted.shape)}: nothing was written: use --to safetensors"
            )
        apart.append((found - wanted).abs().max().item())
        largest.append(wanted.abs().max().item())
        if not apart[-1] <= TOLERANCE * largest[-1]:  # nor NaN
            raise ConfigError(
                f"the logits of {by} are {apart[-1]:.2g} from those of {facts.network}, the "
                f"largest of which is {largest[-1]:.3g}: nothing was written: use --to safetensors"
            )
    counts = " and ".join(map(str, BATCHES))
    return (
        f"checked by {by}: logits of {counts} random images differ from the network's by at most "
        f"{max(apart):.2g} (the largest is {max(largest):.3g})"
    )


def words_of(facts: ModelFacts) -> dict[str, str]:
    """What model.json says, each entry as text: JSON of what is no word."""
    entries = dataclasses.asdict(facts).items()
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in entries}
