"""The reference of the door to sandboxes: nothing is missing, nothing is unexplained, and the page is what the code says."""

from pathlib import Path

import pytest

from hone.config.public_names import Entry
from hone.sandbox import client
from hone.sandbox.reference import PAGE, PARTS

ROOT = Path(__file__).parents[2]
EVERYTHING = [entry for part in PARTS for entry in PAGE.entries(part)]


def test_every_name_of_the_door_is_there_once() -> None:
    names = [entry.name for entry in EVERYTHING]
    assert len(names) == len(set(names))
    assert set(client.__all__) == {name for name in names if "." not in name}


@pytest.mark.parametrize("entry", EVERYTHING, ids=lambda entry: entry.name)
def test_every_name_and_what_it_has_is_explained(entry: Entry) -> None:
    assert entry.doc, "it needs a docstring"
    assert [member.signature for member in entry.members if not member.doc] == []


def test_no_line_is_so_long_that_the_formatter_breaks_it() -> None:
    assert [line for entry in EVERYTHING for line in entry.code.splitlines() if len(line) > 120] == []


def test_the_page_in_the_documentation_is_up_to_date() -> None:
    assert (ROOT / "docs" / "reference" / PAGE.name).read_text() == PAGE.text(), "run `make docs`"
