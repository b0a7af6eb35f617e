"""Documents name files, make targets and public names that exist."""

import re
from pathlib import Path

import pytest

import recsys_embed
from recsys_embed import extend

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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
