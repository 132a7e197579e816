"""The connector's half in the scheduler's process: which request's blocks are whose, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from cluster.kv.connector.near import agent_nearby
from cluster.kv.connector.stats import HandoffStats
from cluster.kv.connector.step import StepMetadata, StepReport
from cluster.kv.credit import CreditBook
from cluster.kv.handoff import HandoffParams
from cluster.kv.reservation import Reserve
from cluster.kv.sender import Arrival, Offer, Release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class _Prefill:
    request: Request
    params: HandoffParams
    offered_blocks: int = 0
    failed: bool = False


@dataclass
class _Decode:
    params: HandoffParams
    arrived_at: float
    local_tokens: int = 0
    reserved: bool = False
    first_token: int | None = None


class SchedulerSide:
    """Follows each handed-off request through the scheduler.

    Args:
        block_size: tokens per KV block.
        block_bytes: of one block, all layers and heads of a rank.
        credit: of this engine as a prefill engine.

    Attributes:
        may_run_ahead: whether the engine has room for a prompt of so many blocks that is not
            granted; the scheduler says.
    """

    def __init__(self, block_size: int, block_bytes: int, credit: CreditBook) -> None:
        self._block_size = block_size
        self._block_bytes = block_bytes
        self.credit = credit
        self._cache_manager: KVCacheManager | None = None
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, _Decode] = {}
        self._unsent: dict[str, str] = {}
        self._arrivals: list[Arrival] = []
        self._reserves: list[Reserve] = []
        self._sent: list[Release] = []
        self._received: list[str] = []
        self._said = {"ahead_bytes": 0, "waiting": 0}
        self.may_run_ahead: Callable[[int], bool] = lambda blocks: True

    def bind(self, cache_manager: KVCacheManager) -> None:
        self._cache_manager = cache_manager

    def on_new_request(self, request: Request) -> None:
        params = HandoffParams.from_dict(request.kv_transfer_params)
        if params is None:
            return
        if params.side == "prefill":
            self._prefills[request.request_id] = _Prefill(request, params)
            self._arrivals.append(Arrival(request.request_id, params))
            self.credit.arrive(params.handoff_id)
        else:
            self._decodes[request.request_id] = _Decode(params, time.monotonic())

    def after_step(self, report: StepReport, sent_requests: Iterable[str]) -> None:
        """What the ranks say; these requests' blocks are pinned no more."""
        for handoff_id in report.granted:
            self.credit.grant(handoff_id)
        for request_id, token in report.first_tokens.items():
            if decode := self._decodes.get(request_id):
                decode.first_token = token
        for request_id in sent_requests:
            if handoff_id := self._unsent.pop(request_id, ""):
                self.credit.end(handoff_id)

    def first_token(self, request_id: str) -> int:
        """Of a decode request that has landed."""
        token = self._decodes[request_id].first_token
        assert token is not None, "it has not landed"
        return token

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Prompt tokens that will come over, beyond those in the local prefix cache; None: not now.

        On decode, vLLM never counts the whole prompt as cached, so a handoff always brings
        something, and the request always waits for its first token. Once reserved, nothing comes a
        second time: a preempted request recomputes here. On prefill nothing comes over, but a
        prompt waits until it has credit.
        """
        if prefill := self._prefills.get(request.request_id):
            return (0 if self._admit(prefill.params) else None), False
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.reserved:
            return 0, False
        decode.local_tokens = local_tokens
        return request.num_prompt_tokens - local_tokens, True

    def _admit(self, params: HandoffParams) -> bool:
        blocks = self._blocks(params.num_tokens)
        handoff_id, size = params.handoff_id, blocks * self._block_bytes
        if not self.credit.has_credit(handoff_id, size):  # first: it costs least, each step anew
            return False
        room = self.credit.granted(handoff_id) or self.may_run_ahead(blocks)
        return room and self.credit.admit(handoff_id, size)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        decode = self._decodes.get(request.request_id)
        if decode is None or not external_tokens:
            return
        decode.reserved = True
        params = decode.params
        needed = self._blocks(params.num_tokens)
        held = decode.local_tokens // self._block_size * self._block_size
        self._reserves.append(
            Reserve(
                request=request.request_id,
                handoff_id=params.handoff_id,
                ticket=params.ticket,
                num_tokens=params.num_tokens,
                block_ids=tuple(blocks.get_block_ids()[0][:needed]),
                held_tokens=held,
                # What is left of the ticket: the request may have waited here for its blocks.
                expires_in=params.expires_in - (time.monotonic() - decode.arrived_at),
            )
        )

    def build(self, output: SchedulerOutput) -> StepMetadata:
        """Called once a step; hands over what has gathered."""
        preempted = []
        for request_id in output.preempted_req_ids or ():
            prefill = self._prefills.get(request_id)
            if prefill is not None and prefill.offered_blocks and not prefill.failed:
                prefill.failed = True
                preempted.append(prefill.params.handoff_id)
        offers = [
            offer
            for request_id, scheduled in output.num_scheduled_tokens.items()
            if (prefill := self._prefills.get(request_id)) and not prefill.failed
            if (offer := self._offer(prefill, scheduled))
        ]
        step = StepMetadata(
            allocated=tuple(self._allocated(output)),
            arrivals=tuple(self._arrivals),
            reserves=tuple(self._reserves),
            offers=tuple(offers),
            preempted=tuple(preempted),
            sent=tuple(self._sent),
            received=tuple(self._received),
        )
        self._arrivals, self._reserves, self._sent, self._received = [], [], [], []
        return step

    def _allocated(self, output: SchedulerOutput) -> Iterable[int]:
        """Blocks this step hands out: all that are not shared with who computed them before."""
        for new in output.scheduled_new_reqs:
            yield from new.block_ids[0][new.num_computed_tokens // self._block_size :]
        cached = output.scheduled_cached_reqs
        for i, blocks in enumerate(cached.new_block_ids):
            if blocks is None:
                continue
            shared = 0
            if cached.req_ids[i] in cached.resumed_req_ids:
                shared = cached.num_computed_tokens[i] // self._block_size
            yield from blocks[0][shared:]

    def _offer(self, prefill: _Prefill, scheduled: int) -> Offer | None:
        """The blocks this step completes; the prompt's last one also when it is partly filled."""
        request, params = prefill.request, prefill.params
        computed = request.num_computed_tokens + scheduled
        whole = computed >= params.num_tokens
        first = prefill.offered_blocks
        last = self._blocks(params.num_tokens) if whole else computed // self._block_size
        if last <= first:
            return None
        assert self._cache_manager is not None
        block_ids = self._cache_manager.get_block_ids(request.request_id)[0]
        prefill.offered_blocks = last
        return Offer(params.handoff_id, first, tuple(block_ids[first:last]), whole)

    def request_finished(self, request: Request) -> bool:
        """True if the blocks must stay until the worker's half reports them sent."""
        decode = self._decodes.pop(request.request_id, None)
        if decode is not None:
            self._received.append(decode.params.handoff_id)
        prefill = self._prefills.pop(request.request_id, None)
        if prefill is None:
            return False
        goes_on = (
            request.status == RequestStatus.FINISHED_LENGTH_CAPPED
            and request.num_output_tokens == 1
            and not prefill.failed
        )
        token = request.output_token_ids[0] if goes_on else None
        self._release(Release(prefill.params.handoff_id, token))
        if not prefill.offered_blocks:
            self.credit.end(prefill.params.handoff_id)
            return False
        self._unsent[request.request_id] = prefill.params.handoff_id
        return True

    def _release(self, release: Release) -> None:
        """At once if the agent is near and knows of all that came before, which goes with steps:
        a request with a first token has had them."""
        agent = agent_nearby()
        if agent is None or release.first_token_id is None:
            self._sent.append(release)
        else:
            sender = agent.sender
            agent.post(lambda: sender.release(release))

    def stats(self) -> HandoffStats | None:
        """The credit book's view, if it has changed."""
        view = {"ahead_bytes": self.credit.ahead_bytes, "waiting": self.credit.waiting}
        if view == self._said:
            return None
        self._said = view
        return HandoffStats(data={"results": [], **view})

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
