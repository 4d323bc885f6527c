"""docs/datasets.md names everything that can be asked for and everything that can be answered."""

import re
from pathlib import Path

import pytest

from core.layout_names import LayoutName
from core.run_spec import DatasetPolicy
from worker.ingest.faults import RowCode
from worker.ingest.formats import ARCHIVES, COMPRESSIONS, TABLES, TEXTS

ROOT = Path(__file__).parents[4]
TEXT = (ROOT / "docs" / "datasets.md").read_text()
NAMED = set(re.findall(r"`\.?([\w-]+)`", TEXT))


@pytest.mark.parametrize("names", [LayoutName, RowCode, DatasetPolicy.model_fields,
                                   TEXTS | TABLES | ARCHIVES | COMPRESSIONS])  # fmt: skip
def test_all_names_are_described(names):
    assert not {str(name) for name in names} - NAMED


def test_all_checks_are_described(run, lines, good):
    assert not {check["check"] for check in run(lines(good(12))).report["lint"]} - NAMED


def test_layouts_are_listed_once_in_the_order_of_their_names():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| [^|]+ \|$", TEXT, re.M)
    assert rows[0] == "layout"
    assert rows[1:] == [name.value for name in LayoutName]


def test_codes_of_refused_files_are_those_of_the_source():
    sources = "".join(file.read_text() for file in (ROOT / "worker" / "ingest").glob("*.py"))
    codes = set(re.findall(r'\bcode="(\w+)"', sources)) - {"canonical_damaged"}
    assert codes
    assert not codes - NAMED
