"""What is done to a run from inside, before it begins: functions that forks.start calls in the new
process."""

import contextlib
import json
import multiprocessing
import os
import resource
import select
import shutil
import signal
import sys
import threading
from pathlib import Path


def kill_in_save(point: str, number: int) -> None:
    """SIGKILL at a point of the `number`-th save."""
    from fastsmooth.runfolder import checkpoint

    begun = 0
    save, opened, fsync, renamed, unlink = (
        checkpoint.Checkpoints.save,
        os.fdopen,
        os.fsync,
        os.replace,
        Path.unlink,
    )

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, step, state):
        nonlocal begun
        begun += (step, state.get("epoch")) != self.saved
        return save(self, step, state)

    def here(path, end: str) -> bool:
        return begun == number and "ckpt-" in os.fspath(path) and os.fspath(path).endswith(end)

    def aside(descriptor: int) -> bool:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return here(path, ".tmp") and ".pt." in path

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

    def open_(descriptor, *args, **kwargs):
        file = opened(descriptor, *args, **kwargs)
        if aside(descriptor):
            if point == "temporary file open":
                die()
            if point == "half written":
                return Half(file)
        return file

    def fsync_(descriptor):
        if point == "before fsync" and aside(descriptor):
            die()
        return fsync(descriptor)

    def replace_(source, target):
        renamed(source, target)
        if point == "between the renames" and here(target, ".pt"):
            die()

    def unlink_(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        if point == "during clean-up" and here(path, ".json"):
            die()

    checkpoint.Checkpoints.save = counted
    os.fdopen, os.fsync, os.replace, Path.unlink = open_, fsync_, replace_, unlink_


def stand_in(folder: str) -> None:
    """Work in a folder, where every moment is the same second."""
    import time

    strftime = time.strftime
    time.strftime = lambda form, *given: (
        "20260101-000000" if form == "%Y%m%d-%H%M%S" else strftime(form, *given)
    )
    os.chdir(folder)


def stop_after(update: int, then: int = signal.SIGTERM) -> None:
    """A signal to this process after an update."""
    from fastsmooth.training import loop

    after = loop.Run.after_update

    def stopped(self, point):
        if self.update == update:
            os.kill(os.getpid(), then)
        after(self, point)

    loop.Run.after_update = stopped


def write_down_samples(folder: str, stop: int | None) -> None:
    """Every update's sample indices, a line each, in a file of this process; stop after update
    `stop`."""
    from fastsmooth.data.engines import resident
    from fastsmooth.training import loop

    ahead, after = resident.ResidentReader.ahead, loop.Run.after_update
    taken: list[int] = []
    file = open(Path(folder) / f"{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl", "w")  # noqa: SIM115

    def looking(self, count, dtype):
        taken[:] = self._order[int(self.cursor) :][:count].tolist()
        return ahead(self, count, dtype)

    def done(self, point):
        print(json.dumps([self.update, taken]), file=file, flush=True)
        if self.update == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, point)

    resident.ResidentReader.ahead, loop.Run.after_update = looking, done


def poison(where: str, value: float, update: int, rank: int) -> None:
    """A value that is not finite in the loss, a gradient, a weight or an input of one process at
    one update."""
    import torch

    from fastsmooth.training import step

    if int(os.environ.get("RANK", "0")) != rank:
        return
    gradient, forward = step.Step.gradient, step.Step._plain_forward
    due, taken = False, 0

    def gradient_(self, x, y, size=None):
        nonlocal due, taken
        taken += 1
        due = taken == update
        if due and where == "input":
            x = x.clone()
            x[0, 0, 0, 0] = value
        if due and where == "weight":
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = value
        found = gradient(self, x, y, size)
        due = False
        return found

    def forward_(self, x, y, autocast):
        loss, correct = forward(self, x, y, autocast)
        if due and where == "gradient":
            loss.register_hook(lambda g: g * value)
        return (loss * value if due and where == "loss" else loss), correct

    step.Step.gradient, step.Step._plain_forward = gradient_, forward_


def limit_files(size: int, after: int) -> None:
    """No file may grow beyond `size` bytes once `after` checkpoints are saved: what a full disk
    looks like."""
    from fastsmooth.runfolder import checkpoint

    save = checkpoint.Checkpoints.save
    saved = 0

    def limited(self, step, state):
        nonlocal saved
        if saved == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        saved += 1
        return save(self, step, state)

    checkpoint.Checkpoints.save = limited


def watch_resources(path: str, every: int) -> None:
    """[update, resident kB, threads, open files] a line, every so many updates."""
    from fastsmooth.training import loop

    after = loop.Run.after_update
    file = open(path, "w")  # noqa: SIM115

    def watched(self, point):
        after(self, point)
        if self.update % every == 0:
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            resident = int(status["VmRSS"].split()[0])
            row = [
                self.update,
                resident,
                threading.active_count(),
                len(os.listdir("/proc/self/fd")),
            ]
            print(json.dumps([*row, int(status["Threads"])]), file=file, flush=True)

    loop.Run.after_update = watched


def refuse_connections(path: str) -> None:
    """Write down every address that Python asks for or connects to."""
    file = open(path, "w")  # noqa: SIM115

    def hook(event: str, args: tuple) -> None:
        if event in (
            "socket.connect",
            "socket.getaddrinfo",
            "socket.gethostbyname",
            "socket.sendto",
        ):
            print(event, args[-1] if event == "socket.connect" else args, file=file, flush=True)

    sys.addaudithook(hook)


def ignore(number: int, update: int) -> None:
    """The signal is ignored from the start, as nohup does it, and comes after an update."""
    signal.signal(number, signal.SIG_IGN)
    stop_after(update, number)


