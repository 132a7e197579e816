"""What a protocol's handler needs to answer a request: a running one, or a reader of its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from cluster.errors import PdserveError
from cluster.ids import RequestId
from router.output import Completed, Delta


class Answer(Protocol):
    """One consumer's view of a request. The consumer calls `leave` in the end.

    Attributes:
        n: how many completions it has.
        on_cut: called when the consumer is cut off while it may be blocked in a write.
        direct: may be set to what sends a delta at once, in the event loop's turn that brought it;
            it returns False if it cannot, and the delta then comes by `deltas`, as do all while
            the consumer has not come back for more. An answer need not call it.
        error: what it was cut off for, once it has been.
    """

    on_cut: Callable[[], None] | None
    direct: Callable[[Delta], bool] | None

    @property
    def request_id(self) -> RequestId: ...
    @property
    def model(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def error(self) -> PdserveError | None: ...
    @property
    def completed(self) -> Completed:
        """After the end of `deltas`."""
        ...

    def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is there for the client, again and again until the end. Raises PdserveError."""
        ...

    def leave(self) -> None: ...
