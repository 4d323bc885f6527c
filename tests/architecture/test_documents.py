"""What the documents name exists, and every package is described."""

import re
from pathlib import Path

import pytest

from tests.architecture.house_rules import PACKAGES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_PATH = re.compile(
    r"`((?:app|core|deploy|docs|examples|kdpo|migrations|models|objectives|selection|tests|worker)/"
    r"[\w./-]*)`"
)
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.relative_to(ROOT).as_posix())
def test_named_paths_and_links_exist(document: Path) -> None:
    text = document.read_text()
    missing = {path for path in _PATH.findall(text) if not (ROOT / path).exists()}
    missing |= {link for link in _LINK.findall(text) if not (document.parent / link).exists()}
    assert not missing, f"{document.name} names what does not exist: {sorted(missing)}"


def test_every_package_is_described() -> None:
    rows = re.findall(r"^\| `([\w/]+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    found = {
        file.parent.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    assert set(rows) == found
    assert len(rows) == len(found)


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = {file.name for file in folder.glob("[0-9]*.md")}
    index = set(re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert pages == index
    numbers = sorted(int(name[:4]) for name in pages)
    assert numbers == list(range(1, len(numbers) + 1))
    for name in pages:
        text = (folder / name).read_text()
        assert text.startswith(f"# {name[:4]}. ")
        headings = re.findall(r"^## (.*)$", text, re.M)
        assert headings == ["Context", "Decision", "Consequences", "Alternatives"], name
