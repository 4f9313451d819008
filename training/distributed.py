"""One process or many: what `torchrun` sets, read once."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the process group that `torchrun` announces (NCCL on CUDA, gloo on the CPU), or be alone."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield World(rank=0, size=1, device=device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def same_everywhere(numbers: Sequence[int], world: World) -> bool:
    """Whether every process gave the same numbers; all have to ask."""
    if world.size == 1:
        return True
    least = torch.tensor(numbers, device=world.device)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool((least == most).all())
