"""Train or measure one run: python -m fastsmooth.train [flags]

The whole path from top to bottom: config, schedule, data, model, step, mode, run folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsmooth import __version__, check_data, doctor
from fastsmooth import config as configs
from fastsmooth.config import Config, ConfigError
from fastsmooth.log import read_status
from fastsmooth.messages import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    INTERRUPTED,
    PREEMPTED,
    end_with,
    exit_code,
    failure,
    on_stop,
    one_line,
    say,
    show,
    tell,
    warn,
)
from fastsmooth.processors import keep_within_quota
from fastsmooth.schedule import SOLVED, Point, Schedule, Smoothing, memory, updates_of
from fastsmooth.terminal import Table, columns


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. Whatever goes wrong is one line on stderr, never a traceback."""
    return exit_code(lambda: carry_out(sys.argv[1:] if argv is None else argv))


def carry_out(argv: list[str]) -> int:
    try:
        request = configs.parse(argv)
        if request.help:
            show(*configs.parser().format_help().splitlines())
        elif request.version:
            show(f"fastsmooth {__version__}")
        elif request.plan:
            print_plan(configs.resolve(request.given), request.json)
        elif request.doctor:
            doctor.examine(configs.resolve(request.given), check_launch, pick_device)
        elif request.check_data:
            check_data.check(configs.resolve(request.given))
        else:
            resume = request.given.get("resume", False)
            return run(configs.resumed(request.given) if resume else configs.resolve(request.given))
        return DONE
    except ConfigError as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    # of several processes that say the same, the first of each machine says it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell("error", error)
    return BAD_INPUT


# --plan -------------------------------------------------------------------------------------------------------------


def make_schedule(c: Config, images: int | None) -> Schedule:
    """The schedule that `c` describes over `images` training images."""
    smoothing = Smoothing(c.optimizer, c.c2 or 1.0, 1.0 if c.k2 is None else c.k2, c.nu, c.nshb_delta)
    start = Point(c.lr, c.batch_size, c.momentum)
    shifted = c.compat == "original"
    return Schedule(c.method, c.epochs, start, smoothing, c.decay_epoch, c.power, c.gamma, images, shifted)


