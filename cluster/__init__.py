"""The shared ground of pdserve: configuration, KV handoff, engines, control plane, CLI."""
