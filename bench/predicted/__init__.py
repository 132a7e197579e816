"""Predicted against measured; `python -m bench.predicted`."""
