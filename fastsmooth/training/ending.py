"""How a run ends: what is closed, what is said, and which exit code it has."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsmooth.cli.config import Config
from fastsmooth.messages import DONE, INTERRUPTED, PREEMPTED, failure, on_stop, tell

if TYPE_CHECKING:
    from fastsmooth.ranks import Ranks
    from fastsmooth.training.loop import Run  # imports torch, and signals are heeded before that


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended, as its exit code, status.json and, where something was wrong, a line on
    stderr say."""

    code: int
    state: str
    reason: str = ""
    kind: str = ""  # of the line: error or diverged
    line: str = ""


OUT_OF_TIME = 254  # a reason to stop, beside the numbers of signals
GONE = "another process of the run was lost"
LOST = Ending(PREEMPTED, "preempted", GONE, "error", f"{GONE}: start again with --resume")


def failed(error: BaseException, run: Run | None) -> Ending:
    """The ending of a run that the system or an error of ours or of a library stopped."""
    if run is None:
        code, line = failure(error)
        return Ending(code, "failed", line, "error", line)
    rank = run.ranks.rank
    code, line = failure(
        error, run.folder.path, f"traceback-{rank}.txt" if rank else "traceback.txt"
    )
    with contextlib.suppress(Exception):
        run.stream.close()  # frees open files, of which there may be none left
    try:
        steps = run.checkpoints.steps()
        from_where = (
            f"the checkpoint of update {steps[-1]:,}"
            if steps
            else "the beginning: there is no checkpoint yet"
        )
    except OSError:
        from_where = "the newest checkpoint"
    said = (
        f"{line}; this was at update {run.update:,}, --resume --out {run.folder.path} goes on "
        f"from {from_where}"
    )
    return Ending(code, "failed", line, "error", said)


def still_there(run: Run | None) -> str:
    """What a run that has diverged leaves to go on from, in words after a semicolon."""
    with contextlib.suppress(OSError):
        if run is not None and run.checkpoints.steps():
            return "; the last checkpoint is finite"
    return ""


def report(run: Run, seconds: float) -> None:
    """Write and say what came out of a run that has reached its end."""
    run.finish()
    run.progress.close()
    run.folder.sync()
    summary = run.summary() | {"seconds": round(seconds, 2)}
    summary["images_per_second"] = run.last_epoch.get("images_per_second")
    run.folder.write("summary.json", summary)
    early = ended_early(run)
    run.folder.status("done", early, run.update)
    run.trackers.finish(summary, DONE)
    say = run.progress.say
    if run.step.compile:
        say(
            f"compiled {run.step.compiled_graphs} graphs (training step, evaluation, measurement), "
            f"the first in {run.clock.read('compile'):.0f} s"
        )
    if run.graphs.captured:
        say(
            f"captured {run.graphs.captured} batch sizes as CUDA graphs in "
            f"{run.clock.read('capture'):.1f} s"
        )
    for line in accuracies(run, run.last_epoch) if run.last_epoch else []:
        say(line)
    if early:
        say(early)
    for instrument in run.instruments:
        for line in instrument.conclusion(run):
            say(line)
    if summary["bad_images"]:
        say(f"{summary['bad_images']} images could not be read and were served black")
    say(f"run folder {run.folder.path}")
    if run.config.dataset == "digits" and run.config.mode == "normal":
        say(
            "next: --dataset cifar100 trains the papers' network; --plan shows a schedule; --help "
            "the rest"
        )
    run.folder.close()


def accuracies(run: Run, last: dict[str, Any]) -> list[str]:
    """What the tests after the last epoch, whose row `last` is, and before said."""
    lines = [f"final test accuracy {last['test_acc']:.2%}, best {run.best_test_acc:.2%}"]
    if "test_top5" in last:
        lines[0] += f"; within the five likeliest {last['test_top5']:.2%} in the end"
    if "ema_test_acc" in last:
        line = f"of the averaged weights (--ema) {last['ema_test_acc']:.2%}"
        lines.append(f"{line}, best {run.best_ema_test_acc:.2%}")
        if "ema_test_top5" in last:
            lines[1] += f"; within the five likeliest {last['ema_test_top5']:.2%} in the end"
    return lines


def ended_early(run: Run) -> str:
    """Why a run ended before its last epoch by --patience, in words; empty where it did not."""
    if not run.out_of_patience() or run.epoch == run.config.epochs or run.best_epoch is None:
        return ""
    patience = run.config.patience
    return (
        f"no better test accuracy in {patience} epoch{'s' * (patience != 1)}: ended after epoch "
        f"{run.epoch} of {run.config.epochs}, the best was after epoch {run.best_epoch + 1}"
    )


def conclude(ended: Ending, run: Run | None, ranks: Ranks | None) -> None:
    """Close what is open and say how the run ended; never raises."""
    if run is not None:
        # graphs before the processes' group, whose exchanges they may hold
        steps = [lambda: run.stream.close(), lambda: run.graphs.drop()]
        if ended.code != DONE:
            steps += [lambda: run.progress.close()]
            # a folder that was not gone on with stays as it was
            if run.begun or not run.config.resume:
                steps += [lambda: run.folder.status(ended.state, ended.reason, run.update)]
            steps += [lambda: run.trackers.finish({}, 1), lambda: run.folder.close()]
        for step in steps:
            # what failed once may fail again; the exit code says it
            with contextlib.suppress(Exception):
                step()
    if ranks is None:
        tells = os.environ.get("LOCAL_RANK", "0") == "0"
    else:
        # what one process alone met, the others learn from its last words
        alone = ended.state == "failed" or ended == LOST
        tells = ranks.leave(dataclasses.asdict(ended) if alone else None)
    if ended.line and tells:
        tell(ended.kind, ended.line)


# PyTorch's words where memory ran out but the error is of no kind of its own; the second are
# oneDNN's, for a convolution
NO_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def ran_out_of_memory(error: BaseException, torch: Any) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)


def out_of_memory(error: BaseException, run: Run | None, c: Config, torch: Any) -> str | None:
    """What to do about memory that ran out; None for another error."""
    if not ran_out_of_memory(error, torch):
        return None
    batch = run.stream.batch_size or c.batch_size if run is not None else c.batch_size
    gpu = isinstance(error, torch.OutOfMemoryError)
    line = f"out of memory {'on the GPU' if gpu else 'in main memory'} at batch {batch}"
    together = 1 if run is None else run.config.samples_at_once or batch
    if c.micro_batch == "auto" and together > 1:
        return (
            f"{line}, of which {together} samples together did fit before the run: give "
            f"--micro-batch {together // 2}, with --resume too, or lower --batchsize"
        )
    return (
        f"{line}: --micro-batch N computes the same batch N samples at a time, on a GPU "
        "--micro-batch auto finds how many fit; or lower --batchsize"
    )


def watch(c: Config) -> Callable[[], int]:
    """A function that says whether to stop: the number of a signal that has come, OUT_OF_TIME after
    --max-time, or 0."""
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        received.append(number)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            # a second Ctrl-C leaves at once
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))

    on_stop(on_signal)
    deadline = time.monotonic() + c.max_time if c.max_time else None

    def asked() -> int:
        if received:
            return received[0]
        return OUT_OF_TIME if deadline and time.monotonic() > deadline else 0

    return asked
