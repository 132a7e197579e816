"""The prefill face of a worker."""
