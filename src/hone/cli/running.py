"""Runs the coroutine of a command that has many rollouts under way in this process."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_rollouts(job: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, with garbage collections as rare as in an env worker."""
    from hone.envs.pacing import spare_collector  # not for `hone --help`

    spare_collector()
    return asyncio.run(job)
