"""Redis or Valkey: the worker registry, the journal, quotas and batch jobs."""
