"""The page of sandboxes that ended: numbers from accounts, and no text of theirs that becomes markup."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hone.sandbox.node.accounts import Accounts, EndedSandbox
from hone.sandbox.node.lifecycle import End
from hone.schema.sandboxes import SandboxUsage
from hone.studio.sandboxes import (
    HEIGHT,
    MAX_ROWS,
    WIDTH,
    alive_curve,
    endings_of,
    facts_of,
    grouped,
    read_accounts,
    ready_curves,
    render,
    write_sandboxes_page,
)


def ended(number=0, *, asked=100.0, lived=10.0, owner="me", end=End.CLOSED, ready=0.5, cpu=1.0, **names):
    given = {"image": "python", "rollout": "g/0", "reason": "it is closed"} | names
    usage = SandboxUsage(cpu_seconds=cpu, peak_memory_bytes=1_000_000, output_bytes=10, num_calls=2)
    return EndedSandbox(
        f"n.1.{number}", owner, asked=asked, ended=asked + lived, ready_seconds=ready, end=end, usage=usage, **given
    )


def test_sums_are_by_owner_with_the_heaviest_first():
    groups = grouped(
        [ended(owner="a", cpu=1.0), ended(owner="b", cpu=3.0), ended(owner="a", cpu=1.0)], lambda one: one.owner
    )
    assert [(one.name, one.num_sandboxes, one.num_calls, one.share) for one in groups] == [
        ("b", 1, 2, 0.6),
        ("a", 2, 4, 0.4),
    ]


def test_of_many_owners_the_rest_is_together():
    groups = grouped([ended(owner=f"o{number}", cpu=100.0 - number) for number in range(30)], lambda one: one.owner)
    assert len(groups) == MAX_ROWS + 1
    assert (groups[-1].name, groups[-1].num_sandboxes) == ("10 others", 10)
    assert sum(one.share for one in groups) == pytest.approx(1.0)


def test_facts_count_trouble_and_the_most_at_once():
    facts = dict(facts_of([ended(asked=0.0), ended(asked=5.0), ended(asked=50.0, end=End.LOST)]))
    assert facts["sandboxes"] == "3"
    assert facts["at once, at most"] == "2"
    assert facts["ended by trouble"] == "1 (33.3%)"
    assert facts["ready after, median"] == "500 ms"


def test_reasons_are_told_of_ends_that_nobody_asked_for():
    found = endings_of([ended(), ended(end=End.LOST, reason="agent gone"), ended(end=End.LOST, reason="agent gone")])
    assert [(one.end, one.count, one.reasons) for one in found] == [
        ("lost", 2, [("agent gone", 2)]),
        ("closed", 1, []),
    ]


@settings(deadline=None)
@example([(1.0, 0.0, None)])
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e3) | st.none()), min_size=1))
def test_curves_stay_in_their_picture(times):
    accounts = [ended(asked=asked, lived=lived, ready=ready) for asked, lived, ready in times]
    begin, end = min(one.asked for one in accounts), max(one.ended for one in accounts)
    for curve in (alive_curve(accounts, begin, end), *ready_curves(accounts, begin, end)):
        for x, y in re.findall(r"([\d.-]+),([\d.-]+)", curve.points):
            assert -0.1 <= float(x) <= WIDTH + 0.1
            assert -0.1 <= float(y) <= HEIGHT + 0.1
    assert "<polygon" in render(accounts)


def test_names_of_others_are_text_on_the_page():
    evil = "<script>alert(1)</script>"
    page = render([ended(owner=evil, image=evil, rollout=evil, end=End.LOST, reason=evil)])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def test_accounts_of_several_nodes_and_full_files_are_read_together(tmp_path):
    for name in ("one", "two"):
        kept = Accounts(tmp_path / name)
        kept.add(ended(1, owner=name, ready=None))
        kept.close()
    (tmp_path / "one" / "sandboxes.jsonl").rename(tmp_path / "one" / "sandboxes.jsonl.1")
    with (tmp_path / "two" / "sandboxes.jsonl").open("a") as file:
        file.write('{"sandbox_id": "n.1')  # the node was killed
    found = read_accounts([tmp_path / "one", tmp_path / "two"])
    assert sorted(one.owner for one in found) == ["one", "two"]
    page = write_sandboxes_page([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    assert "n.1.1" in page.read_text()


def test_a_folder_without_accounts_is_told(tmp_path):
    with pytest.raises(ValueError, match="no folder of a node"):
        read_accounts([tmp_path])
    (tmp_path / "sandboxes.jsonl").write_text(json.dumps("nothing") + "\n")
    with pytest.raises(ValueError, match="no sandbox has ended"):
        render(read_accounts([tmp_path]))
