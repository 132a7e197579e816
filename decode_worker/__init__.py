"""The decode face of a worker."""
