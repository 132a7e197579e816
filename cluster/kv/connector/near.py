"""The handoff agent beside the scheduler, where both live in one process.

What the connector's halves have to tell each other travels with vLLM's steps: it leaves with the
next one, and what comes of it is looked at after the one behind that. An engine of one rank
computes in its scheduler's own process, so that ends need not wait for steps: the scheduler tells
the agent at once that a prompt has its first token, and sees for itself what has landed before it
plans a step.
"""

from __future__ import annotations

from cluster.kv.agent import HandoffAgent

_agents: list[HandoffAgent] = []


def announce(agent: HandoffAgent) -> None:
    """`agent` serves the only rank of this process's engine."""
    _agents[:] = [agent]


def forget() -> None:
    """It serves no more."""
    _agents.clear()


def agent_nearby() -> HandoffAgent | None:
    """None where ranks have processes of their own."""
    return _agents[0] if _agents else None
