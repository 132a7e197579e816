"""The advisor: which prefill:decode ratio, or none at all, for this traffic on these GPUs."""
