"""Runs of fastsmooth.train as processes that start in milliseconds, and what shows that two runs
were the same."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from rows import read_rows

from fastsmooth.runfolder.read import read_status
from fastsmooth.runfolder.write import TIMES

# One warm process that has imported everything and computed nothing; its forks start in
# milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fastsmooth.train", "fastsmooth.training.modes", "fastsmooth.models", "torchvision", "forks"]
)
STORES: list = []


def run_main(argv: list[str], log: str, environment: dict[str, str], prepare) -> None:
    """What the fork does: one command line, its output in `log`, after prepare()."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from fastsmooth.messages import STOPPING
    from fastsmooth.train import main

    # whoever started the tests may have ignored some, which a run would go on to ignore
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)

    # threads that wait for each other crawl when the cores are shared with other work
    torch.set_num_threads(1)
    # so that DataLoader workers see their parent die
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    sys.exit(main(argv))


def start(argv: list[str], out: Path, prepare=None, environment: dict[str, str] | None = None):
    """A process that does `argv` in the run folder `out`; `prepare`, a function of a module, is
    called in it first."""
    line = [*argv, "--out", str(out)]
    process = SERVER.Process(target=run_main, args=(line, f"{out}.log", environment or {}, prepare))
    process.start()
    return process


def start_ranks(argv: list[str], out: Path, world: int, prepare=None, named: bool = True) -> list:
    """The same in `world` processes that share the run, as torchrun would start them; each has a
    log of its own.

    Without `named` the run finds a name for itself.
    """
    # kept by the test, as torchrun's agent does, so that it outlives the processes that meet there
    STORES.append(
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    )
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(STORES[-1].port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = f"{out}.log" if rank == 0 else f"{out}.{rank}.log"
        line = [*argv, "--out", str(out)] if named else argv
        processes.append(SERVER.Process(target=run_main, args=(line, log, common | place, prepare)))
        processes[-1].start()
    return processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def codes(processes: list, seconds: float = 120) -> list[int | None]:
    """The exit codes, None for what still runs after `seconds`; that is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return found


def logs(out: Path) -> str:
    """What the processes of a run printed, the first one's first."""
    return "".join(path.read_text() for path in sorted(out.parent.glob(f"{out.name}*.log")))


def finish(argv: list[str], out: Path, world: int = 1, prepare=None) -> float:
    """Run to the end; the seconds it took after the run folder was there."""
    processes = (
        [start(argv, out, prepare)] if world == 1 else start_ranks(argv, out, world, prepare)
    )
    wait_for(out / "config.json")
    began = time.monotonic()
    assert codes(processes) == [0] * world, logs(out)
    return time.monotonic() - began


def wait_for(path: Path) -> None:
    """Until the file is there and holds something."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size == 0:
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def saved_steps(out: Path) -> list[int]:
    return sorted(int(p.stem.split("-")[1]) for p in (out / "checkpoints").glob("ckpt-*.json"))


def final_state(out: Path) -> dict:
    return torch.load(out / "checkpoints" / f"ckpt-{saved_steps(out)[-1]}.pt", weights_only=True)


def assert_same_bits(a, b, where="state") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in TIMES | {"epoch_seconds", "metrics_bytes"}:
                assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_run(out: Path, undisturbed: Path) -> None:
    """Parameters, buffers, optimizer, random state, rows and the files of weights are equal, and
    nothing is left lying about."""
    assert without_times(read_rows(out)) == without_times(read_rows(undisturbed))
    assert_same_bits(final_state(out), final_state(undisturbed))
    for name in ("critical.json", "noise.json"):
        assert (out / name).exists() == (undisturbed / name).exists()
        if (out / name).exists():
            a, b = (json.loads((folder / name).read_text()) for folder in (out, undisturbed))
            assert_same_bits(a, b, name)
    weights = [
        {p.name: p.read_bytes() for p in f.glob("*.safetensors")} for f in (out, undisturbed)
    ]
    assert weights[0] == weights[1] and "last.safetensors" in weights[0]
    assert read_status(out)["state"] == "done"
    assert not [p for p in out.rglob("*.tmp") if "wandb" not in str(p)]
