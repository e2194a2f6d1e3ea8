"""Measure what Headstart costs. Each benchmark has a frozen dataclass of settings and `run(settings) -> dict`."""
