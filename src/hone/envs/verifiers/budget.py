"""A check of an answer in a process of its own: what the answer causes is a wrong answer, other trouble a failure.

The budget is CPU time, which a busy machine does not use up in the answer's place. So an answer that is made to hang its
verifier earns nothing and escapes nothing, and an honest one is not wrong because others slow the machine down:

    the check used up its CPU time, or crashed    wrong, if the check works on a harmless answer; else a failure
    the check raised                              failure of class environment: the reference, a missing package
    the deadline passed, the CPU time did not     failure of class timeout: the machine stands still
    somebody killed the process                   failure of class worker: a person, or the end of the memory
"""

from collections.abc import Mapping
from typing import Any

from hone.envs.failures import RolloutFailure
from hone.envs.isolation import IsolatedError, Place, ProcessDied, call_isolated
from hone.schema.traces import FailureClass

DEADLINE_SECONDS = 50.0
"""Below the 60 s that a rubric gives its functions, so that the failure is typed here."""


async def is_confirmed(
    check: Place, answer: Mapping[str, Any], harmless: Mapping[str, Any], cpu_seconds: float
) -> bool:
    """What `check(**answer)` says in another process; `check(**harmless)` is known to be harmless, if anything is."""
    try:
        return await _checked(check, answer, cpu_seconds)
    except ProcessDied as died:
        if died.was_killed:
            raise RolloutFailure(FailureClass.WORKER, check.name, str(died)) from died
    try:
        await _checked(check, harmless, cpu_seconds)
    except ProcessDied as died:
        message = f"{died} also for a harmless answer; is the reference sound?"
        raise RolloutFailure(FailureClass.ENVIRONMENT, check.name, message) from died
    return False


async def _checked(check: Place, arguments: Mapping[str, Any], cpu_seconds: float) -> bool:
    try:
        return bool(await call_isolated(check, arguments, DEADLINE_SECONDS, cpu_seconds=cpu_seconds))
    except IsolatedError as error:
        raise RolloutFailure(FailureClass.ENVIRONMENT, check.name, str(error)) from error
    except TimeoutError as error:
        raise RolloutFailure(FailureClass.TIMEOUT, check.name, f"{error}, without the CPU time used") from error
