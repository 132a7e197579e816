"""The GPU session: engines in processes of their own, what is asked of them, and its tables."""
