"""Snapshots of sandboxes' files."""

import os
from pathlib import Path

from hone.sandbox.beneath import closing, file_threads
from hone.sandbox.files import Files, Tree
from hone.sandbox.state import Snapshot


def tree_of(folder: Path) -> Tree:
    folder.mkdir()
    with closing(os.open(folder, os.O_PATH | os.O_DIRECTORY)) as root:
        return Tree(root, folder="/work")


async def test_a_snapshot_is_what_was_there_in_the_same_sandbox_and_in_others(tmp_path: Path) -> None:
    with file_threads() as threads:
        one, *others = (Files(tree_of(tmp_path / name), threads) for name in ("a", "b", "c"))
        await one.write("src/main.py", b"1", mode=0o755)
        with await Snapshot.take(one) as snapshot:
            await one.write("src/main.py", b"2")
            await one.write("new/file", b"3")
            await snapshot.fork([one, *others])
        for files in (one, *others):
            assert await files.read("src/main.py") == b"1"
            assert (await files.stat("src/main.py")).mode == 0o755
            assert [entry.name for entry in await files.list()] == ["src"]
            files.tree.close()
