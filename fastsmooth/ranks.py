"""The processes of one run: those that torchrun started, or this one alone; and what they tell each
other.

Every process holds the whole model and its share of each batch. All sums go through one flat tensor
whose layout depends on the model alone: so they are added in the same order at every update, which
a run that is taken up again in the same bits needs, and gradients, BatchNorm statistics and the
loss travel together.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# keys under which a process that fails says why
FIRST_WORDS, LAST_WORDS = "fastsmooth/first", "fastsmooth/ended"


class RankLost(RuntimeError):
    """Another process of the run has ended; `words` is what it said of it: {"code", "state",
    "reason", "line"} or empty."""

    def __init__(self, words: dict[str, Any]):
        super().__init__(words.get("reason", "another process of the run was lost"))
        self.words = words


class Ranks:
    """This process's number among `world` processes; where it is alone, nothing is sent."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, local_world: int = 1):
        self.rank, self.world, self.local, self.local_world = rank, world, local, local_world
        self.leader = rank == 0
        self._vote: tuple[Tensor, dist.Work] | None = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """As torchrun's environment says; several processes meet here. CUDA tensors go over NCCL,
        others over gloo.

        Raises RankLost where the others do not come.
        """
        names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        ranks = cls(*(int(os.environ.get(name, otherwise)) for name, otherwise in names))
        if ranks.world > 1:
            on_gpu = device.type == "cuda"
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            with talking():
                dist.init_process_group(backend, device_id=device if on_gpu else None)
        return ranks

    def share(self, index: Tensor) -> Tensor:
        """This process's part of samples in order, int64 [B]: every `world`-th."""
        return index[self.rank :: self.world]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace the tensors, [...] of any shapes and one dtype, by their sums over the processes:
        the same bits everywhere. Raises RankLost."""
        if self.world > 1:
            Bucket(tensors).sum_(tensors)

    def largest_(self, tensor: Tensor) -> None:
        """Replace the tensor, [...] of any shape and dtype, by its largest values over the
        processes. Raises RankLost."""
        if self.world > 1:
            with talking():
                dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """The plain `value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with talking():
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Any) -> Any:
        """What the leader has, everywhere."""
        if self.world == 1:
            return value
        held = [value]
        with talking():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    @contextmanager
    def together(
        self, refusals: tuple[type[Exception], ...], raised: Callable[[str], Exception]
    ) -> Iterator[None]:
        """What one process refuses inside, all refuse, in the words of the first: raised(words)
        where it was another."""
        own = None
        try:
            yield
        except refusals as error:
            own = error
        said = [words for words in self.gather(str(own) if own else None) if words is not None]
        if own is not None and (self.world == 1 or said[0] == str(own)):
            raise own
        if said:
            raise raised(said[0])

    def vote(self, own: int) -> int:
        """The largest `own` that any process gave one call ago, the same everywhere at that call.

        One call late, so that nobody waits: the numbers travel beside the computation, and never
        through the device.
        """
        if self.world == 1:
            return own
        decided = 0
        with talking():
            if self._vote is not None:
                number, work = self._vote
                work.wait()
                decided = int(number)
            number = torch.tensor(own)
            self._vote = number, dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        return decided

    def leave(self, words: dict[str, Any] | None = None) -> bool:
        """End the conversation; whether it is this process that tells the user how the run ended.

        Without `words` all leave together. With them this process leaves by itself, and the others,
        who wait for it, find its words (RankLost.words); of several that leave so, the first one's
        words stay, and it is the one to tell.
        """
        if self.world == 1:
            return True
        try:
            if words is None:
                if self._vote is not None:
                    self._vote[1].wait()
                dist.barrier()
                dist.destroy_process_group()
                return self.leader
            first = store().add(FIRST_WORDS, 1) == 1
            if first:
                store().set(LAST_WORDS, json.dumps(words))
            return first
        except Exception:  # whoever else was there is gone
            return words is not None or self.leader


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


@contextmanager
def talking() -> Iterator[None]:
    """A call that fails since a process is gone ends in RankLost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise RankLost(last_words()) from error


def last_words() -> dict[str, Any]:
    """What the process that ended first said of it."""
    for _ in range(20):  # it may fail a moment before it speaks
        try:
            if store().check([LAST_WORDS]):
                return json.loads(store().get(LAST_WORDS))
        except Exception:  # no store, no words
            return {}
        time.sleep(0.05)
    return {}


class Bucket:
    """One flat tensor for tensors of the shapes, strides and one dtype of `like`, with `extra`
    places at its end."""

    def __init__(self, like: Sequence[Tensor], extra: int = 0):
        sizes = [t.numel() for t in like]
        self.flat = torch.zeros(sum(sizes) + extra, dtype=like[0].dtype, device=like[0].device)
        self.parts: list[Tensor] = []  # views of it, one for each tensor
        at = 0
        for t, size in zip(like, sizes, strict=True):
            # in the tensor's own order in memory, so that a copy is a plain one
            by_channel = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
            part = self.flat[at : at + size]
            if t.is_contiguous() or by_channel:
                self.parts.append(part.as_strided(t.shape, t.stride(), at))
            else:
                self.parts.append(part.view(t.shape))
            at += size
        self.extra = self.flat[at:]

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace the tensors, [...] each as it was said, and the places at the end, by their sums
        over the processes. Raises RankLost."""
        torch._foreach_copy_(self.parts, tensors)
        with talking():
            dist.all_reduce(self.flat)
        torch._foreach_copy_(tensors, self.parts)
