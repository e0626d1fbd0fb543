"""What a run is made of, in the order of the data's path; bad input is refused here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmooth import data, foreign, models, owncode
from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import Config
from fastsmooth.cli.device import pick_device
from fastsmooth.cli.facts import is_among
from fastsmooth.cli.flags import ConfigError, flag, is_code
from fastsmooth.cli.progress import Progress
from fastsmooth.data import DataError
from fastsmooth.foreign import Driven, OptimizerError
from fastsmooth.freezing import freeze
from fastsmooth.messages import one_line, warn
from fastsmooth.models import ModelError, own_size
from fastsmooth.noise.gradients import undisturbed
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.machine import environment
from fastsmooth.runfolder.trackers import Trackers
from fastsmooth.runfolder.weights import MODEL, ModelFacts
from fastsmooth.runfolder.write import RunFolder, RunFolderError, Unwritten, check_unused, claim
from fastsmooth.training import device as machine
from fastsmooth.training import extending, fitting, syncnorm
from fastsmooth.training.beginning import begin_with
from fastsmooth.training.clock import Clock
from fastsmooth.training.ema import Ema
from fastsmooth.training.graphs import CudaRecorder
from fastsmooth.training.loop import FORMAT, Origin, Run
from fastsmooth.training.mixing import Mixer
from fastsmooth.training.modes import INSTRUMENTS, InstrumentParts
from fastsmooth.training.objective import Objective, check_loss, objective_of
from fastsmooth.training.plan import Plan, make_plan, notes, units, warming
from fastsmooth.training.sam import Sam
from fastsmooth.training.step import Step, keep_freed_memory

PRECISIONS = {
    "fp32": "in float32",
    "tf32": "in float32 with TF32 products",
    "bf16": "in bfloat16 autocast",
}
REFUSALS = (ConfigError, ModelError, OptimizerError, DataError, CheckpointError, RunFolderError)
State = dict[str, Any]


class Before(NamedTuple):
    """What there is of a run that goes on, or of the finished run that it begins from. The first
    three are the first process's alone, None elsewhere; and None where there is no such run."""

    folder: RunFolder | None  # locked
    checkpoints: Checkpoints | None
    state: State | None
    made_with: dict[str, Any]
    origin: Origin | None
    first_epoch: int  # the data's number of the run's first epoch


class Machine(NamedTuple):
    """What computes, as it was chosen."""

    device: torch.device
    kernels: str
    precision: str
    graphs: str
    compiled: bool


class Trained(NamedTuple):
    """What is trained, and by what."""

    model: torch.nn.Module
    optimizer: Driven
    objective: Objective
    code: dict[str, bytes]  # the files of own code that they are made of
    one_alone: bool  # whether the model can train on a single sample
    remarks: list[str]  # of its weights


