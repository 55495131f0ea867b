"""What a program leaves to deceive whoever grades its work: none of it is in a fresh cell that gets the work alone."""

from hone.sandbox.cells.cells import Cells
from hone.sandbox.node.node import Node
from hone.schema.sandboxes import SandboxSpec

SMALL = SandboxSpec(memory_mb=64, disk_mb=16, max_processes=32)
TRICKS = """
mkdir -p /work/bin /work/.local/lib
for name in python3 pytest sh cat; do printf '#!/bin/sh\\necho passed\\n' > /work/bin/$name; chmod +x /work/bin/$name; done
echo 'print("passed", flush=True); import os; os._exit(0)' | tee /work/sitecustomize.py /work/usercustomize.py /work/json.py > /dev/null
printf '[pytest]\\naddopts = --co\\n' > /work/pytest.ini
echo 'export PATH=/work/bin:$PATH PYTHONPATH=/work' | tee /work/.profile /work/.bashrc > /dev/null
echo 'def answer(): return 41' > /work/answer.py
(while :; do echo 'def answer(): return 42' > /work/answer.py; sleep 0.01; done) > /dev/null 2>&1 &
"""
GRADE = "import json, answer; print(json.dumps(answer.answer()))"


async def test_a_fresh_cell_grades_what_it_was_given_and_nothing_else(cells: Cells) -> None:
    async with Node() as node:
        worked, grading = node.create(SMALL), node.create(SMALL)
        assert (await worked.exec(["sh", "-c", TRICKS])).is_success
        assert (await worked.snippet(GRADE)).stdout == "passed\n"  # in the cell it worked in, it would be believed
        await grading.write("answer.py", b"def answer(): return 41\n")
        assert (await grading.snippet(GRADE)).stdout == "41\n"
        assert (await grading.exec(["python3", "-c", GRADE])).stdout == "41\n"
        assert not {entry.name for entry in await grading.list()} & {"bin", "json.py", "sitecustomize.py", ".profile"}


async def test_a_warm_cell_was_in_nobodys_hands(cells: Cells) -> None:
    async with Node() as node:
        first = node.create(SMALL)
        await first.python("import builtins; builtins.print = lambda *_: None; import sys; sys.modules['json'] = None")
        await first.close()
        second = node.create(SMALL)
        assert (await second.snippet("import json; print(json.dumps(1))")).stdout == "1\n"
