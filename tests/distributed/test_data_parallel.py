"""Drop-ins under DistributedDataParallel and FSDP2 in two processes, against one; see data_parallel_cases.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

CASES = Path(__file__).with_name("data_parallel_cases.py")


@pytest.mark.slow
@pytest.mark.skipif(not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo")
def test_two_processes_train_as_one() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen([sys.executable, str(CASES), str(rank), port], **pipes) for rank in (0, 1)]  # type: ignore[call-overload]
    try:
        said = [p.communicate(timeout=120)[0] for p in both]
    finally:
        for p in both:
            p.kill()
    assert all(p.returncode == 0 and "done" in text for p, text in zip(both, said, strict=True)), "\n".join(said)[
        -3000:
    ]
