"""For all tests: random tests print their seed, and are not judged by how fast a shared machine is."""

from hypothesis import HealthCheck, settings

settings.register_profile("shared-machine", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")
