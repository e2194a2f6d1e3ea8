"""What /metrics tells: Prometheus' text format, from a registry of the server's own.

The four counters of speculation have vLLM's names, so that what was made to watch it watches this.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from headstart.serving.jobs import Job

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


class Metrics:
    """Of one server. The engine's thread writes them."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # a second number for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, ["model_name", *more], registry=self.registry)

        self._drafts = counter("vllm:spec_decode_num_drafts", "Passes of a text that fed drafts of heads.").labels(
            model
        )
        self._draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Drafts of heads fed.").labels(model)
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Drafts of heads accepted.").labels(model)
        self._accepted_at = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted by position: position p is the draft of head p + 2.",
            "position",
        )
        self._other_drafts = counter("headstart_other_drafts", "Drafts of no head fed: lookup, forced.", "source")
        self._requests = counter("headstart_requests", "Answers by their status.", "endpoint", "status")
        self._texts = counter("headstart_texts", "Texts by how they ended.", "outcome")
        self._prompt_tokens = counter("headstart_prompt_tokens", "Tokens of prompts of texts that ended.").labels(model)
        self._reused = counter("headstart_prompt_tokens_reused", "Of these, those that a slot held already.").labels(
            model
        )
        self._tokens = counter("headstart_tokens", "Tokens generated.").labels(model)
        self._passes = counter("headstart_passes", "Passes of each text, summed.").labels(model)
        self._failures = counter("headstart_engine_failures", "Engines that failed and were made anew.").labels(model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry).labels(model)

        self._waiting = gauge("headstart_queue_length", "Texts that wait for a slot.")
        self._live = gauge("headstart_live_slots", "Slots with a text.")
        self._loaded = 0, 0

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        self._first = histogram("headstart_time_to_first_token_seconds", "From a text's arrival to its first tokens.")
        self._between = histogram(
            "headstart_time_between_tokens_seconds",
            "From a pass of a text to its next: tokens of one pass come at once.",
        )
        self._per_pass = histogram(
            "headstart_tokens_per_pass", "Of each text that ended.", (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)
        )

    def load(self, waiting: int, live: int) -> None:
        """How many texts wait and are written now. Told before every pass: it is cheap where nothing changed."""
        if (waiting, live) != self._loaded:
            self._loaded = waiting, live
            self._waiting.set(waiting)
            self._live.set(live)

    def stepped(self, texts: int, tokens: int) -> None:
        """A pass of the engine has given so many texts so many tokens together."""
        self._passes.inc(texts)
        self._tokens.inc(tokens)

    def passed(self, job: Job, now: float) -> None:
        """A pass has given a text something, at `now` on the clock of `time.perf_counter`."""
        assert job.generation is not None
        if job.generation.stats.passes == 1:
            self._first.observe(now - job.arrived)
        else:
            self._between.observe(now - job.last)
        job.last = now

    def ended(self, job: Job, outcome: str) -> None:
        """A text has left: with its finish reason, or "cancelled", "deadline", "refused", "failed"."""
        self._texts.labels(self._model, outcome).inc()
        if job.generation is None:
            return
        stats = job.generation.stats
        self._prompt_tokens.inc(len(job.request.prompt))
        self._reused.inc(stats.prompt_tokens_reused)
        if stats.passes:
            self._per_pass.observe(stats.tokens_per_pass)
        if stats.drafted:
            self._drafts.inc(stats.drafted[0])
            self._draft_tokens.inc(sum(stats.drafted))
            self._accepted.inc(sum(stats.accepted))
        for position, accepted in enumerate(stats.accepted):
            self._accepted_at.labels(self._model, str(position)).inc(accepted)
        for source, count in (("lookup", stats.looked_up), ("forced", stats.forced)):
            if count:
                self._other_drafts.labels(self._model, source).inc(count)

    def answered(self, path: str, status: int) -> None:
        """A request to one of the two endpoints that write has been answered; on the event loop."""
        if path in ENDPOINTS:
            self._requests.labels(self._model, path, str(status)).inc()

    def failed(self) -> None:
        """An engine has."""
        self._failures.inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)
