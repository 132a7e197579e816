"""The engine protocol and its two engines: vLLM and the simulated one."""
