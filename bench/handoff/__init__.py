"""The handoff between two processes, and the limits beside it: raw TCP and bare gRPC."""
