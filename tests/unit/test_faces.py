"""The prefill and the decode face over a scripted engine: tickets, failures, what goes out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import fields, replace

import pytest

from cluster.engine.protocol import EngineOutput, EngineRequest, Sampling
from cluster.errors import HandoffRefused, InvalidRequest
from cluster.kv.handoff import HandoffResult
from cluster.store.records import WorkerRecord
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest
from cluster.worker.sequence import Identity, SequenceStart, SequenceStep
from cluster.worker.whole import WholeFace
from decode_worker.servicer import DecodeFace
from prefill_worker.servicer import PrefillFace, one_token

SIGNER = TicketSigner(b"a secret for the faces")
PROMPT = [5, 6, 7]


class ScriptedEngine:
    """Gives the outputs it was told to, and the handoff result it was told to."""

    def __init__(self, *outputs: EngineOutput, error: str | None = "") -> None:
        self.outputs = outputs
        self.error = error  # None: the handoff never ends
        self.requests: list[EngineRequest] = []
        self.aborted = False
        self.expected: list[str] = []
        self.forgotten: list[str] = []
        self.hang = asyncio.Event()

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        self.requests.append(request)
        try:
            for output in self.outputs:
                yield output
            if not self.outputs:
                await self.hang.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted = True
            raise

    def expect_handoff(self, handoff_id: str) -> None:
        self.expected.append(handoff_id)

    async def handoff_result(self, handoff_id: str) -> HandoffResult:
        assert handoff_id in self.expected
        if self.error is None:
            await self.hang.wait()
        return HandoffResult(handoff_id, "decode", self.error or "", bytes=9, ended_at=1.0)

    def forget_handoff(self, handoff_id: str) -> None:
        self.forgotten.append(handoff_id)


class KnownPeers:
    async def find(self, worker_id: str, incarnation: str) -> WorkerRecord:
        return WorkerRecord(
            worker_id, incarnation, "m", "decode", "ready", transfer_addresses=(f"{worker_id}:1",)
        )


def ticket(**changes: object) -> Ticket:
    now = time.time()
    right = Ticket(
        new_handoff_id(), "r", "m", "p", "p1", "d", "d1", prompt_digest(PROMPT), len(PROMPT),
        "salt", "layout", "1x1x32xplain", "1x1x32xplain", now, now + 30,
    )  # fmt: skip
    return replace(right, **changes)  # type: ignore[arg-type]


def start(stage: str, signed: bytes, **changes: object) -> SequenceStart:
    right = SequenceStart("s", stage, PROMPT, Sampling(max_tokens=4), signed, "salt")  # type: ignore[arg-type]
    return replace(right, **changes)  # type: ignore[arg-type]


def prefill_face(engine: ScriptedEngine) -> PrefillFace:
    me = Identity("p", "p1", "layout")
    return PrefillFace(engine, me, SIGNER, KnownPeers())  # type: ignore[arg-type]


def decode_face(engine: ScriptedEngine) -> DecodeFace:
    return DecodeFace(engine, Identity("d", "d1", "layout"), SIGNER)  # type: ignore[arg-type]


FIRST = EngineOutput([11], "a", finish_reason="length", scheduled_at=1.0)


async def test_prefill_asks_the_engine_for_one_token_and_the_push() -> None:
    engine = ScriptedEngine(FIRST, error=None)
    steps: list[SequenceStep] = []
    signed = SIGNER.sign(ticket())
    await prefill_face(engine).run(start("prefill", signed), steps.append)
    (request,) = engine.requests
    assert request.sampling.max_tokens == 1
    assert request.handoff is not None and request.handoff.peers == ("d:1",)
    assert [(s.token_ids, s.text, s.finish_reason) for s in steps] == [([11], "a", "length")]
    assert engine.forgotten == [request.handoff.handoff_id]


async def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    steps: list[SequenceStep] = []
    sampling = Sampling(max_tokens=4, stop=("ab",))
    await prefill_face(ScriptedEngine(FIRST, error=None)).run(
        start("prefill", SIGNER.sign(ticket()), sampling=sampling), steps.append
    )
    assert (steps[0].token_ids, steps[0].text) == ([11], "")


async def test_a_push_that_fails_ends_prefill_before_its_token() -> None:
    engine = ScriptedEngine(error="decode cannot be reached")
    with pytest.raises(HandoffRefused, match="cannot be reached"):
        await prefill_face(engine).run(start("prefill", SIGNER.sign(ticket())), lambda _: None)
    assert engine.aborted


async def test_decode_passes_every_step_on_and_reports_the_handoff() -> None:
    engine = ScriptedEngine(
        EngineOutput([11], "a"), EngineOutput([12, 13], "bc", finish_reason="stop", stop=13)
    )
    steps: list[SequenceStep] = []
    await decode_face(engine).run(start("decode", SIGNER.sign(ticket())), steps.append)
    assert [(s.offset, s.token_ids) for s in steps] == [(0, [11]), (1, [12, 13])]
    assert steps[-1].stop == 13
    report = steps[-1].report
    assert report is not None and report.handoff is not None and report.handoff.bytes == 9


async def test_decode_says_why_the_handoff_failed() -> None:
    engine = ScriptedEngine(EngineOutput([], "", finish_reason="error"), error="checksum differs")
    with pytest.raises(HandoffRefused, match="checksum differs"):
        await decode_face(engine).run(start("decode", SIGNER.sign(ticket())), lambda _: None)
    assert engine.forgotten


async def test_a_whole_sequence_takes_no_ticket() -> None:
    engine = ScriptedEngine(EngineOutput([11], "a", finish_reason="length"))
    steps: list[SequenceStep] = []
    await WholeFace(engine).run(start("whole", b""), steps.append)  # type: ignore[arg-type]
    assert engine.requests[0].handoff is None and steps[-1].finish_reason == "length"
    with pytest.raises(InvalidRequest):
        signed = SIGNER.sign(ticket())
        await WholeFace(engine).run(start("whole", signed), steps.append)  # type: ignore[arg-type]


WRONG: dict[str, object] = {
    "decode_worker": "other",
    "decode_incarnation": "a former life",
    "layout": "other",
    "tenant_salt": "another tenant",
    "prompt_digest": prompt_digest([5, 6, 8]),
    "num_tokens": 4,
    "expires_at": time.time() - 1,
}


@pytest.mark.parametrize("field", WRONG)
async def test_decode_takes_no_ticket_of_something_else(field: str) -> None:
    engine = ScriptedEngine()
    signed = SIGNER.sign(ticket(**{field: WRONG[field]}))
    with pytest.raises(HandoffRefused):
        await decode_face(engine).run(start("decode", signed), lambda _: None)
    assert not engine.requests


@pytest.mark.parametrize("field", ["prefill_worker", "prefill_incarnation"])
async def test_prefill_takes_no_ticket_of_another(field: str) -> None:
    engine = ScriptedEngine()
    with pytest.raises(HandoffRefused):
        signed = SIGNER.sign(ticket(**{field: "other"}))
        await prefill_face(engine).run(start("prefill", signed), lambda _: None)
    assert not engine.requests


@pytest.mark.parametrize("field", [f.name for f in fields(Ticket)])
async def test_no_field_of_a_ticket_can_be_changed(field: str) -> None:
    right = ticket()
    value = getattr(right, field)
    changed = replace(right, **{field: value + "x" if isinstance(value, str) else value + 1})
    forged = (
        SIGNER.sign(changed).rpartition(b".")[0] + b"." + SIGNER.sign(right).rpartition(b".")[2]
    )
    with pytest.raises(HandoffRefused, match="not signed"):
        await decode_face(ScriptedEngine()).run(start("decode", forged), lambda _: None)


def test_the_first_token_is_drawn_as_in_the_whole_request() -> None:
    sampling = Sampling(max_tokens=50, min_tokens=20, seed=3, presence_penalty=1.0)
    first = one_token(sampling)
    assert (first.max_tokens, first.min_tokens) == (1, 1)
    assert replace(first, max_tokens=50, min_tokens=20) == sampling
