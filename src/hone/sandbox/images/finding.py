"""Images that cells wait for: each is looked for once at a time, whoever waits, in threads that nobody else needs."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hone.sandbox.cells.plan import Image
from hone.sandbox.errors import SandboxError
from hone.sandbox.images.children import Children

NUM_THREADS = 16


class Findings:
    """find: the image of a name, which may take long; it is called in threads."""

    def __init__(self, find: Callable[[str], Image]) -> None:
        self._find = find
        self._children = Children()
        self._threads = ThreadPoolExecutor(
            NUM_THREADS, thread_name_prefix="hone-images", initializer=self._children.adopt
        )
        self._under_way: dict[str, asyncio.Future[Image]] = {}

    async def image(self, name: str, over: "asyncio.Future[SandboxError] | None", seconds: float) -> Image | None:
        """The image of a name; None if it is not there before `over` is done, or in so many seconds: others go on waiting."""
        finding = self._under_way.get(name)
        if finding is None:
            finding = asyncio.get_running_loop().run_in_executor(self._threads, self._find, name)
            self._under_way[name] = finding
            finding.add_done_callback(lambda done: self._found(name, done))
        waits: set[asyncio.Future[Image] | asyncio.Future[SandboxError]] = {finding}
        if over is not None:
            waits.add(over)
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return finding.result() if finding.done() else None

    def close(self) -> None:
        """End what fetches and builds; nobody waits for the threads."""
        self._children.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _found(self, name: str, finding: "asyncio.Future[Image]") -> None:
        del self._under_way[name]
        if not finding.cancelled():
            finding.exception()  # whoever waits for it has it; perhaps nobody does
