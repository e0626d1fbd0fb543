"""What is done to a run from inside, before it begins: functions that forks.start calls in the new process."""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path


def kill_in_save(point: str, number: int) -> None:
    """SIGKILL at a point of the `number`-th save."""
    from fastsmooth import checkpoint

    begun = 0
    save, opened, fsync, renamed, unlink = checkpoint.Checkpoints.save, Path.open, os.fsync, os.replace, Path.unlink

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, step, state):
        nonlocal begun
        begun += (step, state.get("epoch")) != self.saved
        return save(self, step, state)

    def here(path, end: str) -> bool:
        return begun == number and "ckpt-" in os.fspath(path) and os.fspath(path).endswith(end)

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

    def open_(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if here(path, ".pt.tmp"):
            if point == "temporary file open":
                die()
            if point == "half written":
                return Half(file)
        return file

    def fsync_(descriptor):
        if point == "before fsync" and begun == number and ".pt.tmp" in os.readlink(f"/proc/self/fd/{descriptor}"):
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
    Path.open, os.fsync, os.replace, Path.unlink = open_, fsync_, replace_, unlink_


def stop_after(update: int, then: int = signal.SIGTERM) -> None:
    """A signal to this process after an update."""
    from fastsmooth import modes

    after = modes.Run.after_update

    def stopped(self, point):
        if self.update == update:
            os.kill(os.getpid(), then)
        after(self, point)

    modes.Run.after_update = stopped


def write_down_samples(folder: str, stop: int | None) -> None:
    """Every update's sample indices, a line each, in a file of this process; stop after update `stop`."""
    from fastsmooth import modes
    from fastsmooth.data import resident

    take, after = resident.ResidentReader.take, modes.Run.after_update
    taken: list[int] = []
    file = open(Path(folder) / f"{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl", "w")  # noqa: SIM115

    def taking(self, count):
        batch = take(self, count)
        taken[:] = self._index[self._at - count : self._at].tolist()
        return batch

    def done(self, point):
        print(json.dumps([self.update, taken]), file=file, flush=True)
        if self.update == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, point)

    resident.ResidentReader.take, modes.Run.after_update = taking, done


def poison(where: str, value: float, update: int, rank: int) -> None:
    """A value that is not finite in the loss, a gradient, a weight or an input of one process at one update."""
    import torch

    from fastsmooth import modes, step

    if int(os.environ.get("RANK", "0")) != rank:
        return
    gradient, forward = modes.Run.gradient, step.Step._plain_forward
    due = False

    def gradient_(self, x, y):
        nonlocal due
        due = self.update + 1 == update
        if due and where == "input":
            x = x.clone()
            x[0, 0, 0, 0] = value
        if due and where == "weight":
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = value
        gradient(self, x, y)
        due = False

    def forward_(self, x, y, autocast):
        loss, correct = forward(self, x, y, autocast)
        if due and where == "gradient":
            loss.register_hook(lambda g: g * value)
        return (loss * value if due and where == "loss" else loss), correct

    modes.Run.gradient, step.Step._plain_forward = gradient_, forward_


def limit_files(size: int, after: int) -> None:
    """No file may grow beyond `size` bytes once `after` checkpoints are saved: what a full disk looks like."""
    from fastsmooth import checkpoint

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
    from fastsmooth import modes

    after = modes.Run.after_update
    file = open(path, "w")  # noqa: SIM115

    def watched(self, point):
        after(self, point)
        if self.update % every == 0:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            resident = int(status["VmRSS"].split()[0])
            row = [self.update, resident, threading.active_count(), len(os.listdir("/proc/self/fd"))]
            print(json.dumps([*row, int(status["Threads"])]), file=file, flush=True)

    modes.Run.after_update = watched


def refuse_connections(path: str) -> None:
    """Write down every address that Python asks for or connects to."""
    file = open(path, "w")  # noqa: SIM115

    def hook(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            print(event, args[-1] if event == "socket.connect" else args, file=file, flush=True)

    sys.addaudithook(hook)


def elsewhere(what: str, stop: int | None) -> None:
    """Another machine, as far as a run can tell, on which it is stopped after update `stop`."""
    import torch

    from fastsmooth import data, machine
    from fastsmooth.kernels import native

    facts = machine.facts
    {
        "more threads": lambda: torch.set_num_threads(3),
        "no compiler": lambda: setattr(native, "library", lambda: None),
        "little memory": lambda: setattr(data, "fits", lambda *_: (False, "little memory")),
        "no DALI": lambda: setattr(data.dali, "available", lambda: False),
        "DALI": lambda: setattr(machine, "facts", lambda *given: facts(*given) | {"loader": "dali"}),
        "many processors": lambda: setattr(machine, "processors", lambda: 64),
        "one processor": lambda: setattr(machine, "processors", lambda: 1),
        "another torch": lambda: setattr(machine, "facts", lambda *given: facts(*given) | {"torch": "1.0"}),
        "a GPU": lambda: setattr(machine, "facts", lambda *given: facts(*given) | {"device": "cuda", "gpu": "G1"}),
        "the same": lambda: None,
    }[what]()
    if stop is not None:
        stop_after(stop)