def prepare(c: Config, device: torch.device, ranks: Ranks) -> tuple[Run, State | None, list[str]]:
    """(the run, the state to go on from, what images and memory decided in words): everything that
    can be refused, in the order of the data's path.

    The run folder comes last. What one process refuses, all refuse, so that none waits for another.
    """
    keep_freed_memory()
    before, given = look_back(c, ranks), c
    with ranks.together(REFUSALS, ConfigError), as_it_began(c, before.made_with):
        if before.made_with:
            source = f"{before.origin.run if before.origin else c.out}/checkpoints"
            c = parsing.as_before(c, before.made_with, source)
            device = pick_device(c.device, torch, c.precision)
            machine.take_over_threads(before.made_with)
        check_recipe(c)
        # before their first use, which would warn in other words
        on = choose_machine(c, device, ranks)
        plan, images, decided = open_images(c, device, ranks, before.first_epoch)
        c = plan.config
        machine.set_numerics(c, on.precision, plan.schedule)
        trained = make_trained(plan, images, device, ranks, before)
    plan, cut = cut_to_fit(plan, images, trained, on, ranks)
    c = plan.config
    with ranks.together(REFUSALS, ConfigError), as_it_began(c, before.made_with):
        parts = InstrumentParts(
            plan,
            trained.model,
            trained.optimizer,
            images,
            ranks,
            on.precision,
            on.compiled,
            trained.objective,
        )
        made = [make(parts) for make in INSTRUMENTS]
        instruments = [instrument for instrument in made if instrument is not None]
    chosen = {
        "device": device.type,
        "loader": images.loader,
        "compile": "on" if on.compiled else "off",
        "precision": on.precision,
        "kernels": on.kernels,
        "micro_batch": c.samples_at_once,
    }
    for instrument in instruments:
        chosen |= instrument.chosen()
    check_alike(images, trained.model, chosen, ranks, trained.code)
    step = make_step(plan, images, trained, on, ranks)
    recorder = None
    if on.graphs == "on" and isinstance(trained.optimizer, NoisySGD):
        recorder = CudaRecorder(device, trained.optimizer.settle)

    with ranks.together(REFUSALS, ConfigError):
        named = Path(c.out) if c.out else default_out(c) if ranks.leader else None
    out = Path(ranks.from_leader(named))
    with ranks.together(REFUSALS, ConfigError):
        folder: RunFolder | Unwritten = before.folder or Unwritten(out)
        if ranks.leader and not before.folder:
            about = {"kernels": on.kernels, "processes": ranks.world}
            about |= {"precision": on.precision, "graphs": on.graphs}
            about |= {"measure": chosen.get("measure"), "micro_batch": c.samples_at_once}
            about |= about_images(c, images)
            about |= {"weights": trained.remarks} if trained.remarks else {}
            about |= {"extends": dataclasses.asdict(before.origin)} if before.origin else {}
            about |= {"code": {k: os.path.abspath(v) for k, v in c.own_code.items()}}
            said = {name: getattr(given, name) for name in configs.RESOLVED_ONCE}
            folder = RunFolder.create(out, c.to_json() | said, environment() | about)
        if ranks.leader:
            owncode.keep(out / "code", trained.code)
        trackers = Trackers(c.trackers if ranks.leader else (), c.to_json(), out, warn)
        wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        run = Run(
            plan,
            images,
            trained.model,
            step,
            device,
            folder,
            before.checkpoints or Checkpoints(out / "checkpoints", warn),
            trackers,
            Clock(wait),
            ranks=ranks,
            instruments=instruments,
            made_with=chosen | machine.facts(device, ranks.world) | sums(trained.code),
            recorder=recorder,
            ema=Ema(trained.model, c.ema) if c.ema else None,
            remarks=trained.remarks,
            origin=before.origin,
        )
    return run, before.state, [line for line in (decided, cut) if line]


def look_back(c: Config, ranks: Ranks) -> Before:
    """What the run goes on from. Raises what REFUSALS lists, in every process."""
    wanted = Path(c.out) if c.out else None
    folder = checkpoints = state = origin = None
    with ranks.together(REFUSALS, ConfigError):
        if wanted and c.resume and ranks.leader:
            folder = RunFolder(wanted)  # locked before its checkpoints are read
            checkpoints = Checkpoints(wanted / "checkpoints", warn)
            state = saved_state(checkpoints)
        elif wanted and ranks.leader:
            check_unused(wanted)
        if c.extend and state is None and ranks.leader:
            state, origin = extending.finished(c.extend)
    made = made_with(state)
    if origin is not None:  # whose batches were others
        made.pop("micro_batch", None)
    told = made, origin, extending.first_epoch(state, origin)
    return Before(folder, checkpoints, state, *ranks.from_leader(told))


def choose_machine(c: Config, device: torch.device, ranks: Ranks) -> Machine:
    """Raises ConfigError for what this machine has not got."""
    kernels = machine.choose_kernels(c, device)
    precision = machine.choose_precision(c, device)
    graphs = machine.choose_graphs(c, device, kernels, ranks.world)
    # SyncBatchNorm's exchange would cut the graph at every layer
    compiled = c.compile == "on" or (
        c.compile == "auto" and device.type == "cuda" and not c.sync_bn
    )
    return Machine(device, kernels, precision, graphs, compiled)


