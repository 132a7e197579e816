"""How KV bytes cross between two workers."""
