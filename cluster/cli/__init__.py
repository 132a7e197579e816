"""The pdserve command: the composition root."""
