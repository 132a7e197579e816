"""The simulated engine on decode: what becomes of a request whose first token is handed off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator

from cluster.config_models import ModelConfig
from cluster.engine.protocol import EngineOutput, EngineRequest, Sampling
from cluster.engine.simulated.engine import SimulatedEngine
from cluster.engine.simulated.tokens import continuation, text_of
from cluster.engine.simulated.wire import connect
from cluster.kv.handoff import HandoffParams
from cluster.ticket import Ticket, TicketSigner, new_handoff_id

SECRET = b"a secret of simulated engines"
MODEL = ModelConfig.model_validate(
    {"name": "m", "path": "/nowhere", "engine": "simulated", "max_model_len": 1000}
)
PROMPT = list(range(70))
FIRST, SECOND, THIRD = ANSWER = continuation(PROMPT, 3, 0, MODEL.simulation.vocab_size)


@contextlib.asynccontextmanager
async def decode_engine() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine(MODEL, "d-0", "life", SECRET, "127.0.0.1")
    try:
        yield engine
    finally:
        await engine.stop()


async def decoded(sampling: Sampling, first: int = FIRST) -> list[EngineOutput]:
    """A request's outputs on decode after a handoff with that first token."""
    async with decode_engine() as engine:
        info = await engine.start()
        now = time.time()
        ticket = Ticket(
            new_handoff_id(), "r", "m", "p-0", "life", "d-0", "life", "", len(PROMPT), "",
            info.layout, "", "", now, now + 60,
        )  # fmt: skip
        signed = TicketSigner(SECRET).sign(ticket)
        handoff = HandoffParams("decode", ticket.handoff_id, signed.decode(), len(PROMPT), 60.0)
        outputs = engine.generate(EngineRequest("s", PROMPT, sampling, "", handoff))
        line = await connect(info.transfer_addresses[0])
        line.say("offer", ticket=handoff.ticket)
        line.say("commit", token=first)
        got = [output async for output in outputs]
        await line.hear("grant")
        await line.hear("ack")
        line.close()
        held = await engine.holdings()
        assert (held.ledger, held.blocks_used) == ((), 0)
        return got


async def test_the_first_output_holds_the_first_two_tokens() -> None:
    first, last = await decoded(Sampling(max_tokens=3))
    assert (first.token_ids, last.token_ids) == ([FIRST, SECOND], [THIRD])
    assert first.text == text_of(FIRST) + text_of(SECOND)
    assert (first.finish_reason, last.finish_reason) == (None, "length")
    assert first.scheduled_at > 0


async def test_the_handed_off_token_counts() -> None:
    (only,) = await decoded(Sampling(max_tokens=2))
    assert (only.token_ids, only.finish_reason) == ([FIRST, SECOND], "length")
    (only,) = await decoded(Sampling(max_tokens=1))
    assert (only.token_ids, only.finish_reason) == ([FIRST], "length")


async def test_stop_tokens_end_it_once_enough_were_generated() -> None:
    stops = (FIRST, SECOND, THIRD)
    ends = {0: [FIRST], 1: [FIRST, SECOND], 2: ANSWER}
    for least, expected in ends.items():
        got = await decoded(Sampling(max_tokens=9, min_tokens=least, stop_token_ids=stops))
        assert [token for output in got for token in output.token_ids] == expected
        assert (got[-1].finish_reason, got[-1].stop) == ("stop", expected[-1])


async def test_a_first_token_that_is_not_the_engines_own_is_an_error() -> None:
    (only,) = await decoded(Sampling(max_tokens=3), first=FIRST + 1)
    assert (only.token_ids, only.finish_reason) == ([], "error")
