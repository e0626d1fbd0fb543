"""Times of work on a device: by CUDA events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Measured, Window

Step = Callable[[], Any]
CYCLES = 1.5e9  # of a GPU's clock a second, about
SLEEPS = (0.01, 0.04, 0.16, 0.64)  # seconds that a GPU is kept busy while steps are queued


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def seconds_of(device: torch.device, work: Step) -> float:
    """From an idle device to an idle device: whatever streams the work uses are in it, and what the
    host adds. Some 20 us of waiting are in it too, so the work should take milliseconds."""
    wait_for(device)
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = event(), event()
    begin.record()
    work()
    wait_for(device)
    end.record()
    wait_for(device)
    return begin.elapsed_time(end) / 1e3


def host_seconds(device: torch.device, step: Step, steps: int) -> float:
    """Seconds a step that the host takes, which waits for nothing: so few steps that their launches
    fit into the device's queue of some 1,000."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    took = time.perf_counter() - began
    wait_for(device)
    return took / steps


def device_seconds(device: torch.device, step: Step, steps: int) -> float:
    """Seconds a step of the device alone: it is kept busy until all steps are queued, so that it
    never waits for the host. The step's work is on the current stream.

    Raises RuntimeError where the host does not get ahead: more launches than the queue takes.
    """
    if device.type != "cuda":
        return host_seconds(device, step, steps)
    for sleep in SLEEPS:
        before, begin, end = event(), event(), event()
        wait_for(device)
        began = time.perf_counter()
        before.record()
        torch.cuda._sleep(int(sleep * CYCLES))
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        queued = time.perf_counter() - began
        wait_for(device)
        if queued < before.elapsed_time(begin) / 1e3:
            return begin.elapsed_time(end) / 1e3 / steps
    raise RuntimeError(f"the host took longer to queue {steps} steps than the device slept")


def captured(device: torch.device, step: Step, warm: int = 3) -> Step:
    """A replay of the step as a CUDA graph, which is captured after `warm` steps on another stream
    than the default one; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    wait_for(device)
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    wait_for(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    wait_for(device)
    return graph.replay


Clock = Callable[[torch.device, Step, int], float]  # seconds a step of so many


def whole(device: torch.device, step: Step, steps: int) -> float:
    """Seconds a step, host and device together, as a loop of them takes."""

    def work() -> None:
        for _ in range(steps):
            step()

    return seconds_of(device, work) / steps


def measure(
    device: torch.device,
    variants: dict[str, Step],
    clock: Clock,
    seconds: float,
    rounds: int,
    most: int,
) -> dict[str, Measured]:
    """Windows of about `seconds`, of `most` steps at the most, of all variants in turn."""
    found, steps = {}, {}
    for name, step in variants.items():
        found[name] = Measured(seconds_of(device, step))
        step()
        once = max(whole(device, step, 3), 1e-7)
        steps[name] = min(max(round(seconds / once), 1), most)
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(reversed(variants))
        for name in order:
            found[name].windows.append(Window(clock(device, variants[name], steps[name])))
    return found


class Kernel(NamedTuple):
    """What ran on a device, in microseconds of its clock."""

    name: str
    start: float
    took: float


def kernels_of(
    device: torch.device, work: Step, call: Callable[[Step], Any] = lambda function: function()
) -> list[Kernel]:
    """What the work ran on the device in order, those inside replayed graphs too; on a CPU the
    operators that it called. call(function) calls it in the thread that does the work, which is
    the one that is seen."""
    gpu = device.type == "cuda"
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    seen = profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])
    wait_for(device)
    call(seen.start)
    work()
    wait_for(device)
    call(seen.stop)
    found = [
        Kernel(e.name, e.time_range.start, e.time_range.elapsed_us())
        for e in seen.events()
        # older versions of PyTorch do not tell the ranges that programs have named
        if e.device_type == kind and not getattr(e, "is_user_annotation", False)
    ]
    return sorted(found, key=lambda kernel: kernel.start)
