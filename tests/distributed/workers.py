"""Processes that stay in one gloo group and run cases one after another, so that tests start them once."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing as mp
import os
import pickle
import socket
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

SIZES = (2, 4)
STUCK = 120
CASES = "tests.distributed.cases"


def _work(rank: int, world: int, port: int, pipe: Connection) -> None:
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    groups = {n: dist.new_group(list(range(n))) for n in SIZES}
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        module, name, size, options = order
        faulthandler.dump_traceback_later(STUCK)  # where a process waits that never answers
        try:
            case = getattr(importlib.import_module(module), name)
            # Pickled here: torch would hand tensors over in shared memory, which outlives no killed process.
            pipe.send_bytes(pickle.dumps((True, case(groups[size], rank, size, **options))))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Workers:
    """``world`` processes; :meth:`run` has the first 2 or 4 of them run a function of ``cases.py``.

    After a failure the others may wait for a process that is no longer there, so all are ended and started anew.
    """

    def __init__(self, world: int = 4) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torchrec", "recsys_embed.sharding"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, port, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        for pipe in self.pipes:
            if not pipe.poll(150):
                raise TimeoutError("the workers did not start within 150 s")
            pipe.recv()

    def run(self, case: str, size: int = 2, timeout: float = 150, module: str = CASES, **options: Any) -> list[Any]:
        """What ``case(group, rank, size, **options)`` returns on each of ``size`` ranks."""
        if not self.processes:
            self.start()
        ranks = range(size)
        for rank in ranks:
            self.pipes[rank].send((module, case, size, options))
        results, faults, end = [], [], time.monotonic() + timeout
        waiting = {rank: self.pipes[rank] for rank in ranks}
        while waiting and time.monotonic() < end and not faults:
            for rank, pipe in list(waiting.items()):
                if pipe.poll(0.01):
                    ok, value = pickle.loads(pipe.recv_bytes())
                    (results if ok else faults).append((rank, value))
                    del waiting[rank]
        if faults or waiting:
            self.end()
            lines = [f"rank {rank}:\n{text}" for rank, text in faults] or [f"ranks {list(waiting)} did not answer"]
            raise AssertionError("\n".join(lines))
        return [value for _, value in sorted(results, key=lambda pair: pair[0])]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []
