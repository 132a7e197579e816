"""Streams that outlive a connection and a router: recorded, joined, followed, taken over."""
