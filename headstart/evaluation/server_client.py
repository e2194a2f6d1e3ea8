"""Ask a server that has OpenAI's API (vLLM, llama.cpp, SGLang, Headstart) and read what its answers cost.

Answers are streamed: the time to the first token is kept apart. Drafts are counted where the server reports them:
vLLM's `metrics.speculative_decoding`, Headstart's `usage.speculative`, llama.cpp's `timings`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from headstart.errors import UsageError, shorten
from headstart.evaluation.speculation import Answer, TooLong, count_repeated

DATA, DONE = b"data:", b"[DONE]"


@dataclass
class Stream:
    """A streamed answer, in seconds of one clock.

    Attributes:
        sent: time of the request.
        times: arrival of each event.
        events: the events.
        end: end of the stream.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    end: float = 0.0

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(map(_text, self.events))

    @property
    def pieces(self) -> list[float]:
        """Arrival of the events that hold text."""
        return [at for at, event in zip(self.times, self.events) if _text(event)]

    @property
    def usage(self) -> Mapping[str, Any]:
        """Usage at the end of the stream; empty if the server sends none."""
        return self.last("usage")

    @property
    def tokens(self) -> int:
        """Tokens that the server reports, or else the number of pieces."""
        return int(self.usage.get("completion_tokens") or len(self.pieces))

    def last(self, name: str) -> Mapping[str, Any]:
        """Return the last object of this name in an event; empty if there is none."""
        found = (event[name] for event in reversed(self.events) if isinstance(event.get(name), dict))
        return next(found, {})

    @property
    def finish_reason(self) -> str:
        """Reason that the server gives for the end; empty if the stream was cut."""
        reasons = [choice.get("finish_reason") for event in self.events for choice in event.get("choices") or ()]
        return next((str(reason) for reason in reversed(reasons) if reason), "")


def _text(event: Mapping[str, Any]) -> str:
    parts = []
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        parts += [choice.get("text"), delta.get("reasoning_content"), delta.get("content")]
    return "".join(part for part in parts if isinstance(part, str))


def open_stream(url: str, path: str, body: Mapping[str, Any], timeout: float = 600.0) -> Stream:
    """Post `body` to URL/PATH and read the stream of events to its end.

    Raises TooLong if the server has no room for the prompt, and UsageError if it does not answer, answers with an
    error, or ends the stream before the answer ends.
    """
    stream, lines, done = Stream(time.perf_counter()), list[bytes](), False
    try:
        with contextlib.closing(_connect(url, timeout)) as connection:
            connection.request("POST", f"{urlsplit(url).path.rstrip('/')}/{path}", json.dumps(body), _headers())
            response = connection.getresponse()
            for line in response:
                content = line[len(DATA) :].strip() if line.startswith(DATA) else b""
                done = done or content == DONE
                if content.startswith(b"{"):
                    stream.times.append(time.perf_counter())
                    stream.events.append(json.loads(content))
                elif len(lines) < 100:
                    lines.append(line)
        stream.end = time.perf_counter()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UsageError(f"{url}: the answer broke off ({shorten(repr(error))}); start the server again") from error
    said = shorten(" ".join(b"".join(lines).decode("utf-8", "replace").split()))
    if response.status == 400 and any(word in said.lower() for word in ("context", "too long", "maximum")):
        raise TooLong(said)
    failed = next((event["error"] for event in stream.events if event.get("error")), None)
    if response.status != 200 or failed is not None:
        raise UsageError(f"{url}: status {response.status}, {shorten(str(failed or said))}; try the request by itself")
    if not (done or stream.finish_reason):
        raise UsageError(f"{url}: the stream ended before the answer did; start the server again, then this command")
    return stream


def _connect(url: str, timeout: float) -> http.client.HTTPConnection:
    at = urlsplit(url)
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    return kind(at.netloc, timeout=timeout)


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def model_at(url: str) -> str:
    """Return the name of the first model of a server. Raises UsageError if nothing answers."""
    try:
        at = urlsplit(url)
        if at.scheme not in ("http", "https") or not at.netloc:
            raise ValueError("no URL")
        with contextlib.closing(_connect(url, 10)) as connection:
            connection.request("GET", f"{at.path.rstrip('/')}/models", headers=_headers())
            return str(json.load(connection.getresponse())["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{url}: does not answer ({shorten(str(error))}); name a server with OpenAI's API, like http://HOST:PORT/v1"
        ) from error


def answer_of(stream: Stream) -> Answer:
    """Return the answer of a stream, with the drafts that the server reports."""
    usage, pieces, tokens = stream.usage, stream.pieces, stream.tokens
    first = pieces[0] if pieces else stream.end
    # The first token comes with the prompt; it is charged the mean time of the others.
    scale = tokens / (tokens - 1) if tokens > 1 else 1.0
    answer = Answer(
        text=stream.text,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        tokens=tokens,
        seconds=(stream.end - first) * scale,
        prompt_seconds=first - stream.sent,
        repeated=count_repeated(stream.text.split()),
        finish_reason=stream.finish_reason,
    )
    vllm, own, timings = (
        stream.last("metrics").get("speculative_decoding"),
        usage.get("speculative"),
        stream.last("timings"),
    )
    if vllm:
        _count_steps(answer, vllm)
    elif own:
        answer.num_draft_tokens, answer.num_accepted_draft_tokens = own["drafted"], own["accepted"]
        answer.passes, answer.num_spec_tokens = own["passes"], len(own.get("per_position", ()))
    elif "draft_n" in timings:
        answer.num_draft_tokens, answer.num_accepted_draft_tokens = timings["draft_n"], timings["draft_n_accepted"]
        answer.passes = max(1, tokens - answer.num_accepted_draft_tokens)
    return answer


def _count_steps(answer: Answer, metrics: Mapping[str, Any]) -> None:
    """Read vLLM's metrics, which leave out passes without drafts: at least the one that read the prompt."""
    for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_spec_tokens"):
        setattr(answer, name, int(metrics[name]))
    drafted, accepted = list(metrics.get("per_step_drafted") or ()), list(metrics.get("per_step_accepted") or ())
    ordered = bool(drafted)
    if not ordered:
        for length, row in metrics["acceptance_histogram_by_draft_length"].items():
            accepted += [count for count, steps in enumerate(row) for _ in range(steps)]
            drafted += [int(length)] * sum(row)
    answer.passes = max(len(drafted), answer.tokens - answer.num_accepted_draft_tokens)
    bare = answer.passes - len(drafted)
    answer.per_step_drafted, answer.per_step_accepted = [0] * bare + drafted, [0] * bare + accepted
    answer.ordered = ordered and bare <= 1
