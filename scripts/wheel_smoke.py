"""Run where the wheel, torch and numpy alone are installed: what must work there, and what must say why it does not.

python -I scripts/wheel_smoke.py
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# triton is not among them: CUDA builds of torch bring it.
OPTIONAL = ("polars", "optuna", "torchrec", "fbgemm_gpu", "typer", "rich", "tqdm", "matplotlib", "safetensors")


def main() -> int:
    """Exercise every registered method and the command line; raise on the first thing that is not as promised."""
    present = [name for name in OPTIONAL if find_spec(name)]
    if present:
        raise SystemExit(f"this environment proves nothing, it has {', '.join(present)}")

    import torch

    import recsys_embed as rse

    here = Path(rse.__file__).resolve()
    if not here.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"imported {here}, not the wheel in {sys.prefix}")
    if not (here.parent / "py.typed").exists():
        raise SystemExit("the wheel lacks py.typed")
    if not (here.parent / "data/presets/movielens_100k.toml").exists():
        raise SystemExit("the wheel lacks the presets of public data sets")

    ids = torch.tensor([[3, 999, 0], [3, 5, 17]])
    for method in rse.list_methods():
        # Half of what the plain table takes; the plain table itself cannot shrink.
        options = {} if method.name == "full" else {"budget": 1000 * 16 * 4 // 2}
        emb = rse.make_embedding(method.name, 1000, 16, **options)
        out = emb(ids)
        out.sum().backward()
        if out.shape != (2, 3, 16) or not torch.isfinite(out).all():
            raise SystemExit(f"{method.name}: output {tuple(out.shape)}")
        pooled = rse.make_embedding(method.name, 1000, 16, mode="sum", **options)(ids)
        if pooled.shape != (2, 16):
            raise SystemExit(f"{method.name}: pooled output {tuple(pooled.shape)}")
        if emb.footprint().serve <= 0:
            raise SystemExit(f"{method.name}: footprint {emb.footprint()}")

    schema = rse.Schema([rse.FeatureSpec(name, 1000, 16) for name in ("a", "b")])
    coll = rse.EmbeddingCollection(schema, optimizer=rse.RowwiseAdagrad(lr=0.1))
    if list(here.parent.glob("kernels/native/_native*")) and coll.backend != "native":
        raise SystemExit(f"the wheel's kernels do not run: backend {coll.backend}")
    coll(ids[:, :2]).sum().backward()

    command = Path(sys.prefix) / "bin" / "recsys-embed"
    done = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    if done.returncode != 2 or len(lines) != 1 or "pip install 'recsys-embed[train]'" not in lines[0]:
        raise SystemExit(f"recsys-embed without typer: status {done.returncode}, said {done.stderr!r}")

    names = " ".join(m.name for m in rse.list_methods())
    print(
        f"wheel: recsys-embed {rse.__version__} on Python {sys.version.split()[0]}, torch {torch.__version__}: {names}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
