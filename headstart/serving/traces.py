"""Report requests as OpenTelemetry traces: a span for each request, and in it one for each phase of each output."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headstart.errors import needs_extra
from headstart.serving.jobs import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


class Traces:
    """Send spans by OTLP over HTTP, as the variables OTEL_* say, or give them to a `processor`.

    Raises UsageError without the extra.
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        with needs_extra("--traces", "otel"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "headstart")})
        self._provider = TracerProvider(resource=service)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("headstart")

    def report(
        self, headers: Mapping[str, str], name: str, fields: Mapping[str, Any], jobs: list[Job], began: float
    ) -> None:
        """Report a request that ends now and began at `began` on the clock of `time.perf_counter`.

        `fields` are the attributes of its span; `headers` may name the span above it (`traceparent`).
        """
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.status import StatusCode

        now = time.perf_counter()
        offset = time.time_ns() - int(now * 1e9)

        def at(moment: float) -> int:
            return offset + int(moment * 1e9)

        span = self._tracer.start_span(
            name, extract(headers), SpanKind.SERVER, attributes=dict(fields), start_time=at(began)
        )
        for job in jobs:
            for phase, (start, end) in job.phases(now).items():
                attributes = {"headstart.choice": job.index}
                child = self._tracer.start_span(
                    phase, set_span_in_context(span), attributes=attributes, start_time=at(start)
                )
                child.end(at(end))
        if fields["http.response.status_code"] >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(at(now))

    def close(self) -> None:
        """Send the spans that are left."""
        self._provider.shutdown()
