"""Batch jobs: taken in, worked on in the slack that online work leaves, read back."""
