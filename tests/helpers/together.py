"""A group of processes, played by threads: what each adds up, all get, and a test needs no processes of its own."""

from __future__ import annotations

import threading

import torch

from layerpeft.integrations import distributed


class Group:
    """`size` processes, played by threads that add up with each other."""

    def __init__(self, monkeypatch, size: int) -> None:
        self.size, self.mine = size, threading.local()
        self.given: list[torch.Tensor] = [torch.zeros(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)
        monkeypatch.setattr(distributed, "world_size", lambda: size)
        monkeypatch.setattr(distributed, "rank", lambda: self.mine.rank)
        monkeypatch.setattr(distributed, "add_up", self.add)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        self.given[self.mine.rank] = tensor
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        self.barrier.wait()
        return total

    def run(self, function) -> list:
        found: list = [None] * self.size

        def play(rank: int) -> None:
            self.mine.rank = rank
            found[rank] = function(rank)

        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found