def open_images(
    c: Config, device: torch.device, ranks: Ranks, first_epoch: int
) -> tuple[Plan, data.Data, str]:
    """(the plan over the images, the images behind their loader, what they decided in words)."""
    read, decided = data.read_set(c), ""
    if c.dataset == "auto":
        c = dataclasses.replace(c, dataset=read.layout)
    if not (c.image_size and c.augment):
        side = data.usual_side(read)
        c, asked = configs.fitted(c, side), c
        decided = "" if asked.image_size else choice(c, asked, side)
    plan = None
    if len(c.image_stages) > 1:  # by the epochs of the plan
        plan = planned(c, len(read.train), ranks.world)
        c = plan.config
    say = warn if ranks.leader else lambda line: None
    images = data.open_data(c, device, say, ranks.local_world, read, first_epoch)
    check_classes(c, images)
    images.bad.say = warn  # from now on each process meets bad images of its own
    return plan or planned(c, len(images.train), ranks.world), images, decided


def make_trained(
    plan: Plan, images: data.Data, device: torch.device, ranks: Ranks, before: Before
) -> Trained:
    """The model, tried out, with its optimizer and its loss."""
    c = plan.config
    torch.manual_seed(c.seed)
    model, remarks = models.build(c.model, images.classes, c.norm, images.channels), []
    if c.init and not before.made_with:  # else all of them come with the state
        remarks.append(begin_with(c, model, images.classes, ranks.leader))
    if c.freeze:
        remarks.append(freeze(model, c.freeze).described(c.freeze, model))
    model = model.to(device).to(memory_format=torch.channels_last)
    if ranks.rank > 0:  # the same weights, but other numbers for dropout
        torch.manual_seed((c.seed + ranks.rank * 0x9E3779B97F4A7C15) % 2**63)
    one_alone = try_model(c, model, images)
    if not one_alone:
        check_lone_samples(plan, ranks.world)
    if c.sync_bn and ranks.world > 1:
        syncnorm.convert(model)
    optimizer = optimizer_of(c, parameter_groups(c, model))
    if before.origin and before.state is not None:
        extending.check(before.state, before.origin, model, optimizer, images)
    objective = objective_of(c, device)
    if is_code(c.loss):
        check_loss(c, objective, images.classes, device, ranks.world)
    return Trained(model, optimizer, objective, own_files(c), one_alone, remarks)


def cut_to_fit(
    plan: Plan, images: data.Data, trained: Trained, on: Machine, ranks: Ranks
) -> tuple[Plan, str]:
    """The plan with what --micro-batch auto means here, and what that is in words."""
    if plan.config.micro_batch != "auto":
        return plan, ""
    tried = on.device.type in fitting.TRIED
    with ranks.together(REFUSALS, ConfigError):
        share, shape = fitting.largest_share(plan, images, ranks.world)
        few = share
        bn = batchnorm_of(plan.config)
        trial = fitting.Trial(
            trained.model, trained.optimizer, shape, on.precision, bn, trained.objective
        )
        one_left = partial(fitting.one_left, plan, ranks.world, trained.one_alone)
        if tried:
            few = fitting.what_fits(share, trial.fits, one_left)
    at_once = fitting.smallest_of(ranks, few, share)
    c = dataclasses.replace(plan.config, micro_batch=at_once)
    return dataclasses.replace(plan, config=c), fitting.told(share, c.samples_at_once, tried)


def make_step(plan: Plan, images: data.Data, trained: Trained, on: Machine, ranks: Ranks) -> Step:
    c, mixer = plan.config, None
    if c.mixup or c.cutmix:
        mixer = Mixer(c.mixup, c.cutmix, c.seed, images.classes, on.device)
    return Step(
        trained.model,
        trained.optimizer,
        on.device,
        on.precision,
        on.compiled,
        c.samples_at_once,
        ranks,
        batchnorm_of(c),
        len(set(plan.sizes.values)),
        trained.objective,
        mixer=mixer,
        clip_norm=c.clip_norm,
        sam=Sam.parse(c.sam) if c.sam else None,
        top5=c.top5,
    )


