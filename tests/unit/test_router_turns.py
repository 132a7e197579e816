"""One newcomer a turn."""

from __future__ import annotations

import asyncio

from router.turns import Turns


async def test_others_have_their_turn_between_newcomers_who_keep_their_order() -> None:
    turns, seen = Turns(), list[str]()

    async def newcomer(name: str) -> None:
        await turns.take()
        seen.append(name)

    async def token() -> None:
        for _ in range(12):
            seen.append(".")
            await asyncio.sleep(0)

    comers = [asyncio.create_task(newcomer(name)) for name in "abcd"]
    other = asyncio.create_task(token())
    await asyncio.gather(*comers, other)
    said = "".join(seen)
    assert said.replace(".", "") == "abcd"
    assert all(f"{one}{two}" not in said for one, two in ("ab", "bc", "cd"))


async def test_one_that_goes_away_holds_nobody_up() -> None:
    turns = Turns()
    await turns.take()
    gone, stays = (asyncio.create_task(turns.take()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait_for(stays, 30)
    await asyncio.sleep(0)
    await asyncio.wait_for(turns.take(), 5)
