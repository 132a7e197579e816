"""The KV handoff: tickets, ledger, layout, transports and the vLLM connector."""
