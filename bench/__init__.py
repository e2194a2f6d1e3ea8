"""What Headstart costs: each benchmark is a frozen dataclass of settings and `run(settings) -> dict` beside it."""
