"""Admission: which requests start, wait or are refused. Pure: `(now, event) -> effects`."""
