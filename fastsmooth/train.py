"""Train or measure one run: python -m fastsmooth.train [flags]

The whole path from top to bottom: config, schedule, data, model, step, mode, run folder.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fastsmooth import __version__
from fastsmooth.cli import check_data, doctor
from fastsmooth.cli import config as configs
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import Config
from fastsmooth.cli.device import pick_device
from fastsmooth.cli.doctor import check_launch
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    INTERRUPTED,
    PREEMPTED,
    end_with,
    exit_code,
    one_line,
    say,
    show,
    tell,
)
from fastsmooth.processors import keep_within_quota
from fastsmooth.runfolder.read import read_status
from fastsmooth.training.build import begin, noise_cost, prepare
from fastsmooth.training.ending import LOST, Ending, conclude, failed, out_of_memory, watch
from fastsmooth.training.plan import print_plan


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. Whatever goes wrong is one line on stderr, never a
    traceback."""
    return exit_code(lambda: carry_out(sys.argv[1:] if argv is None else argv))


def carry_out(argv: list[str]) -> int:
    try:
        request = parsing.parse(argv)
        if request.help:
            show(*parsing.parser().format_help().splitlines())
        elif request.version:
            show(f"fastsmooth {__version__}")
        elif request.plan:
            print_plan(configs.resolve(request.given), request.json)
        elif request.doctor:
            doctor.examine(configs.resolve(request.given), check_launch)
        elif request.check_data:
            check_data.check(configs.resolve(request.given))
        else:
            resume = request.given.get("resume", False)
            return run(parsing.resumed(request.given) if resume else configs.resolve(request.given))
        return DONE
    except ConfigError as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    # of several processes that say the same, the first of each machine says it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell("error", error)
    return BAD_INPUT


def run(c: Config) -> int:
    """Do the run that `c` describes; the exit code."""
    if c.resume and finished(Path(c.out)):
        if os.environ.get("RANK", "0") == "0":
            say(f"{c.out} is a finished run: nothing to do")
        return DONE
    asked = watch(c)
    # OpenMP threads that spin while they wait stall each other for whole time slices when the cores
    # are shared with other work (LOG.md has figures); GNU OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        import torch  # after the flags are known to be right: it takes seconds
    except Exception as error:  # a library of another version raises OSError
        return refuse(
            ConfigError(f"PyTorch cannot be imported ({error}): pip install torch torchvision")
        )
    from fastsmooth.data import DataError
    from fastsmooth.models import ModelError
    from fastsmooth.ranks import RankLost, Ranks
    from fastsmooth.runfolder.checkpoint import CheckpointError
    from fastsmooth.runfolder.write import RunFolderError
    from fastsmooth.training.loop import Diverged, Preempted

    keep_within_quota(torch)
    refusals = (ConfigError, ModelError, DataError, CheckpointError, RunFolderError)
    live = ranks = None
    try:
        check_launch()
        device = pick_device(c.device, torch, c.precision)
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
            f"stopped by {stop} at update {live.update:,}, saved: go on with --resume --out "
            f"{live.folder.path}"
        )
    except Diverged as error:
        ended = Ending(
            DIVERGED, "diverged", str(error), "diverged", f"{error}; the last checkpoint is finite"
        )
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


def train(live) -> None:
    """The run from where it stands to its end."""
    from fastsmooth.training.modes import MODES

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
            f"compiled {live.step.compiled_graphs} graphs (training step, evaluation, "
            "measurement), the first in "
            f"{live.clock.read('compile'):.0f} s"
        )
    if live.last_epoch:
        live.progress.say(
            f"final test accuracy {live.last_epoch['test_acc']:.2%}, best {live.best_test_acc:.2%}"
        )
    if live.noise and live.noise.count:
        live.progress.say(noise_cost(live))
    if summary["bad_images"]:
        live.progress.say(f"{summary['bad_images']} images could not be read and were served black")
    live.progress.say(f"run folder {live.folder.path}")
    if live.config.dataset == "digits" and live.config.mode == "normal":
        live.progress.say(
            "next: --dataset cifar100 trains the papers' network; --plan shows a schedule; --help "
            "the rest"
        )
    live.folder.close()


def finished(out: Path) -> bool:
    return read_status(out).get("state") == "done"


if __name__ == "__main__":
    end_with(main)
