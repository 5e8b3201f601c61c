"""No deadline per example: the machine that runs the tests may be busy."""

from hypothesis import settings

settings.register_profile("crowdmesh", deadline=None)
settings.load_profile("crowdmesh")
