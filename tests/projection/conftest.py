"""The same examples in every run, and no deadline for one of them: machines are busy."""

from hypothesis import settings

settings.register_profile("projection", deadline=None, derandomize=True)
settings.load_profile("projection")
