"""Documents name files, make targets and public names that exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import recsys_embed
from recsys_embed import extend

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if "```python" in p.read_text(encoding="utf-8")]
PLACES = [ROOT, ROOT / "recsys_embed"]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def text(request: pytest.FixtureRequest) -> str:
    return request.param.read_text(encoding="utf-8")


def test_links_lead_somewhere(request: pytest.FixtureRequest, text: str) -> None:
    folder = request.node.callspec.params["text"].parent
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    assert [t for t in targets if t and not (folder / t).exists()] == []


def test_files_named_in_text_exist(text: str) -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|inl|h|cpp|toml|md))?)`", text))
    named |= set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|inl|h|cpp))`", text))
    assert sorted(n for n in named if not any((place / n).exists() for place in PLACES)) == []


def test_make_targets_exist(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [
        t
        for t in set(re.findall(r"`make ([a-z-]+)", text))
        if not re.search(rf"^[a-z -]*\b{t}\b[a-z -]*:", makefile, re.M)
    ] == []


def test_classes_named_in_recipes_are_stable_names() -> None:
    """A recipe needs nothing that ``recsys_embed.extend`` does not offer."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    classes = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][A-Za-z]*)+)`", text)) - {
        "DeprecationWarning",
        "TwoWordsConfig",
        "TwoWordsEmbedding",
    }
    offered = {*extend.__all__, *recsys_embed.__all__}
    assert sorted(classes - offered) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, page.name, "exec"), {"__name__": "page"})
    assert out.getvalue().splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", source, re.M)
