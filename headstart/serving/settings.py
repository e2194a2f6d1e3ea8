"""Define the settings of `headstart serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headstart.errors import UsageError


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


@dataclass(frozen=True)
class ServeSettings:
    """Set up a server."""

    host: str = "127.0.0.1"
    """Address to listen on; only this machine reaches the default."""
    port: int = 8000
    """Port (0: a free one)."""
    name: str | None = None
    """Name of the model for clients (default: the name of its directory)."""
    api_key: tuple[str, ...] = ()
    """Keys; a client must send one, as `Authorization: Bearer KEY` (default: those in HEADSTART_API_KEY, separated by
    commas; none: every client is served)."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages that may send requests (CORS); * for all."""
    allow_host: tuple[str, ...] = ()
    """Names that the Host header of a request may have; * for all. Addresses and names without a dot are always allowed
    (default: no other names on a loopback address without keys, against web pages that let their name point here; all
    names otherwise)."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of gateways whose `X-Forwarded-For` names the client (* for all; default: none). Without
    keys, the address identifies a client."""
    slots: int = 8
    """Number of outputs decoded at once."""
    context: int | None = None
    """Most tokens of a prompt and its output together (default: the model's context, or what fits into half of the free
    memory)."""
    heads: int | None = None
    """Number of heads that decode if a request does not say (default: those that pay, as `headstart tune` measured;
    without that all). The output does not depend on it."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md)."""
    lookup: int = 0
    """Most drafts per pass from prompt lookup, which copies from the text so far."""
    exact: bool = True
    """Bit-identical outputs for every number of heads; --no-exact is the fastest path, equal up to rounding."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of the weights (default: as stored; float32 on a CPU without instructions for bfloat16)."""
    quantize: Literal["q4", "q8"] | None = None
    """q4 or q8: weights in blocks of 4 or 8 bits, on CPUs; faster, smaller, not quite the same model."""
    loss_text: Path | None = None
    """A text on which to measure the loss in bits per token (with --quantize; default: a short one)."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """Number of CPU threads that decode (default: all cores but one, which is left to the server)."""
    stream_interval: float = 0.02
    """Least seconds between two events of a stream after its first: faster passes are sent together, which costs the
    engine less (0: each pass by itself)."""
    queue: int = 128
    """Most outputs that wait for a slot; beyond it requests are answered 429."""
    max_tokens: int | None = None
    """Most tokens that a request may ask for (default: what the context holds)."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest body of a request in bytes."""
    max_header_bytes: int = 65536
    """Largest head of a request in bytes: its line and its headers."""
    header_timeout: float = 10.0
    """Seconds that a client has to send a head, from its first byte or from connecting."""
    idle_timeout: float = 75.0
    """Seconds that a connection stays open between two requests. Keep it above a gateway's, which is often 60."""
    max_connections: int | None = None
    """Most open connections; above it, the one that has been idle longest is closed, and if all are being answered only
    /health and /ready are (default: 1000, or what the limit of open files, `ulimit -n`, allows)."""
    request_timeout: float = 600.0
    """Most seconds that a request may take, waiting included."""
    drain_seconds: float = 30.0
    """Most seconds that running requests have to finish after SIGTERM."""
    share_prefixes: bool = False
    """Reuse the prompts of other keys' requests: faster, but a client can find out by timing what others have sent."""
    metrics: Literal["key", "open", "off"] = "key"
    """/metrics for clients with a key, if keys are set (key), for everyone (open), or for nobody (off)."""
    log_format: Literal["text", "json"] = "text"
    """text: lines for people, without requests. json: one object a line, requests with their ids and times included."""
    traces: bool = False
    """Send OpenTelemetry traces to where the variables OTEL_EXPORTER_OTLP_* say (the extra otel)."""

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Return the names that requests may be for; None: any."""
        if self.allow_host:
            return None if "*" in self.allow_host else self.allow_host
        return (self.host,) if not self.api_key and is_loopback(self.host) else None

    def __post_init__(self) -> None:
        """Raise UsageError for settings out of range."""
        for name, least in (("slots", 1), ("queue", 0), ("max_body_bytes", 1), ("max_header_bytes", 1024), ("port", 0)):
            self._require(name, getattr(self, name) >= least, f"at least {least}")
        for name in ("request_timeout", "drain_seconds", "header_timeout", "idle_timeout"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a number above 0")
        self._require("stream_interval", 0 <= self.stream_interval <= 10, "between 0 and 10 seconds")
        for name in ("context", "max_tokens", "threads", "heads", "max_connections"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        self._require("port", self.port <= 65535, "at most 65535")
        if any(not key for key in self.api_key):
            raise UsageError("--api-key is empty; name a key, or leave it out to serve every client")
        if any(key != key.strip() for key in self.api_key):
            raise UsageError("--api-key begins or ends with a space, which no header can carry; leave it out")

    def _require(self, name: str, condition: bool, requirement: str) -> None:
        if not condition:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {requirement}")
