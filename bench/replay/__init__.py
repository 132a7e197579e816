"""Replay of traces through placement and simulated engines, on a virtual clock."""
