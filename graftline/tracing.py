"""OpenTelemetry traces: one per flow, through its tasks down to the stages' processes, and one per request.

Off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set and the extra ``telemetry`` is installed; then spans are sent there by
OTLP over HTTP, and every ``OTEL_…`` variable of the SDK applies. A child process continues its parent's trace through
``TRACEPARENT`` (W3C Trace Context).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

from graftline.errors import ConfigError

try:
    from opentelemetry import context, propagate, trace
except ImportError:  # The interface alone is small, and comes with the extra too.
    trace = None  # type: ignore[assignment]

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
PARENT_VARIABLE = "TRACEPARENT"

Value = str | int | float | bool


def start(service: str) -> bool:
    """Export this process's spans if the environment sets an endpoint; the last ones are sent at exit.

    Args:
        service: name of the part of graftline that runs.

    Returns:
        Whether this call started the export: False also if it was already running.

    Raises:
        ConfigError: an endpoint is set and the extra is not installed.
    """
    if not os.environ.get(ENDPOINT_VARIABLE):
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{ENDPOINT_VARIABLE} is set, but {error.name} is not installed; pip install -c constraints.txt "
            "'.[telemetry]', or leave the variable out"
        ) from error
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return False
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    context.attach(propagate.extract({"traceparent": os.environ.get(PARENT_VARIABLE, "")}))
    return True


@contextlib.contextmanager
def span(name: str, *, carrier: Mapping[str, str] | None = None, **attributes: Value) -> Iterator[dict[str, Value]]:
    """A span around the block; costs next to nothing if traces are off.

    Args:
        name: short and with few distinct values, such as ``stage train``.
        carrier: headers that may name the caller's trace.
        attributes: the attributes known at the start.

    Yields:
        A dictionary whose entries become attributes at the end.
    """
    late: dict[str, Value] = {}
    if trace is None:
        yield late
        return
    parent = propagate.extract(carrier) if carrier else None
    tracer = trace.get_tracer("graftline")
    with tracer.start_as_current_span(name, context=parent, attributes=attributes) as current:
        yield late
        for key, value in late.items():
            current.set_attribute(key, value)


def from_parent() -> dict[str, str]:
    """The trace of the process that started this work, as a carrier of `span`."""
    return {"traceparent": parent} if (parent := os.environ.get(PARENT_VARIABLE)) else {}


def for_child() -> dict[str, str]:
    """Environment variables that let a child process continue this trace; empty if traces are off."""
    if trace is None:
        return {}
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {PARENT_VARIABLE: carrier["traceparent"]} if "traceparent" in carrier else {}
