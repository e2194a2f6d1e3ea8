"""Collect the metrics of a server, in Prometheus' text format.

The four counters of speculation have vLLM's names, so dashboards for vLLM show them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from headstart.serving.jobs import Job

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS_PER_PASS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16)
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


class Metrics:
    """Hold the metrics of one server. The engine's thread writes all but the counter of requests."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # a second number for each counter, which nobody reads
        self.registry = CollectorRegistry()
        self.model = model

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, ["model_name", *more], registry=self.registry)

        def total(name: str, text: str) -> Counter:
            return counter(name, text).labels(model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        self._drafts = total("vllm:spec_decode_num_drafts", "Passes of an output that fed drafts of heads.")
        self._draft_tokens = total("vllm:spec_decode_num_draft_tokens", "Drafts of heads fed.")
        self._accepted = total("vllm:spec_decode_num_accepted_tokens", "Drafts of heads accepted.")
        self._accepted_at = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted by position: position p is the draft of head p + 2.",
            "position",
        )
        self._other_drafts = counter("headstart_other_drafts", "Drafts of no head fed: lookup, forced.", "source")
        self._requests = counter("headstart_requests", "Answers by status.", "endpoint", "status")
        self._outputs = counter("headstart_texts", "Outputs by the way they ended.", "outcome")
        self._prompt_tokens = total("headstart_prompt_tokens", "Prompt tokens of outputs that ended.")
        self._reused = total("headstart_prompt_tokens_reused", "Prompt tokens that a slot held already.")
        self._tokens = total("headstart_tokens", "Tokens generated.")
        self._passes = total("headstart_passes", "Passes, summed over outputs.")
        self._failures = total("headstart_engine_failures", "Engines that failed and were replaced.")
        self._loads: dict[int, tuple[int, int]] = {}
        loads = self._loads
        waiting, live = lambda: sum(w for w, _ in list(loads.values())), lambda: sum(n for _, n in list(loads.values()))
        gauge("headstart_queue_length", "Outputs that wait for a slot.").set_function(waiting)
        gauge("headstart_live_slots", "Slots that decode.").set_function(live)
        self._first = histogram("headstart_time_to_first_token_seconds", "From arrival to the first tokens.")
        self._between = histogram(
            "headstart_time_between_tokens_seconds",
            "From a pass of an output to its next; the tokens of one pass come at once.",
        )
        self._per_pass = histogram("headstart_tokens_per_pass", "Average of each output that ended.", TOKENS_PER_PASS)

    def set_load(self, engine: object, waiting: int, live: int) -> None:
        """Record how many jobs wait for an engine and how many it decodes.

        While a model is replaced there are two engines, and the metrics hold the sum.
        """
        self._loads[id(engine)] = waiting, live

    def count_step(self, jobs: int, tokens: int) -> None:
        """Count a pass of the engine, which has given so many tokens to so many jobs."""
        self._passes.inc(jobs)
        self._tokens.inc(tokens)

    def count_pass(self, job: Job, now: float) -> None:
        """Record the time since the last pass of a job, at `now` on the clock of `time.perf_counter`."""
        assert job.generation is not None
        if job.generation.stats.passes == 1:
            self._first.observe(now - job.arrived)
        else:
            self._between.observe(now - job.last)
        job.last = now

    def count_end(self, job: Job, outcome: str) -> None:
        """Count a job that has ended: by its finish reason, or "cancelled", "deadline", "refused" or "failed"."""
        self._outputs.labels(self.model, outcome).inc()
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
            self._accepted_at.labels(self.model, str(position)).inc(accepted)
        for source, count in (("lookup", stats.looked_up), ("forced", stats.forced)):
            if count:
                self._other_drafts.labels(self.model, source).inc(count)

    def count_response(self, path: str, status: int) -> None:
        """Count a response, if its endpoint generates; on the event loop."""
        if path in ENDPOINTS:
            self._requests.labels(self.model, path, str(status)).inc()

    def count_failure(self) -> None:
        """Count an engine that has failed."""
        self._failures.inc()

    def page(self) -> bytes:
        """Return the page of all metrics."""
        return generate_latest(self.registry)
