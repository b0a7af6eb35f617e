"""Write the README's table of methods from the registry, or check that it is up to date.

.venv/bin/python scripts/readme_methods.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def table() -> str:
    """The table as Markdown: key, class, what it does (first sentence of the class docstring), paper."""
    sys.path.insert(0, str(ROOT))
    import recsys_embed as rse

    rows = ["| key | class | what it stores | source |", "| --- | --- | --- | --- |"]
    for method in rse.list_methods():
        summary = inspect.cleandoc(method.embedding_cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        sentence = re.split(r"(?<=[.])\s", summary)[0].rstrip(".").replace("``", "`").replace("|", r"\|")
        paper = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", method.paper)
        rows.append(f"| `{method.name}` | `{method.embedding_cls.__name__}` | {sentence} | {paper} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """``text`` with what stands between the markers replaced by the table."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name} lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    """Write the table; with ``--check`` only compare, with status 1 when it differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the table is out of date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if new == text:
        print("README.md: the table of methods is up to date")
    elif check:
        print("README.md: the table of methods is out of date; run scripts/readme_methods.py", file=sys.stderr)
        return 1
    else:
        README.write_text(new, encoding="utf-8")
        print("README.md: table of methods written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
