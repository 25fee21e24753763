"""A package, so that spawned workers find this `tests`, not the one of a checkout on PYTHONPATH."""
