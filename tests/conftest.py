"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on what else the machine does; nothing here asserts a time.
settings.register_profile("pdserve", deadline=None)
settings.load_profile("pdserve")
