"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on who else uses the machine; what never ends meets the test's own time-out.
settings.register_profile("windlass", deadline=None)
settings.load_profile("windlass")
