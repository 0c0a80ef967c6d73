"""Hypothesis searches afresh on a developer's machine and repeats itself in CI."""

import os

from hypothesis import settings

settings.register_profile("octavo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("octavo")
