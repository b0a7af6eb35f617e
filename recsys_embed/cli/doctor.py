"""``recsys-embed doctor``: installed versions and their compatibility, and available backends."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import typer

from recsys_embed.utils.plugins import GROUPS, load_plugins
from recsys_embed.utils.versions import installed_versions, pair_faults, pair_notes

_CPU_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "amx_tile")
_ARM_FLAGS = ("asimd", "sve", "sve2", "bf16", "i8mm")
_GIB = 1024**3


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> int:
    """Show versions, backends and the machine, and check that the versions fit; status 1 when they do not."""
    report = examine()
    print(json.dumps(report, indent=2) if as_json else render(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Collect the facts that ``doctor`` prints, in JSON types; ``ok`` is False when a version pair is broken."""
    faults, notes = pair_faults(), []
    torch_facts: dict[str, Any] = {}
    versions = installed_versions()
    try:
        import torch
    except (ImportError, OSError) as e:
        faults.append(f"torch cannot be imported: {e}")
    else:
        versions["torch"] = str(torch.__version__)  # names the build, which metadata of CUDA builds do not
        faults = pair_faults(torch_cuda=torch.version.cuda)
        notes = pair_notes(torch_cuda=torch.version.cuda)
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        torch_facts = {
            "cuda_build": torch.version.cuda,
            "devices": devices,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
        }
    plugins = _plugins()
    faults = [*faults, *(f"{p['what']} cannot be imported: {p['why']}" for p in plugins if not p["on"])]
    return {
        "ok": not faults,
        "python": platform.python_version(),
        "versions": versions,
        "faults": faults,
        "notes": notes,
        "backends": _backends(),
        "plugins": plugins,
        "torch": torch_facts,
        "machine": _machine(),
    }


def _backends() -> list[dict[str, Any]]:
    if importlib.util.find_spec("recsys_embed.kernels.dispatch") is None:
        return []
    from recsys_embed.kernels.dispatch import available_backends
    from recsys_embed.kernels.fbgemm import why_not

    found = [{"name": name, "on": ok, "why": why} for name, ok, why in available_backends()]
    reads = "quantised rows of exports alone, on the CPU: load(path, backend='fbgemm'); it trains no tables"
    return [*found, {"name": "fbgemm", "on": why_not() is None, "why": why_not() or reads}]


def _plugins() -> list[dict[str, Any]]:
    """Extensions of other distributions, and why each is on or off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the faults are told below
        found = [plugin for group in GROUPS for plugin in load_plugins(group)]
    return [
        {"group": p.group, "name": p.name, "on": p.fault is None, "what": str(p), "why": p.fault or ""} for p in found
    ]


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, flags = _cpu()
    total, available = _memory()
    return {
        "system": platform.platform(),
        "cpu": model or platform.processor() or platform.machine(),
        "cpu_flags": flags,
        "cores": cores,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "huge_pages": _huge_pages(),
        "memory_bytes": total,
        "memory_available_bytes": available,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> tuple[str, list[str]]:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", ""), [f for f in (*_CPU_FLAGS, *_ARM_FLAGS) if f in present]


def _huge_pages() -> str | None:
    """The kernel's transparent huge page mode, the word it shows in brackets; None where there is no such thing."""
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0] or None


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes: the machine's, or the container's limit where that is lower."""
    kib = {line.split(":")[0]: int(line.split()[1]) for line in _read("/proc/meminfo").splitlines() if " kB" in line}
    total, available = (kib[k] * 1024 if k in kib else None for k in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if total is not None and limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        available = min(available or total, total - (int(used) if used.isdigit() else 0))
    return total, available


def render(report: dict[str, Any]) -> str:
    """The facts as text, one per line.

    >>> print(render(examine()).splitlines()[0])
    recsys-embed ...
    """
    versions, torch_facts, machine = report["versions"], report["torch"], report["machine"]
    lines = [f"recsys-embed {versions['recsys-embed'] or '(source tree)'}, Python {report['python']}", "", "Versions"]
    shown = {name: v for name, v in versions.items() if name != "recsys-embed"}
    lines += [f"  {name:<15} {version or '-'}" for name, version in shown.items()]
    if report["backends"]:
        lines += ["", "Backends"]
        lines += [f"  {b['name']:<15} {'on ' if b['on'] else 'off'}  {b['why']}".rstrip() for b in report["backends"]]
    if report["plugins"]:
        lines += ["", "Plugins"]
        lines += [
            f"  {p['name']:<15} {'on ' if p['on'] else 'off'}  {p['group']}: {p['what']}" for p in report["plugins"]
        ]
    lines += ["", "Machine", f"  {'system':<15} {machine['system']}", f"  {'cpu':<15} {machine['cpu']}"]
    lines += [f"  {'cpu features':<15} {' '.join(machine['cpu_flags']) or '-'}"]
    threads = f"{machine['cores']} cores"
    if torch_facts:
        threads += f", torch uses {torch_facts['threads']} threads and {torch_facts['cpu_capability']} code"
    if machine["omp_num_threads"]:
        threads += f" (OMP_NUM_THREADS={machine['omp_num_threads']})"
    lines += [
        f"  {'threads':<15} {threads}",
        f"  {'huge pages':<15} {machine['huge_pages'] or 'not offered by this system'}",
    ]
    if machine["memory_bytes"]:
        free = (machine["memory_available_bytes"] or 0) / _GIB
        lines += [f"  {'memory':<15} {machine['memory_bytes'] / _GIB:.1f} GiB, {free:.1f} GiB available"]
    if torch_facts:
        gpus = ", ".join(torch_facts["devices"]) or "no device found"
        cuda = torch_facts["cuda_build"]
        lines += [f"  {'cuda':<15} " + (f"{cuda}: {gpus}" if cuda else "torch is a CPU build")]
    lines.append("")
    lines += [f"note: {n}" for n in report["notes"]] + [f"broken: {f}" for f in report["faults"]]
    lines.append("All version pairs fit." if report["ok"] else "Mend the lines that say broken, then run doctor again.")
    return "\n".join(lines)
