"""Measurements of a cluster as it runs, each a command of its own: see README.md."""
