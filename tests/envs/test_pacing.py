import asyncio
import contextlib

from hone.envs.pacing import PER_TICK, take_turn


async def count_ticks(counts):
    while True:
        counts.append(0)
        await asyncio.sleep(0)


async def test_what_is_ready_at_once_is_spread_over_ticks_in_the_order_in_which_it_came():
    counts, order = [0], []

    async def work(number):
        await take_turn()
        counts[-1] += 1
        order.append(number)

    ticks = asyncio.create_task(count_ticks(counts))
    await asyncio.gather(*(work(number) for number in range(10 * PER_TICK)))
    ticks.cancel()
    assert sum(counts) == 10 * PER_TICK
    assert max(counts) <= PER_TICK
    assert order == sorted(order)


async def test_a_loop_with_little_to_do_makes_nobody_wait():
    ran = []
    asyncio.get_running_loop().call_soon(ran.append, "another callback of the same tick")
    await take_turn()
    assert ran == []


async def test_a_task_that_is_cancelled_while_it_waits_takes_no_turn():
    first = [asyncio.create_task(take_turn()) for _ in range(3 * PER_TICK)]
    await asyncio.sleep(0)
    waiting = [task for task in first if not task.done()]
    for task in waiting[:-1]:
        task.cancel()
    await asyncio.wait_for(waiting[-1], 1)
    for task in waiting[:-1]:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await asyncio.wait_for(take_turn(), 1)


def test_every_event_loop_has_turns_of_its_own():
    for _ in range(2):
        asyncio.run(asyncio.wait_for(asyncio.wait_for(take_turn(), 1), 1))
