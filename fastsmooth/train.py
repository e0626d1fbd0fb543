"""Train or measure one run: python -m fastsmooth.train [flags]

The whole path from top to bottom: flags, plan, build, loop, ending.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fastsmooth import __version__
from fastsmooth.cli import check_data, doctor
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
from fastsmooth.training.ending import (
    LOST,
    Ending,
    conclude,
    failed,
    out_of_memory,
    report,
    still_there,
    watch,
)
from fastsmooth.training.printed import print_plan


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code. A failure is a line on stderr, never a traceback."""
    return exit_code(lambda: carry_out(sys.argv[1:] if argv is None else argv))


def carry_out(argv: list[str]) -> int:
    try:
        request = parsing.parse(argv)
        if request.help:
            show(*parsing.parser().page(request.help).splitlines())
        elif request.version:
            show(f"fastsmooth {__version__}")
        elif request.plan:
            print_plan(parsing.configured(request.given), request.json, request.html)
        elif request.doctor:
            doctor.examine(parsing.configured(request.given))
        elif request.check_data:
            check_data.check(parsing.configured(request.given))
        else:
            resume = request.given.get("resume", False)
            configured = parsing.resumed if resume else parsing.configured
            return carry_through(configured(request.given))
        return DONE
    except ConfigError as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    # of several processes that say the same, the first of each machine says it
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell("error", error)
    return BAD_INPUT


def carry_through(c: Config) -> int:
    """Do the run that `c` describes; the exit code."""
    if c.resume and c.out and finished(Path(c.out)):
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
    from fastsmooth.ranks import RankLost, Ranks
    from fastsmooth.training.build import REFUSALS, begin, prepare
    from fastsmooth.training.device import own_stream
    from fastsmooth.training.loop import Diverged, Preempted, train

    keep_within_quota(torch)
    run = ranks = None
    try:
        check_launch()
        device = pick_device(c.device, torch, c.precision)
        ranks = Ranks.join(device)
        with own_stream(device):
            run, state, decided = prepare(c, device, ranks)
            run.stop_asked = asked
            begin(run, state, decided)
            started = time.perf_counter()
            train(run)
            report(run, time.perf_counter() - started)
        ended = Ending(DONE, "done")
    except REFUSALS as error:
        ended = Ending(BAD_INPUT, "failed", str(error), "error", one_line(error))
    except Preempted as stop:
        assert run is not None  # only its updates raise it
        ended = Ending(PREEMPTED, "preempted", str(stop))
        run.progress.say(
            f"stopped by {stop} at update {run.update:,}, saved: go on with --resume --out "
            f"{run.folder.path}"
        )
    except Diverged as error:
        ended = Ending(DIVERGED, "diverged", str(error), "diverged", f"{error}{still_there(run)}")
    except RankLost as lost:
        ended = Ending(**lost.words) if lost.words else LOST
    except KeyboardInterrupt:
        ended = Ending(INTERRUPTED, "failed", "interrupted")
    except (Exception, SystemExit) as error:  # a library may mean to end the process
        line = out_of_memory(error, run, c, torch)
        if line is not None:
            ended = Ending(BAD_INPUT, "failed", "out of memory", "error", line)
        else:
            ended = failed(error, run)
    conclude(ended, run, ranks)
    return ended.code


def finished(out: Path) -> bool:
    return read_status(out).get("state") == "done"


if __name__ == "__main__":
    end_with(main)
