"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# The machine may be busy: an example that is slow once says nothing.
settings.register_profile("duck", deadline=None)
settings.load_profile("duck")