def within_budget(c: Config, images: int) -> Config:
    """`c` with the fewest epochs over `images` training images that hold its --budget; the run ends inside the last of them."""
    if c.limit is None:
        return c
    unit, amount = c.limit

    def lasting(epochs: int) -> Config:
        return dataclasses.replace(c, epochs=epochs, decay_epoch=c.decay_epoch or max(1, epochs // 5))

    def held(epochs: int) -> int:
        return training(lasting(epochs), images)[unit]

    # what an epoch holds at most: the first one's updates, since the batch never falls
    most = images if unit == "samples" else held(1)
    longest = configs.MOST_EPOCHS
    few = (amount - 1) // most  # so many epochs are too few
    enough = few + 1
    while enough <= longest and held(enough) < amount:
        few, enough = enough, longest if enough < longest <= 2 * enough else 2 * enough
    if enough > longest:
        raise ConfigError(f"--budget {c.budget} takes over {longest:,} epochs: lower it")
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if held(middle) >= amount else (middle, enough)
    return lasting(enough)


def training(c: Config, images: int) -> dict[str, int]:
    """How many epochs, and the updates and samples of all of them."""
    updates = samples = 0
    for epochs, size in make_schedule(c, images).stages():
        in_each = updates_of(images, size, c.drop_last)
        updates, samples = updates + epochs * in_each, samples + epochs * min(in_each * size, images)
    return {"epochs": c.epochs, "updates": updates, "samples": samples}


def epochs_done(c: Config, schedule: Schedule, images: int) -> Iterator[tuple[int, int]]:
    """(updates, samples) of every epoch that the run begins: to its last, to the end of --budget or the largest of --steps."""
    sampling = c.mode == "sampling"
    unit, amount = ("updates", max(c.steps)) if sampling else c.limit or ("epochs", c.epochs)
    done = {"epochs": 0, "updates": 0, "samples": 0}
    for epochs, size in schedule.stages():
        in_each = updates_of(images, size, c.drop_last)
        for _ in range(epochs):
            if done[unit] >= amount and not sampling:  # which measures once the next batch is there
                return
            left = {
                "epochs": in_each,
                "updates": amount - done["updates"],
                "samples": -(-(amount - done["samples"]) // size),
            }
            updates = min(in_each, left[unit])
            samples = min(updates * size, images)
            yield updates, samples
            if updates < in_each:
                return
            done["epochs"] += 1
            done["updates"] += updates
            done["samples"] += samples


def print_plan(c: Config, as_json: bool) -> None:
    """Point and delta of every epoch that the run begins; equal epochs share a line."""
    images = c.images
    if c.limit:
        if images is None:
            raise ConfigError(
                f"--plan: how many epochs --budget {c.budget} takes, only the images in {c.data_dir} tell"
            )
        c = within_budget(c, images)
    schedule = make_schedule(c, images)
    done = None
    if images is not None:
        check_steps(c, schedule, images)
        done = list(epochs_done(c, schedule, images))
    epochs = c.epochs if done is None else len(done)
    if as_json:
        for epoch, p in enumerate(map(schedule, range(epochs))):
            show(json.dumps({"epoch": epoch} | dataclasses.asdict(p) | {"delta": schedule.delta(p)}), whole=True)
        return
    layout = {"epochs": ">9", "lr": ">11", "batch": ">6", "momentum": ">8", "delta": ">10"}
    table = Table(layout | ({"updates": ">9"} if done else {}), least_first=("updates", "momentum"))
    show(table.heading(columns(sys.stdout)))
    for p, alike in itertools.groupby(range(epochs), schedule):
        first, *rest = alike
        last = rest[-1] if rest else first
        name = f"{first}-{last}" if rest else f"{first}"
        cells = [name, f"{p.lr:.6g}", f"{p.batch_size}", f"{p.momentum:.4g}", f"{schedule.delta(p):.4g}"]
        cells += [f"{sum(n for n, _ in done[first : last + 1]):,}"] if done else []
        show(table.row(cells, columns(sys.stdout)))
    for line in [*units(c), *notes(c, schedule), cost(c, schedule, done)]:
        show(line)
    if c.image_size is None:
        show(
            "the images, which --plan does not open, decide what --image-size and --model are where they are not given"
        )


def cost(c: Config, schedule: Schedule, done: list[tuple[int, int]] | None) -> str:
    """What the run will compute; `done` are the updates and samples of its epochs, None where only the folder can tell."""
    if done is None and c.mode == "sampling":
        return (
            f"cost: {max(c.steps):,} updates, and at {len(c.steps)} of them the gradient of all images in {c.data_dir}"
        )
    if done is None:
        return f"cost: {c.epochs} passes over the images in {c.data_dir}"
    updates, samples = (sum(column) for column in zip(*done, strict=True))
    most = "at most " if c.mode == "critical" else ""
    line = f"cost: {most}{updates:,} updates, {samples:,} gradient evaluations of {c.model}"
    if c.mode == "sampling":
        more = 0
        for step, size in measured(c, schedule, c.images).items():
            # with momentum each direction ends a history of its own, which has its batches and a full gradient to itself
            replayed = min(step, memory(c.momentum))
            more += (c.draws if replayed else 1) * c.images + c.draws * (1 + replayed) * size
        line += f", and {'about ' * (c.momentum > 0)}{more:,} more to measure at {len(c.steps)} of them"
    return line


def units(c: Config) -> list[str]:
    """What delta is in, where that is not what it is in the papers."""
    if not c.assumed:
        return []
    ones = " = ".join([*c.assumed, "1"])
    flags = " and ".join(map(configs.flag, c.assumed))
    unit = f"in units of C ({ones})" if c.assumed == ("c2",) else f"computed with {ones}"
    return [
        f"delta is {unit}: none is published for {configs.setting_of(c)}: give {flags} (--mode sampling measures c2)"
    ]


def notes(c: Config, schedule: Schedule) -> list[str]:
    """Where delta is not what the method aims at."""
    found = []
    missed = schedule.largest_miss()
    if missed and not (c.assumed and configs.uses_k2(c)):
        epoch, target, reached = missed
        found.append(
            f"--method {c.method} misses its target: at epoch {epoch} that is delta {target:.4g}, reached {reached:.4g} "
            f"({why_missed(c, schedule, epoch)})"
        )
    return found


def why_missed(c: Config, schedule: Schedule, epoch: int) -> str:
    if c.method in SOLVED:
        return "the momentum cannot fall below 0"
    if schedule.batch_size(epoch) == schedule.largest_batch:
        return "no batch exceeds the data set"
    if configs.uses_k2(c):
        return "a part of the optimizer's bound does not fall with the batch"
    return "the published code grows the batch an epoch late" if schedule.shifted else "a batch is a whole number"


# A run --------------------------------------------------------------------------------------------------------------


def run(c: Config) -> int:
    """Do the run that `c` describes; the exit code."""
    if c.resume and finished(Path(c.out)):
        if os.environ.get("RANK", "0") == "0":
            say(f"{c.out} is a finished run: nothing to do")
        return DONE
    asked = watch(c)
    # OpenMP threads that spin while they wait stall each other for whole time slices when the cores are shared with
    # other work (LOG.md has figures); GNU OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        import torch  # after the flags are known to be right: it takes seconds
    except Exception as error:  # a library of another version raises OSError
        return refuse(ConfigError(f"PyTorch cannot be imported ({error}): pip install torch torchvision"))
    from fastsmooth.checkpoint import CheckpointError
    from fastsmooth.data import DataError
    from fastsmooth.log import RunFolderError
    from fastsmooth.models import ModelError
    from fastsmooth.modes import Diverged, Preempted
    from fastsmooth.ranks import RankLost, Ranks

    keep_within_quota(torch)
    refusals = (ConfigError, ModelError, DataError, CheckpointError, RunFolderError)
    live = ranks = None
    try:
        check_launch()
        device = pick_device(c, torch)
        ranks = Ranks.join(device)
        live, state, decided = prepare(c, device, ranks, refusals, torch)
        live.stop_asked = asked
        begin(live, state, decided, refusals, torch)
        train(live)
        ended = Ending(DONE, "done")
    except refusals as error:
        ended = Ending(BAD_INPUT, "failed", str(error), "error", one_line(error))
    except Preempted as stop:
        ended = Ending(PREEMPTED, "preempted", str(stop))
        live.progress.say(
            f"stopped by {stop} at update {live.update:,}, saved: go on with --resume --out {live.folder.path}"
        )
    except Diverged as error:
        ended = Ending(DIVERGED, "diverged", str(error), "diverged", f"{error}; the last checkpoint is finite")
    except RankLost as lost:
        ended = Ending(**lost.words) if lost.words else LOST
    except KeyboardInterrupt:
        ended = Ending(INTERRUPTED, "failed", "interrupted")
    except (Exception, SystemExit) as error:  # a library may mean to end the process
        line = out_of_memory(error, live, c, torch)
        if line is not None:
            ended = Ending(BAD_INPUT, "failed", "out of memory", "error", line)
        else:
            ended = failed(error, live)
    conclude(ended, live, ranks)
    return ended.code


def check_launch() -> None:
    """Refuse the environment of a launcher that does not say all that several processes need to meet."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    wrong = [
        name
        for name in doctor.LAUNCH
        if not os.environ.get(name) or not (name == "MASTER_ADDR" or os.environ[name].isdigit())
    ]
    if wrong:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} "
            "not set to what several processes need: start them with torchrun, or unset WORLD_SIZE for one process"
        )


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended, as its exit code, status.json and, where something was wrong, a line on stderr say."""

    code: int
    state: str
    reason: str = ""
    kind: str = ""  # of the line: error or diverged
    line: str = ""


GONE = "another process of the run was lost"
LOST = Ending(PREEMPTED, "preempted", GONE, "error", f"{GONE}: start again with --resume")


def failed(error: BaseException, live) -> Ending:
    """The ending of a run that the system or an error of ours or of a library stopped."""
    if live is None:
        code, line = failure(error)
        return Ending(code, "failed", line, "error", line)
    rank = live.ranks.rank
    code, line = failure(error, live.folder.path, f"traceback-{rank}.txt" if rank else "traceback.txt")
    with contextlib.suppress(Exception):
        live.stream.close()  # frees open files, of which there may be none left
    try:
        steps = live.checkpoints.steps()
        from_where = f"the checkpoint of update {steps[-1]:,}" if steps else "the beginning: there is no checkpoint yet"
    except OSError:
        from_where = "the newest checkpoint"
    said = f"{line}; this was at update {live.update:,}, --resume --out {live.folder.path} goes on from {from_where}"
    return Ending(code, "failed", line, "error", said)


def conclude(ended: Ending, live, ranks) -> None:
    """Close what is open and say how the run ended; never raises."""
    if live is not None:
        steps = [lambda: live.stream.close()]
        if ended.code != DONE:
            steps += [lambda: live.progress.close()]
            if live.begun or not live.config.resume:  # a folder that was not gone on with stays as it was
                steps += [lambda: live.folder.status(ended.state, ended.reason, live.update)]
            steps += [lambda: live.tracker.finish({}, 1), lambda: live.folder.close()]
        for step in steps:
            with contextlib.suppress(Exception):  # what failed once may fail again; the exit code says it
                step()
    if ranks is None:
        tells = os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        # what one process alone met, the others learn from its last words
        alone = ended.state == "failed" or ended == LOST
        tells = ranks.leave(dataclasses.asdict(ended) if alone else None)
    if ended.line and tells:
        tell(ended.kind, ended.line)


# PyTorch's words where memory ran out but the error is of no kind of its own; the second are oneDNN's, for a convolution
NO_MEMORY = ("can't allocate memory", "could not create a primitive", "bad alloc", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: Exception, live, c: Config, torch) -> str | None:
    """What to do about memory that ran out; None for another error."""
    gpu = isinstance(error, torch.OutOfMemoryError)
    if not (gpu or isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)):
        return None
    batch = live.schedule(live.epoch).batch_size if live is not None else c.batch_size
    where = "on the GPU" if gpu else "in main memory"
    return (
        f"out of memory {where} at batch {batch}: --micro-batch N computes the same batch N samples at a time "
        "(try a half, then less), or lower --batchsize"
    )


def prepare(c: Config, device, ranks, refusals: tuple[type[Exception], ...], torch):
    """(the run, the state to go on from): everything that can be refused, in the order of the data's path.

    The run folder comes last. What one process refuses, all refuse, so that none waits for another.
    """
    from fastsmooth import data, machine, models, syncnorm
    from fastsmooth.checkpoint import Checkpoints
    from fastsmooth.clock import Clock
    from fastsmooth.log import RunFolder, Tracker, Unwritten, check_unused, environment
    from fastsmooth.measure import NormRecord
    from fastsmooth.modes import Run
    from fastsmooth.optim import NoisySGD
    from fastsmooth.step import Step, keep_freed_memory

    keep_freed_memory()
    folder = checkpoints = state = None
    with ranks.together(refusals, ConfigError):
        if c.resume and ranks.leader:
            folder = RunFolder(Path(c.out))  # locked before its checkpoints are read
            checkpoints = Checkpoints(Path(c.out) / "checkpoints", warn)
            state = saved_state(checkpoints)
        elif c.out and ranks.leader:
            check_unused(Path(c.out))
    before = ranks.from_leader(made_with(state))
    with ranks.together(refusals, ConfigError), as_it_began(c, before, data.DataError):
        if before:
            c = configs.as_before(c, before, f"{c.out}/checkpoints")
            device = pick_device(c, torch)
            machine.take_over_threads(before)
        kernels = choose_kernels(c, device, torch)  # before their first use, which would warn in other words
        read, decided = data.read_set(c), ""
        if c.image_size is None:
            side = data.usual_side(read)
            c, asked = configs.fitted(c, side), c
            decided = choice(c, asked, side)
        images = data.open_data(c, device, warn if ranks.leader else lambda line: None, ranks.local_world, read)
        images.bad.say = warn  # from now on each process meets bad images of its own
        n = len(images.train)
        check_batch(c, n, ranks.world)
        if not c.resume:
            c = within_budget(c, n)
        schedule = make_schedule(c, n)
        check_steps(c, schedule, n)
        set_numerics(c, schedule, torch)
        torch.manual_seed(c.seed)
        model = models.build(c.model, images.classes, c.norm).to(device, memory_format=torch.channels_last)
        if ranks.rank > 0:  # the same weights, but other numbers for dropout
            torch.manual_seed((c.seed + ranks.rank * 0x9E3779B97F4A7C15) % 2**63)
        alone = try_model(c, model, images, torch)
        if not alone:
            check_lone_samples(c, schedule, n, ranks.world)
        noise = noise_tracker(c, model, images, schedule, ranks, torch) if c.track_noise else None
        if c.sync_bn and ranks.world > 1:
            syncnorm.convert(model)
    # SyncBatchNorm's exchange would cut the graph at every layer
    compiled = c.compile == "on" or (c.compile == "auto" and device.type == "cuda" and not c.sync_bn)
    chosen = {
        "device": device.type,
        "loader": images.loader,
        "compile": "on" if compiled else "off",
        "kernels": kernels,
    }
    chosen |= {"estimator": noise.estimator} if noise else {}
    check_alike(images, model, chosen, ranks)
    optimizer = NoisySGD(model.parameters(), c.optimizer, c.lr, c.momentum, c.nu, c.weight_decay)
    step = Step(model, optimizer, device, c.precision, compiled, c.micro_batch, ranks)

    with ranks.together(refusals, ConfigError):
        out = c.out or (default_out(c) if ranks.leader else None)
    out = Path(ranks.from_leader(out))
    with ranks.together(refusals, ConfigError):
        if not ranks.leader:
            folder = Unwritten(out)
        elif not c.resume:
            about = environment() | {"kernels": kernels, "processes": ranks.world}
            about["data_dir"] = os.path.abspath(c.data_dir)
            folder = RunFolder.create(out, c.to_json(), about)
        tracker = Tracker(c.to_json() | ({} if ranks.leader else {"wandb_mode": "off"}), out, warn)
        wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
        checkpoints = checkpoints or Checkpoints(out / "checkpoints", warn)
        live = Run(c, schedule, images, model, step, device, folder, checkpoints, tracker, Clock(wait), ranks=ranks)
        if c.mode == "critical":
            ignored = c.min_epochs * schedule.updates(n, c.drop_last)[0]
            live.record = NormRecord(c.eps, c.criterion, ignored, device)
        live.noise = noise
        live.made_with = chosen | machine.facts(device, ranks.world)
    return live, state, decided


def begin(live, state: dict[str, Any] | None, decided: str, refusals: tuple[type[Exception], ...], torch) -> None:
    """Stand where the run is to go on, and say what it is."""
    from fastsmooth import machine, models
    from fastsmooth.progress import Progress

    c, ranks, n = live.config, live.ranks, len(live.data.train)
    if c.resume:
        state = ranks.from_leader(state)
        with ranks.together(refusals, ConfigError):
            go_on(live, state)
        changes = machine.changes(made_with(state), live.made_with)
        if changes and ranks.leader:
            warn(f"going on with {changes}: the bits may differ from those of a run that is not interrupted")
    live.begun = True
    epoch_samples = n - n % c.batch_size if c.drop_last else n
    total = sum(samples for _, samples in epochs_done(c, live.schedule, n))
    name = device_name(live.device, torch) if ranks.world == 1 else f"{ranks.world} processes"
    live.progress = Progress(c.epochs, epoch_samples, total, live.samples, name, not ranks.leader, c.delta_unit)
    introduce(c, live, models.count_parameters(live.model), decided)
    live.folder.status("running", "", live.update)


@contextlib.contextmanager
def as_it_began(c: Config, before: dict[str, Any], data_error: type[Exception]) -> Iterator[None]:
    """What `auto` chose when the run began and cannot be had now is refused in words that say so."""
    try:
        yield
    except (ConfigError, data_error) as error:
        names = (name for name in configs.RESOLVED_ONCE if getattr(c, name) == "auto" and name in before)
        if any(str(error).startswith(f"{configs.flag(name)} {before[name]}") for name in names):
            raise ConfigError(f"{error} (the run began so: if you name another, it ends in other bits)") from None
        raise


def choose_kernels(c: Config, device, torch) -> str:
    """The implementation of the kernels here, built now if need be; a fall-back is said in one line."""
    from fastsmooth.kernels import backend

    backend.use(c.kernels, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = backend.choose(device, torch.float32)
    if c.kernels not in ("auto", chosen):
        needs = {"native": "a CPU and a C++ compiler (CXX, c++, g++ or clang++)", "triton": "an NVIDIA GPU and Triton"}
        raise ConfigError(f"--kernels {c.kernels} needs {needs[c.kernels]}: give --kernels {chosen}")
    for warning in caught:
        warn(str(warning.message))
    return chosen


def train(live) -> None:
    """The run from where it stands to its end."""
    from fastsmooth.modes import MODES

    started = time.perf_counter()
    MODES[live.config.mode](live)
    live.progress.close()
    live.folder.sync()
    summary = live.summary() | {"seconds": round(time.perf_counter() - started, 2)}
    summary["images_per_second"] = live.last_epoch.get("images_per_second")
    live.folder.write("summary.json", summary)
    live.folder.status("done", "", live.update)
    live.tracker.finish(summary, DONE)
    if live.step.compile:
        live.progress.say(
            f"compiled {live.step.compiled_graphs} graphs (training step, evaluation, measurement), the first in "
            f"{live.clock.read('compile'):.0f} s"
        )
    if live.last_epoch:
        live.progress.say(f"final test accuracy {live.last_epoch['test_acc']:.2%}, best {live.best_test_acc:.2%}")
    if live.noise and live.noise.count:
        live.progress.say(noise_cost(live))
    if summary["bad_images"]:
        live.progress.say(f"{summary['bad_images']} images could not be read and were served black")
    live.progress.say(f"run folder {live.folder.path}")
    if live.config.dataset == "digits" and live.config.mode == "normal":
        live.progress.say(
            "next: --dataset cifar100 trains the papers' network; --plan shows a schedule; --help the rest"
        )
    live.folder.close()


def finished(out: Path) -> bool:
    return read_status(out).get("state") == "done"


def saved_state(checkpoints) -> dict[str, Any] | None:
    """The newest valid checkpoint; None where the run made none, and begins anew."""
    checkpoints.clean()
    return checkpoints.load()


def made_with(state: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint says of the machine that made it, and of what `auto` chose there; empty where it says nothing."""
    found = (state or {}).get("made_with")
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str | int | None)}


def go_on(live, state: dict[str, Any] | None) -> None:
    """Stand where `state` was saved, or at the beginning."""
    from fastsmooth.checkpoint import CheckpointError
    from fastsmooth.data import DataError

    if state is None:
        live.folder.rewind(0)
        return
    try:
        size = state["metrics_bytes"]
        if type(size) is not int or size < 0:
            raise ValueError(f"its metrics_bytes are {size!r}")
        live.restore(state)
    except DataError as error:
        raise ConfigError(f"--resume with --data-dir {live.config.data_dir}: {error}") from None
    except Exception as error:  # a sound file of another program may fail anywhere
        raise CheckpointError(
            f"{live.checkpoints.directory}: the checkpoint is not of this run ({one_line(error)[:200]}): start a new run"
        ) from None
    live.folder.rewind(size)


def pick_device(c: Config, torch):
    name = c.device
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if processes > 1 and ":" in name:
            raise ConfigError(f"--device {name} with {processes} processes: --device cuda gives each a GPU of its own")
        if 0 < count < processes:
            raise ConfigError(
                f"{processes} processes on a machine with {count} GPUs: --nproc-per-node {count}, or --device cpu"
            )
        index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
        if not torch.cuda.is_available() or index >= count:
            raise ConfigError(
                f"--device {name}: this machine has {count} CUDA devices that PyTorch can use: --device cpu"
            )
        name = f"cuda:{index}"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: this machine has no Apple GPU that PyTorch can use: --device cpu")
    if c.precision == "tf32" and not name.startswith("cuda"):
        raise ConfigError(f"--precision tf32 is a mode of NVIDIA GPUs: with --device {name} use fp32 or bf16")
    return torch.device(name)


def set_numerics(c: Config, schedule: Schedule, torch) -> None:
    tf32 = c.precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # cuDNN's search for the fastest algorithm takes seconds at every new batch size (LOG.md)
    same_batch = len(list(schedule.stages())) == 1
    torch.backends.cudnn.benchmark = same_batch and not c.deterministic


def check_batch(c: Config, n: int, processes: int) -> None:
    if c.batch_size > n:
        raise ConfigError(
            f"--batchsize {c.batch_size} exceeds the {n} training images of {c.dataset}: lower --batchsize"
        )
    if c.batch_size < processes:
        raise ConfigError(
            f"--batchsize {c.batch_size} is less than one sample for each of the {processes} processes: raise --batchsize "
            "(it is that of all processes together)"
        )


def check_steps(c: Config, schedule: Schedule, n: int) -> None:
    total = sum(schedule.updates(n, c.drop_last))
    if c.mode == "sampling" and max(c.steps) >= total:
        raise ConfigError(
            f"--steps {max(c.steps)} lies past the run's {total} updates: lower --steps or raise --epochs"
        )
    full = next((step for step, size in measured(c, schedule, n).items() if size == n), None)
    if full is not None:
        raise ConfigError(
            f"--steps {full}: the batch is the whole training set of {n} images then, whose gradient has no noise: lower "
            "--batchsize, or measure before"
        )


def measured(c: Config, schedule: Schedule, n: int) -> dict[int, int]:
    """The batch size at each of --steps at which --mode sampling measures."""
    steps = c.steps if c.mode == "sampling" else ()
    return {step: schedule.batch_size(schedule.epoch_of(step, n, c.drop_last)) for step in steps}


def check_alike(images, model, chosen: dict[str, Any], ranks) -> None:
    """Refuse processes that see other images, begin with another model or chose otherwise, as two machines may."""
    if ranks.world == 1:
        return
    choices = ranks.gather(chosen)
    for name, first in choices[0].items():
        other = next((rank for rank, found in enumerate(choices) if found[name] != first), None)
        if other is not None:
            flag = configs.flag(name)
            raise ConfigError(
                f"process {other} has {flag} {choices[other][name]}, process 0 {first}: give {flag} yourself"
            )
    weights = sum(p.detach().cpu().double().sum().item() for p in model.parameters())
    for what, values in (("images", ranks.gather(images.fingerprint)), ("model", ranks.gather(weights))):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ConfigError(
                f"process {other} has other {what} than process 0: give all machines the same data and the same versions of "
                "PyTorch and fastsmooth"
            )


def try_model(c: Config, model, images, torch) -> bool:
    """One image through the model in both modes, so that one that cannot take it is refused before the run folder is made.

    Whether the model can train on a single sample: not where a BatchNorm would see 1 x 1 features of it.
    """
    from fastsmooth.data import DataError
    from fastsmooth.measure import undisturbed
    from fastsmooth.models import ModelError, own_size

    try:
        x, _ = next(iter(images.test.batches([torch.arange(1)])))
        with torch.no_grad():
            logits = model.eval()(x)
            if logits.shape != (1, images.classes):
                raise ValueError(f"its output is {list(logits.shape)}, not [1, {images.classes}]")
            with undisturbed(model.train(), "train"):
                model(x)
        return True
    except DataError:
        raise
    except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
        if str(error).startswith("Expected more than 1 value per channel when training"):  # PyTorch's words for it
            return False
        size, own = images.size, own_size(c.model, model)
        remedy = f"another --model than {c.model}"
        if own not in (None, size):
            free = c.dataset in configs.FIELDS["image_size"].metadata["only"][1]
            remedy = f"--image-size {own}" if free else f"{remedy}, which is made for {own}x{own}"
        raise ModelError(
            f"the model cannot take {size}x{size} images ({one_line(error)[:200]}): use {remedy}"
        ) from None


def check_lone_samples(c: Config, schedule: Schedule, n: int, processes: int) -> None:
    """Refuse a run in which a single sample would go through a model that cannot train on one."""
    joined = c.sync_bn and processes > 1
    parts = c.micro_batch
    for where, size, remedies in in_training_mode(c, schedule, n):
        shares = {size} if joined else {size // processes, -(-size // processes)} - {0}
        if not any(share == 1 or (parts and share % parts == 1 % parts) for share in shares):
            continue
        alone = ", one of them alone" if size > 1 else ""
        if size > 1 and processes > 1:
            alone, remedies = f"{alone} in {processes} processes", [*remedies, "another number of processes"]
        if size > 1 and parts:
            alone, remedies = f"{alone} with --micro-batch {parts}", [*remedies, "another --micro-batch"]
        remedies = [*remedies, "another --batchsize", *["--norm group"] * (c.norm == "batch")]
        raise ConfigError(
            f"{where} has {size} sample{'s' * (size > 1)}{alone}, of which {c.model} makes 1x1 features: BatchNorm cannot "
            f"normalise a single value: use {', '.join(remedies[:-1])} or {remedies[-1]}"
        )


def in_training_mode(c: Config, schedule: Schedule, n: int) -> Iterator[tuple[str, int, list[str]]]:
    """(what, of how many samples, what else avoids it) of all that will go through the model in training mode.

    What --track-noise measures is no part of it: it waits for a batch whose parts have two samples or more.
    """
    if c.bn == "train" and c.mode == "critical" and c.criterion == "full-grad":
        yield "the last chunk of the full gradient", n % c.batch_size, []
    for size in measured(c, schedule, n).values() if c.bn == "train" else ():
        yield "a drawn batch", size, []
        yield "the last chunk of the full gradient", n % size, []
    unit, amount = c.limit or ("updates", max(c.steps) if c.mode == "sampling" else math.inf)
    done = {"epochs": 0, "updates": 0, "samples": 0}
    for size in (size for epochs, size in schedule.stages() for _ in range(epochs)):
        rest = n % size
        batches = [("a batch", size, n // size, [])]
        if rest and not c.drop_last:
            batches.append(("the last batch of an epoch", rest, 1, ["--drop-last"]))
        for what, samples, count, remedies in batches:
            if done[unit] >= amount:
                return
            yield what, samples, remedies
            done["updates"] += count
            done["samples"] += count * samples


def noise_tracker(c: Config, model, images, schedule: Schedule, ranks, torch):
    """What --track-noise asks for; a model or a batch that it cannot measure is refused before the run folder is made."""
    from fastsmooth.persample import NotCovered
    from fastsmooth.track import Every, NoiseTracker, choose_estimator, smallest_batch

    x, _ = next(iter(images.test.batches([torch.arange(2)])))
    try:
        estimator, why = choose_estimator(model, x, c.estimator, c.bn)
    except NotCovered as error:
        raise ConfigError(f"--track-noise: {error}; --estimator micro-batch measures any model") from None
    smallest = smallest_batch(estimator) * ranks.world
    if c.batch_size < smallest:
        raise ConfigError(
            f"--track-noise with the {estimator} estimator needs batches of {smallest} or more, not --batchsize {c.batch_size}"
        )
    every = Every.parse(c.track_noise)
    return NoiseTracker(model, every, estimator, why, c.bn, schedule.smoothing, len(images.train), ranks)


def noise_cost(live) -> str:
    """What --track-noise took of this process's training time."""
    tracked, trained = live.clock.read("track"), live.train_seconds + live.clock.read("train")
    share = tracked / max(trained, 1e-9)
    return f"noise measured {live.noise.count} times, here in {tracked:.2g} s: {share:.1%} of the training time"


def default_out(c: Config) -> Path:
    """A new folder, which no other run that starts now gets."""
    from fastsmooth.log import claim

    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{c.dataset}-{c.method if c.mode == 'normal' else c.mode}"
    return claim(Path("runs") / name)


def choice(c: Config, asked: Config, side: int) -> str:
    """What the images decided, and how to decide otherwise."""
    made = [("--image-size", c.image_size)] + ([("--model", c.model)] if asked.model is None else [])
    what, flags = (" and ".join(str(pair[k]) for pair in made) for k in (1, 0))
    return f"{what}: chosen for images whose shorter side has {side} pixels (the median); change with {flags}"


def introduce(c: Config, live, parameters: int, decided: str) -> None:
    say, ranks = live.progress.say, live.ranks
    about = {"digits": " (1,797 handwritten digits of 8x8 pixels, shipped with fastsmooth)"}.get(c.dataset, "")
    say(
        f"{c.dataset}{about}: {len(live.data.train):,} training and {len(live.data.test):,} test images, {live.data.choice}"
    )
    say(
        f"{c.model} ({parameters:,} parameters), {c.optimizer}, method {c.method}, {c.epochs} epochs from lr {c.lr:g}, "
        f"batch {c.batch_size}" + (f", momentum {c.momentum:g}" if c.momentum else "") + f", seed {c.seed}"
    )
    augmented = "no augmentation" if c.augment == "none" else f"augmented by {c.augment}"
    size = live.data.size
    if decided:
        say(decided)
    say(f"{live.data.classes:,} classes, images brought to {size}x{size} pixels, {augmented}")
    if ranks.world > 1:
        normed = f"; BatchNorm's statistics are {'over all of them' if c.sync_bn else 'for each by itself'}"
        say(f"{ranks.world} processes share every batch{normed * live.step.normalises_batches}")
    if c.micro_batch and live.step.normalises_batches:
        say(
            f"--micro-batch {c.micro_batch}: BatchNorm sees {c.micro_batch} samples at a time, so this is another gradient"
        )
    for line in notes(c, live.schedule):
        say(line)
    if live.noise:
        say(f"noise measured {live.noise.described()}")
    if live.tracker.where:
        say(live.tracker.where)
    if live.update:
        say(f"going on from update {live.update:,}, epoch {live.epoch}")


def device_name(device, torch) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def watch(c: Config):
    """A function that says whether to stop: the number of a signal that has come, OUT_OF_TIME after --max-time, or 0."""
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # a second Ctrl-C leaves at once

    on_stop(on_signal)
    deadline = time.monotonic() + c.max_time if c.max_time else None

    def asked() -> int:
        from fastsmooth.modes import OUT_OF_TIME

        if received:
            return received[0]
        return OUT_OF_TIME if deadline and time.monotonic() > deadline else 0

    return asked


if __name__ == "__main__":
    end_with(main)
