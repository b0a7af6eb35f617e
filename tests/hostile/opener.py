"""Opens files by kind with little memory; run as a process of its own, with jobs as JSON lines on stdin."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import recsys_embed as rse
from recsys_embed.exports import verify


def _plan(path: Path) -> None:
    plan = rse.Plan.load(path)
    for target in ("serve", "train"):
        rse.memory_report(plan, schema=SCHEMA).total(target)
    rse.EmbeddingCollection(SCHEMA, plan, device="meta")


def _manifest(path: Path) -> None:
    from recsys_embed.data.manifest import read_manifest

    read_manifest(path.parent)


def _statistics(path: Path) -> None:
    from recsys_embed.planning.statistics import curves_from

    curves_from(path)


def _checkpoint(path: Path) -> None:
    from recsys_embed.exports.run_model import model_of_run

    model_of_run(path)


def _rows(path: Path) -> None:
    model: Any = rse.load(path)
    if getattr(model, "scorer", None) is None:
        raise rse.ConfigError("there are no encoders")
    model.predict({"user": ["a", "zoe"], "item": [7, None], "title": [[0.5, 1.0], None], "price": [1.0, None]})


SCHEMA = rse.Schema([rse.FeatureSpec("a", 500, 8), rse.FeatureSpec("b", 90, 8)])
OPEN: dict[str, Callable[[Path], Any]] = {
    "export": rse.load,
    "verify": verify,
    "report": rse.memory_report,
    "plan": _plan,
    "manifest": _manifest,
    "statistics": _statistics,
    "checkpoint": _checkpoint,
    "rows": _rows,
}


def outcome(kind: str, path: Path) -> str:
    """``"opened"``, ``"refused: ..."`` by the library's own error, or what else came out."""
    try:
        OPEN[kind](path)
    except rse.RecsysEmbedError as e:
        return f"refused: {type(e).__name__}: {str(e)[:300]}"
    except BaseException as e:
        import traceback

        where = traceback.extract_tb(e.__traceback__)[-1]
        return f"{type(e).__name__}: {str(e)[:200]} ({Path(where.filename).name}:{where.lineno})"
    return "opened"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    for line in sys.stdin:
        kind, path = json.loads(line)
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = outcome(kind, Path(path))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        print(json.dumps([said, time.perf_counter() - begin, grown]), flush=True)


if __name__ == "__main__":
    main()
