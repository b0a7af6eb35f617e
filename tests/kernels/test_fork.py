"""Processes that were forked off after their parent computed: a lookup and a step answer, with the parent's bits."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import os, signal, time, torch
{before}
torch.set_num_threads(2)
torch.ones(2000, 2000).mul(2)  # threads exist, as in any parent that has computed
{parent}
pid = os.fork()
if pid == 0:
    {child}
    os._exit(0)
end, done = time.time() + 30, 0
while time.time() < end and not done:
    done, status = os.waitpid(pid, os.WNOHANG)
    time.sleep(0.02)
if not done:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print("answered" if done and status == 0 else "failed" if done else "hung")
"""
# Tensors are small enough for torch itself to run in one thread, which would hang in the child, too.
MAKE = """
import recsys_embed as rse
schema = rse.Schema([rse.FeatureSpec(f"f{k}", 200, 4) for k in range(26)])
table, collection = rse.HashEmbedding(500, 4, num_buckets=100), rse.EmbeddingCollection(schema)
ids, columns = torch.randint(0, 500, (4096,)), torch.randint(0, 200, (300, 26))
def run():
    loss = table(ids).sum() + collection(columns).sum()
    loss.backward()
    return loss.item(), table.weight.grad.sum().item()
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("before", "parent", "child"),
    [
        (MAKE, "wanted = run(); table.zero_grad()", "assert run() == wanted"),
        (MAKE, "", "run()"),
        ("import recsys_embed", "", "exec(MAKE); run()"),
    ],
    ids=["the parent looked up", "the child looks up first", "the child builds"],
)
def test_a_forked_child_answers(before: str, parent: str, child: str) -> None:
    script = f"MAKE = {MAKE!r}\n" + CHILD.format(before=before, parent=parent, child=child)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "answered"
