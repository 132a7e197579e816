"""The connector's half in the scheduler's process: which request's blocks are whose, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from cluster.kv.connector.step import StepMetadata
from cluster.kv.handoff import HandoffParams
from cluster.kv.receiver import Reserve
from cluster.kv.sender import Offer, Release

if TYPE_CHECKING:
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
    local_tokens: int = 0
    reserved: bool = False


class SchedulerSide:
    """Follows each handed-off request through the scheduler.

    Args:
        block_size: tokens per KV block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._cache_manager: KVCacheManager | None = None
        self._prefills: dict[str, _Prefill] = {}
        self._decodes: dict[str, _Decode] = {}
        self._reserves: list[Reserve] = []
        self._sent: list[Release] = []
        self._received: list[str] = []

    def bind(self, cache_manager: KVCacheManager) -> None:
        self._cache_manager = cache_manager

    def on_new_request(self, request: Request) -> None:
        params = HandoffParams.from_dict(request.kv_transfer_params)
        if params is None:
            return
        if params.side == "prefill":
            self._prefills[request.request_id] = _Prefill(request, params)
        else:
            self._decodes[request.request_id] = _Decode(params)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int, bool]:
        """Prompt tokens that will come over, beyond those in the local prefix cache.

        vLLM never counts the whole prompt as cached, so a handoff always brings something, and the
        request always waits for its first token. Once reserved, nothing comes a second time: a
        preempted request recomputes here.
        """
        decode = self._decodes.get(request.request_id)
        if decode is None or decode.reserved:
            return 0, False
        decode.local_tokens = local_tokens
        return request.num_prompt_tokens - local_tokens, True

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        decode = self._decodes.get(request.request_id)
        if decode is None or not external_tokens:
            return
        decode.reserved = True
        params = decode.params
        needed = -(-params.num_tokens // self._block_size)
        self._reserves.append(
            Reserve(
                request=request.request_id,
                handoff_id=params.handoff_id,
                ticket=params.ticket,
                num_tokens=params.num_tokens,
                block_ids=tuple(blocks.get_block_ids()[0][:needed]),
                held_blocks=decode.local_tokens // self._block_size,
                expires_in=params.expires_in,
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
            reserves=tuple(self._reserves),
            offers=tuple(offers),
            preempted=tuple(preempted),
            sent=tuple(self._sent),
            received=tuple(self._received),
        )
        self._reserves, self._sent, self._received = [], [], []
        return step

    def _offer(self, prefill: _Prefill, scheduled: int) -> Offer | None:
        """The blocks this step completes; the prompt's last one also when it is partly filled."""
        request, params = prefill.request, prefill.params
        computed = request.num_computed_tokens + scheduled
        if computed >= params.num_tokens:
            last = -(-params.num_tokens // self._block_size)
        else:
            last = computed // self._block_size
        first = prefill.offered_blocks
        if last <= first:
            return None
        assert self._cache_manager is not None
        block_ids = self._cache_manager.get_block_ids(request.request_id)[0]
        prefill.offered_blocks = last
        return Offer(
            request=request.request_id,
            handoff_id=params.handoff_id,
            ticket=params.ticket,
            peers=params.peers,
            num_tokens=params.num_tokens,
            first_block=first,
            block_ids=tuple(block_ids[first:last]),
            expires_in=params.expires_in,
        )

    def request_finished(self, request: Request) -> bool:
        """True if the blocks must stay until the worker's half reports them sent."""
        decode = self._decodes.pop(request.request_id, None)
        if decode is not None and decode.reserved:
            self._received.append(decode.params.handoff_id)
        prefill = self._prefills.pop(request.request_id, None)
        if prefill is None or not prefill.offered_blocks:
            return False
        goes_on = (
            request.status == RequestStatus.FINISHED_LENGTH_CAPPED
            and request.num_output_tokens == 1
            and not prefill.failed
        )
        token = request.output_token_ids[0] if goes_on else None
        self._sent.append(Release(prefill.params.handoff_id, token))
        return True
