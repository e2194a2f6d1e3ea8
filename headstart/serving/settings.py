"""What `headstart serve` is told."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from headstart.errors import UsageError


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is seen by this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


@dataclass(frozen=True)
class ServeSettings:
    """Of a server."""

    host: str = "127.0.0.1"
    """Address to listen on; this one is seen by this machine alone."""
    port: int = 8000
    """Port (0: a free one)."""
    name: str | None = None
    """What clients call the model (default: the name of its directory)."""
    api_key: tuple[str, ...] = ()
    """Keys of which a client must show one, as `Authorization: Bearer KEY` (default: those in HEADSTART_API_KEY, parted
    by commas; none: everybody is served)."""
    allow_origin: tuple[str, ...] = ()
    """Web pages of these origins may ask too (CORS); * for all."""
    allow_host: tuple[str, ...] = ()
    """Names in the Host header of requests that are answered; * for all. Addresses and names without a dot are always
    (default: no others on a loopback address without keys, which keeps web pages out that point their name here; any
    elsewhere)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of gateways whose `X-Forwarded-For` names the client (* for all; default: none). Without
    keys, clients are told apart by address."""
    slots: int = 8
    """Texts decoded at once."""
    context: int | None = None
    """Most tokens of a prompt and its answer together (default: the model's, or what half of the free memory holds)."""
    heads: int | None = None
    """Heads that decode where a request names none (default: those worth it by what `headstart tune` measured; without
    that all). The text does not depend on it."""
    lookup: int = 0
    """At most this many drafts of a pass are looked up in the text itself."""
    exact: bool = True
    """Bit-identical texts for every number of heads; --no-exact is the fastest path, equal up to rounding."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the weights (default: as stored; float32 on a CPU without instructions for bfloat16)."""
    quantize: Literal["int8"] | None = None
    """int8: weights and activations of all products in 8 bits, on CPUs; faster, not quite the same model."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads of the decoding (default: one core is left to the server, where there are two or more)."""
    stream_interval: float = 0.02
    """Least seconds between two pieces of a stream after its first: what faster passes commit is sent together, so that
    sending costs the engine little (0: each pass by itself)."""
    queue: int = 128
    """Texts that may wait for a slot; past it requests are answered 429."""
    max_tokens: int | None = None
    """Most tokens that a request may ask for (default: what the context holds)."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest request."""
    max_header_bytes: int = 65536
    """Largest head of a request: its line and its headers."""
    header_timeout: float = 10.0
    """Seconds that a client has to send a head, from its first byte or from connecting."""
    idle_timeout: float = 75.0
    """Seconds that a connection stays open between two requests. Keep it above a gateway's, which is often 60."""
    max_connections: int | None = None
    """Most open connections; above it the one that has been idle longest is closed, and where all are being answered
    only /health and /ready are (default: 1000, or what the limit of open files, `ulimit -n`, allows)."""
    request_timeout: float = 600.0
    """Seconds that a request may take, waiting included."""
    drain_seconds: float = 30.0
    """After SIGTERM, seconds that running requests have to finish."""

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names that requests may be for; None: any."""
        if self.allow_host:
            return None if "*" in self.allow_host else self.allow_host
        return (self.host,) if not self.api_key and is_loopback(self.host) else None

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("queue", 0), ("max_body_bytes", 1), ("max_header_bytes", 1024), ("port", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name in ("request_timeout", "drain_seconds", "header_timeout", "idle_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a number above 0")
        if not 0 <= self.stream_interval <= 10:
            raise UsageError(f"--stream-interval is {self.stream_interval}; it must lie between 0 and 10 seconds")
        for name in ("context", "max_tokens", "threads", "heads", "max_connections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.port > 65535:
            raise UsageError(f"--port is {self.port}; ports end at 65535")
        if any(not key for key in self.api_key):
            raise UsageError("--api-key is empty; name a key, or leave it out to serve everybody")
        if any(key != key.strip() for key in self.api_key):
            raise UsageError("--api-key begins or ends with a space, which no header can carry; leave it out")
