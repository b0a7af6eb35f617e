"""The processes of a training job: process group, collectives, and a common end when one of them fails."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_embed.errors import ConfigError, RecsysEmbedError
from recsys_embed.train.metrics import BinaryMetrics, Metrics, RealMetrics

TIMEOUT = timedelta(minutes=30)
"""Timeout of collectives; long, because rank 0 computes metrics and writes files while the others wait."""
REPORT_SECONDS = 10.0
_inside: list[bool] = []
_FIRST_FAULT = "recsys_embed/first_fault"


class LostProcessError(RecsysEmbedError, RuntimeError):
    """Another process of the job is gone; the job cannot go on without it."""


def local_device(device: torch.device | str) -> torch.device:
    """This process's device: ``cuda`` means the GPU of its local rank."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def job(device: torch.device) -> Iterator[None]:
    """A process group of the processes that torchrun started; an error ends all of them with one message.

    The process that failed first raises its error. If a process was killed, the first that notices raises
    LostProcessError. The others exit silently with status 3, and torchrun ends the rest.
    """
    if _inside:
        # A trial of a search: the outer job handles errors.
        yield
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"{name} is not set; start with: torchrun --nproc-per-node N -m recsys_embed train ...")
    # TorchRec's first step calls torch's check for tracing, which logs a warning.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    _inside.append(True)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        lost = _is_lost_peer(e)
        if not _first_to_report():
            _leave(3)
        if lost:
            raise LostProcessError(
                f"a process of the job is gone (missed by rank {dist.get_rank()} of {dist.get_world_size()}: "
                f"{str(e).splitlines()[0][:160]}); the job stops. Go on from its last checkpoint with --resume"
            ) from e
        raise
    finally:
        _inside.pop()
        if started and dist.is_initialized():
            # No barrier: a group that lost a member would wait for ever.
            dist.destroy_process_group()


def _is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises when a peer is gone."""
    if isinstance(error, RecsysEmbedError):
        return False
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Socket Timeout")
    return isinstance(error, (RuntimeError, dist.DistError)) and any(sign in text for sign in signs)


def _first_to_report() -> bool:
    """Whether no other process has reported an error yet; torchrun's store outlives its workers."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(_FIRST_FAULT, 1)) == 1
    except (RuntimeError, ValueError):
        return True


def _leave(status: int) -> None:
    """Exit silently, after the reporting process had time for its message: torchrun ends all when the first exits."""
    time.sleep(REPORT_SECONDS)
    # os._exit, because threads of pending collectives would keep the interpreter alive.
    os._exit(status)


def broadcast_json(value: Any, device: torch.device) -> Any:
    """Broadcast a JSON ``value`` from rank 0 to all processes."""
    first = dist.get_rank() == 0
    text = json.dumps(value).encode() if first else b""
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, 0)
    data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if first:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(bytes(data.cpu().tolist()))


def gather_to_first(values: Tensor, device: torch.device) -> list[Tensor] | None:
    """Gather tensors ``[n]``, n of each process's own, on rank 0 (on the CPU); None on the other ranks."""
    world, first = dist.get_world_size(), dist.get_rank() == 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(values)], device=device))
    longest = max(int(n) for n in sizes)
    padded = torch.zeros(longest, dtype=values.dtype, device=device)
    padded[: len(values)] = values.to(device)
    into = [torch.zeros_like(padded) for _ in range(world)] if first else None
    dist.gather(padded, into, 0)
    if into is None:
        return None
    return [part[: int(n)].cpu() for part, n in zip(into, sizes, strict=True)]


def global_metrics(mine: BinaryMetrics | RealMetrics, device: torch.device) -> Metrics:
    """Exact metrics over the samples of all processes, equal in all of them."""
    parts = [gather_to_first(values, device) for values in mine.tensors()]
    found: list[Metrics | None] = [None]
    if dist.get_rank() == 0:
        whole = type(mine)()
        for one in zip(*parts, strict=True):
            whole.add(*one)
        found = [whole.compute()]
    dist.broadcast_object_list(found, 0, device=device)
    return cast("Metrics", found[0])