def batchnorm_of(c: Config) -> str | None:
    """What Step wants to know of BatchNorm."""
    return "batch" if c.bn == "batch" else None


def about_images(c: Config, images: data.Data) -> dict[str, Any]:
    """What env.json says of them."""
    about: dict[str, Any] = {"data_dir": os.path.abspath(c.data_dir), "images": images.about}
    about |= {"training_images": len(images.train), "test_images": len(images.test)}
    return about | {"fingerprint": images.fingerprint}


def begin(run: Run, state: State | None, decided: list[str]) -> None:
    """Stand where the run is to go on, and say what it is."""
    c, plan, ranks = run.config, run.plan, run.ranks
    if c.resume or run.origin:
        state = ranks.from_leader(state)
        with ranks.together(REFUSALS, ConfigError):
            if state is not None and run.origin:
                extending.take_over(run, state, run.origin)
            else:
                go_on(run, state)
        changes = machine.changes(made_with(state), run.made_with)
        if changes and ranks.leader:
            differ = "the bits may differ from those of a run that is not interrupted"
            if run.origin:
                differ = "what was trained before was trained otherwise"
            warn(f"going on with {changes}: {differ}")
    run.begun = True
    run.trackers.start()
    name = machine.device_name(run.device) if ranks.world == 1 else f"{ranks.world} processes"
    run.progress = Progress(
        c.epochs,
        plan.samples_at_first,
        plan.samples,
        run.samples,
        name,
        not ranks.leader,
        c.delta_unit,
    )
    introduce(run, decided)
    run.folder.write(MODEL, described(run).to_json())
    run.folder.status("running", "", run.update)


def described(run: Run) -> ModelFacts:
    """What model.json says."""
    c, view = run.config, run.data.view
    return ModelFacts(
        c.model,
        c.norm,
        view.channels,
        run.data.class_ids,
        run.data.class_names,
        view.mode,
        view.resize,
        view.size,
        view.mean,
        view.std,
        sum(p.numel() for p in run.model.parameters()),
    )


@contextlib.contextmanager
def as_it_began(c: Config, before: dict[str, Any]) -> Iterator[None]:
    """Inside, a refusal of what `auto` chose when the run began says that it was chosen then."""
    try:
        yield
    except (ConfigError, DataError) as error:
        names = (
            name for name in configs.RESOLVED_ONCE if getattr(c, name) == "auto" and name in before
        )
        if any(str(error).startswith(f"{flag(name)} {before[name]}") for name in names):
            raise ConfigError(
                f"{error} (the run began so: if you name another, it ends in other bits)"
            ) from None
        raise


def saved_state(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The newest valid checkpoint; None where the run made none, and begins anew."""
    checkpoints.clean()
    return checkpoints.load()


def made_with(state: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint says of the machine that made it, and of what `auto` chose there; empty
    where it says nothing."""
    found = (state or {}).get("made_with")
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str | int | None)}


def go_on(run: Run, state: State | None) -> None:
    """Stand where `state` was saved, or at the beginning."""
    if state is None:
        run.folder.rewind(0)
        return
    directory = run.checkpoints.directory
    if "update" in state and state.get("format") != FORMAT:  # else it is of no run
        raise CheckpointError(
            f"{directory}: the checkpoint has the form of another version of fastsmooth: finish "
            "the run with the version that began it, or start a new one"
        )
    try:
        size = state["metrics_bytes"]
        if type(size) is not int or size < 0:
            raise ValueError(f"its metrics_bytes are {size!r}")
        run.restore(state)
    except DataError as error:
        raise ConfigError(f"--resume with --data-dir {run.config.data_dir}: {error}") from None
    except Exception as error:  # a sound file of another program may fail anywhere
        raise CheckpointError(
            f"{directory}: the checkpoint is not of this run ({one_line(error)[:200]}): start a "
            "new run"
        ) from None
    run.folder.rewind(size)


def check_recipe(c: Config) -> None:
    """Refuse a recipe that needs a library which is not there."""
    names = ("model", "optimizer") if c.recipe else ()
    wanted = [f"{flag(n)} {getattr(c, n)}" for n in names if getattr(c, n).startswith("timm/")]
    if wanted and importlib.util.find_spec("timm") is None:
        raise ConfigError(
            f"--recipe {c.recipe}: {' and '.join(wanted)} need{'s' * (len(wanted) == 1)} timm, "
            "which is not installed: pip install timm"
        )


def optimizer_of(c: Config, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> Driven:
    """What --optimizer names, over tensors or groups of them. Raises OptimizerError."""
    if c.foreign:
        arguments = c.optimizer_args or ()
        return foreign.build(c.optimizer, arguments, params, c.lr, c.weight_decay)
    nu = c.nu_stages[0].value
    return NoisySGD(params, c.optimizer, c.lr, c.momentum, nu, c.weight_decay)


def own_files(c: Config) -> dict[str, bytes]:
    """The files of own code that the run is made of, by their names. Raises ConfigError where two
    have one name, since they are kept in one folder."""
    found: dict[str, bytes] = {}
    try:
        for path in {owncode.whole(owncode.split(spec)[0]) for spec in c.own_code.values()}:
            for name, content in owncode.files_of(path).items():
                if found.setdefault(name, content) != content:
                    raise ConfigError(f"two files of own code are called {name}: rename one")
    except owncode.CodeError as error:
        raise ConfigError(str(error)) from None
    return found


def sums(code: dict[str, bytes]) -> dict[str, str]:
    """What a checkpoint remembers of own code."""
    return {name: f"sha256 {owncode.digest(content)}" for name, content in code.items()}


def planned(c: Config, n: int, processes: int) -> Plan:
    """The plan over n training images. Raises ConfigError for what cannot be done over them."""
    check_batch(c, n, processes)
    return make_plan(c, n)


def check_batch(c: Config, n: int, processes: int) -> None:
    configs.check_largest_batch(c, n)
    if c.smallest_batch < processes:
        named = "--batchsize" if c.smallest_batch == c.batch_size else "--schedule: batch"
        raise ConfigError(
            f"{named} {c.smallest_batch} is less than one sample for each of the {processes} "
            f"processes: raise {named.split()[-1]} (it is that of all processes together)"
        )


def check_alike(
    images: data.Data,
    model: torch.nn.Module,
    chosen: dict[str, Any],
    ranks: Ranks,
    code: dict[str, bytes],
) -> None:
    """Refuse processes that see other images, begin with another model or chose otherwise, as two
    machines may."""
    if ranks.world == 1:
        return
    choices = ranks.gather(chosen)
    for name, first in choices[0].items():
        other = next((rank for rank, found in enumerate(choices) if found[name] != first), None)
        if other is not None:
            raise ConfigError(
                f"process {other} has {flag(name)} {choices[other][name]}, process 0 {first}: give "
                f"{flag(name)} yourself"
            )
    weights = sum(p.detach().cpu().double().sum().item() for p in model.parameters())
    for what, values in (
        ("images", ranks.gather(images.fingerprint)),
        ("model", ranks.gather(weights)),
        ("code", ranks.gather(sums(code))),
    ):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ConfigError(
                f"process {other} has other {what} than process 0: give all machines the same data "
                "and the same versions of PyTorch and fastsmooth"
            )


def try_model(c: Config, model: torch.nn.Module, images: data.Data) -> bool:
    """One image of each size through the model in both modes, so that one that cannot take it is
    refused before the run folder is made.

    Whether the model can train on a single sample: not where a BatchNorm would see 1 x 1 features
    of it.
    """
    x, _ = next(iter(images.test.batches([torch.arange(1)])))
    sides = dict.fromkeys(c.sizes.values) if c.sizes.changes else (images.size,)
    return all([takes(c, model, x, images.classes, side) for side in sides])


def takes(c: Config, model: torch.nn.Module, x: Tensor, classes: int, side: int) -> bool:
    """try_model for x [1, C, S, S] brought to side x side."""
    sizes = c.sizes
    if x.shape[2] != side:
        x = F.interpolate(x, size=(side, side))
    try:
        with torch.no_grad():
            logits = model.eval()(x)
            if not isinstance(logits, Tensor):
                raise ValueError(f"its output is of type {type(logits).__name__}, no tensor")
            if logits.shape != (1, classes):
                raise ValueError(f"its output is {list(logits.shape)}, not [1, {classes}]")
            with undisturbed(model.train(), "train"):
                model(x)
        return True
    except Exception as error:
        foreseen = isinstance(error, RuntimeError | ValueError | AssertionError | AttributeError)
        if not foreseen and not is_code(c.model):
            raise
        # PyTorch's words for it
        if str(error).startswith("Expected more than 1 value per channel when training"):
            return False
        if is_code(c.model):
            where = owncode.fault(error, owncode.split(c.model)[0])
            raise ModelError(
                f"--model {c.model}: on images [1, {x.shape[1]}, {side}, {side}]: {where}"
            ) from None
        own = own_size(c.model, model)
        remedy = f"another --model than {c.model}"
        if own not in (None, side):
            free = is_among(c.dataset, configs.FIELDS["image_size"].metadata["only"][1])
            remedy = f"--image-size {own}" if free else f"{remedy}, which is made for {own}x{own}"
        first = sizes.starts[sizes.values.index(side)] if sizes.changes else 0
        stage = f", which --image-size has from epoch {first} on" if sizes.changes else ""
        raise ModelError(
            f"the model cannot take {side}x{side} images{stage} ({one_line(error)[:200]}): use "
            f"{remedy}"
        ) from None


def check_classes(c: Config, images: data.Data) -> None:
    if c.top5 and images.classes <= 5:
        raise ConfigError(
            f"--top5: {c.dataset} has {images.classes} classes, all of them among the five "
            "likeliest: leave --top5 out"
        )


def parameter_groups(c: Config, model: torch.nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model as an optimizer takes them: one group; two under
    --decay-weights-only, the second without weight decay, of all that have at most one dimension:
    biases, and the scales and shifts of normalisation layers."""
    params = list(model.parameters())
    if not c.decay_weights_only:
        return [{"params": params}]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_lone_samples(plan: Plan, processes: int) -> None:
    """Refuse a run in which a single sample would go through a model that cannot train on one."""
    c = plan.config
    parts = c.samples_at_once
    for where, size, remedies in fitting.lone_samples(plan, processes, parts):
        alone = ", one of them alone" if size > 1 else ""
        if size > 1 and processes > 1:
            alone, remedies = (
                f"{alone} in {processes} processes",
                [*remedies, "another number of processes"],
            )
        if size > 1 and parts:
            alone, remedies = (
                f"{alone} with --micro-batch {parts}",
                [*remedies, "another --micro-batch"],
            )
        remedies = [*remedies, "another --batchsize", *["--norm group"] * (c.norm == "batch")]
        raise ConfigError(
            f"{where} has {size} sample{'s' * (size > 1)}{alone}, of which {c.model} makes 1x1 "
            f"features: BatchNorm cannot normalise a single value: use {', '.join(remedies[:-1])} "
            f"or {remedies[-1]}"
        )


def default_out(c: Config) -> Path:
    """A new folder, which no other run that starts now gets."""
    dataset, what = c.dataset.replace("/", "-"), c.followed if c.mode == "normal" else c.mode
    return claim(Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{dataset}-{what}")


def choice(c: Config, asked: Config, side: int) -> str:
    """What the images decided, and how to decide otherwise."""
    made = [("--image-size", c.image_size)] + ([("--model", c.model)] if not asked.model else [])
    what, flags = (" and ".join(str(pair[k]) for pair in made) for k in (1, 0))
    return (
        f"{what}: chosen for images whose shorter side has {side} pixels (the median); change "
        f"with {flags}"
    )


def pixels(run: Run) -> str:
    """The sizes of the images in words, with the epochs at which they change."""
    tested, sizes = f"{run.data.size}x{run.data.size}", run.plan.sizes
    if not sizes.changes:
        return f"{tested} pixels"
    stages = zip(sizes.values, sizes.starts, strict=True)
    listed = ", ".join(f"{side}x{side} from epoch {first}" for side, first in stages)
    return f"{listed} (pixels), tested at {tested}"


def mixed(c: Config) -> str:
    """How training batches are mixed, in words."""
    kinds = [f"{name} {getattr(c, name):g}" for name in ("mixup", "cutmix") if getattr(c, name)]
    how = " or ".join(kinds) + ", as often one as the other" * (len(kinds) > 1)
    return f"training batches are mixed by {how}: train_loss and train_acc are of mixed images"


# What else changes an update, which the lines of a run do not name otherwise.
BESIDES = ("weight_decay", "decay_weights_only", "clip_norm", "sam", "ema", "patience")


def besides(c: Config) -> str:
    """Those of them that the run has, and the recipe that they may come from; empty without."""
    flags = [name for name in BESIDES if getattr(c, name) != configs.FIELDS[name].default]
    values = (getattr(c, name) for name in flags)
    said = [flag(n) if v is True else f"{flag(n)} {v}" for n, v in zip(flags, values, strict=True)]
    recipe = [f"recipe {c.recipe}"] if c.recipe else []
    return ", ".join(recipe + said)


def introduce(run: Run, decided: list[str]) -> None:
    c, say, ranks = run.config, run.progress.say, run.ranks
    parameters = f"{models.count_parameters(run.model):,} {'trainable ' * bool(c.freeze)}parameters"
    about = {"digits": " (1,797 handwritten digits of 8x8 pixels, shipped with fastsmooth)"}.get(
        c.dataset, ""
    )
    say(
        f"{c.dataset}{about}: {len(run.data.train):,} training and {len(run.data.test):,} test "
        f"images, {run.data.choice}"
    )
    course = f"method {c.method}" + " per update" * (c.per == "update")
    course = course if c.schedule is None else f"schedule {c.schedule!r}"
    say(
        f"{c.model} ({parameters}), {c.optimizer}, {course}, {c.epochs} "
        f"epochs from lr {c.lr:g}, batch {c.batch_size}"
        + (f", momentum {c.momentum:g}" if c.momentum else "")
        + f", seed {c.seed}, {PRECISIONS[run.step.precision]}"
    )
    augmented = f"augmented by {c.changes}" if c.changes else "no augmentation"
    if run.data.about:
        say(run.data.about)
    for line in decided:
        say(line)
    say(f"{run.data.classes:,} classes, images brought to {pixels(run)}, {augmented}")
    if run.step.mixer is not None:
        say(mixed(c))
    if run.plan.sizes.changes and run.device.type == "cuda":
        say("no update is captured as a CUDA graph: one is of images of one size")
    if ranks.world > 1:
        normed = (
            "; BatchNorm's statistics are "
            f"{'over all of them' if c.sync_bn else 'for each by itself'}"
        )
        say(f"{ranks.world} processes share every batch{normed * run.step.normalises_batches}")
    at_once = c.samples_at_once
    if at_once and run.step.normalises_batches:
        say(
            f"--micro-batch {at_once}: BatchNorm sees {at_once} samples at a time, so this is "
            "another gradient"
        )
    if is_code(c.loss):
        say(f"the loss, of training and of testing, is {c.loss}")
    if not c.form.bounds:
        say(*units(c))
    if words := besides(c):
        say(words)
    for line in [*run.remarks, *warming(c, run.plan), *notes(c, run.schedule)]:
        say(line)
    for instrument in run.instruments:
        for line in instrument.introduction():
            say(line)
    for line in run.trackers.where:
        say(line)
    if run.origin:
        say(
            f"going on from the end of {run.origin.run} ({run.origin.epochs:,} epochs, "
            f"{run.origin.updates:,} updates); this run counts its own from 0"
        )
    if run.update:
        say(f"going on from update {run.update:,}, epoch {run.epoch}")
