"""The simulator: production cores under a virtual clock, with a performance model for engines."""
