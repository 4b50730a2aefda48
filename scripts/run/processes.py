"""What the processes of a run tell each other beside their training, also from a thread of their own."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from utils.launch import PATIENCE, meeting_by_gloo


class Processes:
    """All processes of a run over a group of their own, by gloo: what a thread sends there does not get between the
    collectives of the training. Made by every process at once.

    Raises: UserError as `meeting_by_gloo`.

    Attributes:
        index, count: this process's number, and how many there are.
    """

    def __init__(self, accelerator: Accelerator):
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self._group = None
        if self.count > 1:
            with meeting_by_gloo():
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order. Every process calls this."""
        values = [value]
        if self._group:
            values *= self.count
            dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: torch.Tensor) -> None:
        """Give a CPU tensor to the first process, which waits for it by `receive`."""
        dist.send(tensor, dst=0, group=self._group)

    def receive(self, tensor: torch.Tensor, process: int) -> None:
        """Fill a CPU tensor with what a process sends."""
        dist.recv(tensor, src=process, group=self._group)
