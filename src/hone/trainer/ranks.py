"""The trainer's processes: one without torchrun, one per rank with it, and what they tell one another."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Ranks wait in a broadcast while rank 0 waits for rollouts, which may take long; a lost rank ends sooner, through torchrun.
COLLECTIVE_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the trainer's. Every method with more than one rank is a collective call."""

    rank: int
    num_ranks: int
    device: torch.device
    mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """One process without a process group."""
        return cls(0, 1, device)

    @classmethod
    def join(cls, device: str, *, always: bool = False) -> Self:
        """What torchrun's environment says; with `always` a single process forms a process group, too."""
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
        if num_ranks == 1 and not always:
            return cls.alone(chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        _init_process_group(num_ranks)
        return cls(
            rank=dist.get_rank(),
            num_ranks=num_ranks,
            device=chosen,
            mesh=init_device_mesh(chosen.type, (num_ranks,)),
            # Waiting on a GPU spins; what is not a tensor of the model goes over the CPU.
            control=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT),
        )

    @property
    def leads(self) -> bool:
        """Whether this rank writes metrics and talks to other processes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank; on the CPU."""
        values = values.cpu()
        if self.num_ranks > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def share(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank."""
        if self.num_ranks > 1:
            parcel = [data]
            dist.broadcast_object_list(parcel, src=0, group=self.control)
            data = parcel[0]
        assert data is not None, "rank 0 has to bring the bytes to share"
        return data

    def collect(self, facts: dict[str, int]) -> dict[str, int]:
        """What all ranks know together, on every rank; where two name the same thing, the higher rank's counts."""
        if self.num_ranks == 1:
            return facts
        gathered: list[dict[str, int]] = [{}] * self.num_ranks
        dist.all_gather_object(gathered, facts, group=self.control)
        return {name: value for one in gathered for name, value in one.items()}

    def wait_for_all(self) -> None:
        if self.num_ranks > 1:
            dist.barrier(group=self.control)

    def leave(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def _init_process_group(num_ranks: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if num_ranks == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