def lose_reader(kind: str, update: int, then: int | None) -> None:
    """stdout and stderr lead to a pipe or a terminal, which is closed after an update; then a
    signal may come."""
    from fastsmooth import messages
    from fastsmooth.training import loop

    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.close(writer)
    os.environ["TERM"] = "xterm"  # where rich draws a bar
    enough = threading.Event()

    def read() -> None:
        while not enough.is_set():
            if select.select([reader], [], [], 0.01)[0]:
                os.read(reader, 65536)

    thread = threading.Thread(target=read)
    thread.start()
    after = loop.Run.after_update

    def lost(self, point):
        if self.update == update:
            assert (self.progress.bar is not None) == (kind == "terminal")
            enough.set()
            thread.join()
            os.close(reader)
            messages.warn("nobody reads this")
            self.progress.say("nor this")
            if then is not None:
                os.kill(os.getpid(), then)
        after(self, point)

    loop.Run.after_update = lost


def fail_at(place: str, error: str, update: int, rank: int) -> None:
    """An error that nobody foresees, on one process, the first time that the place is reached after
    an update."""
    from fastsmooth.cli import progress
    from fastsmooth.runfolder import checkpoint
    from fastsmooth.runfolder import write as runfolder
    from fastsmooth.training import loop, step

    if int(os.environ.get("RANK", "0")) != rank:
        return
    owner, name = {
        "gradient": (step.Step, "gradient"),
        "update": (step.Step, "update"),
        "data": (loop.Stream, "batches"),
        "row": (runfolder.RunFolder, "row"),
        "checkpoint": (checkpoint.Checkpoints, "save"),
        "evaluation": (step.Step, "evaluate"),
        "progress": (progress.Progress, "update"),
        "end": (loop.Run, "summary"),
    }[place]
    before = getattr(owner, name)
    done = 0
    after = loop.Run.after_update

    def counted(self, point):
        nonlocal done
        done = self.update
        after(self, point)

    def failing(*args, **kwargs):
        if done >= update:
            raise {"KeyError": KeyError, "RuntimeError": RuntimeError, "SystemExit": SystemExit}[
                error
            ]("nobody knew")
        return before(*args, **kwargs)

    loop.Run.after_update = counted
    setattr(owner, name, failing)


def harm_metrics(how: str, update: int) -> None:
    """metrics.jsonl removed, replaced or cut, or the whole run folder removed, after an update."""
    from fastsmooth.training import loop

    after = loop.Run.after_update

    def harmed(self, point):
        after(self, point)
        if self.update == update:
            path = self.folder.path / "metrics.jsonl"
            if how == "folder removed":
                shutil.rmtree(self.folder.path)
            elif how == "cut":
                os.truncate(path, 10)
            else:
                path.unlink()
                if how == "replaced":
                    path.write_text("{}\n")

    loop.Run.after_update = harmed


def limit_file_size(size: int) -> None:
    """No file, of shared memory neither, may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def harm_workers(how: str, update: int) -> None:
    """What may happen to the processes of --loader torch after an update."""
    from fastsmooth.data.engines import torchloader
    from fastsmooth.training import loop

    torchloader.LIMIT = 3.0
    after = loop.Run.after_update

    def harmed(self, point):
        after(self, point)
        if self.update != update:
            return
        if how == "too many files":
            allow_no_more_files()
        else:
            for process in multiprocessing.active_children():
                os.kill(
                    process.pid,
                    {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "bus": signal.SIGBUS}[
                        how
                    ],
                )

    loop.Run.after_update = harmed


def allow_no_more_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd")[:-1])) + 1, hard)
    )
    with contextlib.suppress(OSError):
        while os.open(os.devnull, os.O_RDONLY):
            pass


def limit_open_files(update: int) -> None:
    """No more files can be opened after an update."""
    from fastsmooth.training import loop

    after = loop.Run.after_update

    def limited(self, point):
        if self.update == update:
            allow_no_more_files()
        after(self, point)

    loop.Run.after_update = limited


def elsewhere(what: str, stop: int | None) -> None:
    """Another machine, as far as a run can tell, on which it is stopped after update `stop`."""
    import torch

    from fastsmooth import data
    from fastsmooth.kernels import native
    from fastsmooth.processors import THREADS
    from fastsmooth.training import device

    facts = device.facts

    def processors(count: int, threads: int | None = None) -> None:
        """So many, of which the user names `threads`, or leaves their number to PyTorch."""
        device.processors = lambda: count
        for name in THREADS:
            os.environ.pop(name, None)
        if threads is not None:
            os.environ[THREADS[0]] = str(threads)
            torch.set_num_threads(threads)

    {
        "more threads": lambda: torch.set_num_threads(3),
        "no compiler": lambda: setattr(native, "library", lambda: None),
        "little memory": lambda: setattr(data, "fits", lambda *_: (False, "little memory")),
        "no DALI": lambda: setattr(data.dali, "available", lambda: False),
        "DALI": lambda: setattr(device, "facts", lambda *given: facts(*given) | {"loader": "dali"}),
        "many processors": lambda: processors(64),
        "many processors, of which the user names one": lambda: processors(64, threads=1),
        "one processor": lambda: processors(1),
        "another torch": lambda: setattr(
            device, "facts", lambda *given: facts(*given) | {"torch": "1.0"}
        ),
        "a GPU": lambda: setattr(
            device, "facts", lambda *given: facts(*given) | {"device": "cuda", "gpu": "G1"}
        ),
        "the same": lambda: None,
    }[what]()
    if stop is not None:
        stop_after(stop)
