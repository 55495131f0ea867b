import asyncio
import ctypes
import math
import os
import pickle
import signal
import time

import pytest

from hone.envs import FailureClass, RolloutFailure
from hone.envs.isolation import MAX_PROCESSES, IsolatedError, ProcessDied, call_isolated, place_of


def where(seconds=0.0):
    time.sleep(seconds)
    return os.getpid()


def fails(text):
    return {}[text]


def gives_up():
    raise RolloutFailure(FailureClass.SANDBOX, "run", "no such box")


def is_late():
    raise TimeoutError("my own deadline")


def ends(exit_code):
    os._exit(exit_code)


def hangs_in_c():
    """Holds the interpreter's lock for ever, and cannot be interrupted from Python."""
    ctypes.PyDLL(None).sleep(1_000)


def works_for_ever():
    while True:
        math.factorial(2_000)


def shouts():
    print("all over the place", flush=True)
    os.write(1, b"again\n")
    return 1


def wants_everything():
    return len(bytearray(1 << 44))


def unsendable():
    return lambda: 1


class Odd:
    def __reduce__(self):
        raise pickle.PicklingError("stays here")


async def test_a_function_runs_in_another_process_that_is_used_again():
    first, second = [await call_isolated(where, {}, 30) for _ in range(2)]
    assert first == second != os.getpid()


async def test_what_is_raised_there_comes_back_with_its_place():
    with pytest.raises(IsolatedError, match=r"KeyError: 'x' \(test_isolation.py:\d+ in fails\)"):
        await call_isolated(fails, {"text": "x"}, 30)


async def test_typed_failures_and_late_functions_come_back_as_such():
    with pytest.raises(RolloutFailure, match="no such box") as caught:
        await call_isolated(gives_up, {}, 30)
    assert caught.value.failure.kind is FailureClass.SANDBOX
    with pytest.raises(TimeoutError, match="my own deadline"):
        await call_isolated(is_late, {}, 30)


async def test_a_dead_process_is_told_and_replaced():
    with pytest.raises(ProcessDied, match="exit code 3"):
        await call_isolated(ends, {"exit_code": 3}, 30)
    assert await call_isolated(where, {}, 30) != os.getpid()


async def test_a_process_that_somebody_killed_is_told_from_one_that_failed():
    process = await call_isolated(where, {}, 30)
    call = asyncio.create_task(call_isolated(where, {"seconds": 1_000}, 2_000))
    await asyncio.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ProcessDied, match="SIGKILL") as caught:
        await call
    assert caught.value.was_killed


async def test_a_process_that_died_in_its_sleep_costs_nothing():
    before = await call_isolated(where, {}, 30)
    os.kill(before, signal.SIGKILL)
    assert await call_isolated(where, {}, 30) != before


async def test_a_hang_in_c_is_killed_at_the_deadline_and_the_loop_goes_on():
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    with pytest.raises(TimeoutError, match=r"took longer than 0.2 s"):
        await call_isolated(hangs_in_c, {}, 0.2)
    ticking.cancel()
    assert ticks > 3


async def test_cpu_time_is_a_budget_of_its_own():
    with pytest.raises(ProcessDied) as caught:
        await call_isolated(works_for_ever, {}, 60, cpu_seconds=0.1)
    assert caught.value.used_up_cpu
    assert not caught.value.was_killed
    # What waits uses none.
    assert await call_isolated(where, {"seconds": 0.3}, 30, cpu_seconds=0.2) != os.getpid()


async def test_a_cancelled_call_ends_its_process():
    process = await call_isolated(where, {}, 30)
    call = asyncio.create_task(call_isolated(where, {"seconds": 1_000}, 2_000))
    await asyncio.sleep(0.1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    while True:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            break
        await asyncio.sleep(0.01)


async def test_what_a_function_prints_does_not_disturb_the_answer():
    assert await call_isolated(shouts, {}, 30) == 1


async def test_memory_is_bounded():
    with pytest.raises(IsolatedError, match="MemoryError"):
        await call_isolated(wants_everything, {}, 30)


async def test_what_cannot_be_sent_is_an_error_on_both_sides():
    with pytest.raises(TypeError, match="cannot be sent"):
        await call_isolated(fails, {"text": Odd()}, 30)
    with pytest.raises(IsolatedError, match="pickle"):
        await call_isolated(unsendable, {}, 30)
    assert await call_isolated(where, {}, 30) != os.getpid()


async def test_many_calls_share_few_processes():
    processes = await asyncio.gather(*(call_isolated(where, {"seconds": 0.01}, 30) for _ in range(3 * MAX_PROCESSES)))
    assert len(set(processes)) <= MAX_PROCESSES


@pytest.mark.parametrize("function", [lambda: 1, Odd(), type("Local", (), {"__module__": "__main__"})])
def test_what_no_process_can_import_is_refused(function):
    with pytest.raises(ValueError, match=r"cannot be imported|could import it"):
        place_of(function)


def test_a_function_inside_another_is_refused():
    def inner():
        return 1

    with pytest.raises(ValueError, match="define it at the top of a module"):
        place_of(inner)
