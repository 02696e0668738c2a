"""Traces arrive by OTLP at a receiver as any collector is one."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from graftline import tracing
from graftline.errors import ConfigError
from graftline.workflow.environment import for_flows


class Collector:
    """What was sent, by span name."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PARENT = """
import sys
from pathlib import Path
from graftline.workflow import process, stages
from graftline import tracing
process.begin()
with tracing.span("flow"):
    command = [sys.executable, "-c", sys.argv[1]]
    stages.run_command(command, stage="train", pipeline="pets", root=Path.cwd(), on_line=print)
"""
CHILD = """
from graftline import tracing
tracing.start("graftline-stages")
with tracing.span("stage train", **{"graftline.pipeline": "pets"}) as measured:
    measured["graftline.seconds"] = 1.5
"""


def test_a_stage_s_span_lies_below_its_flow_s_in_one_trace(tmp_path: Path, collector: tuple[Collector, str]) -> None:
    found, endpoint = collector
    subprocess.run(
        [sys.executable, "-c", PARENT, CHILD],
        cwd=tmp_path,
        env=os.environ | {tracing.ENDPOINT_VARIABLE: endpoint},
        check=True,
        timeout=60,
    )

    flow, stage = found.spans["flow"], found.spans["stage train"]
    assert stage.trace_id == flow.trace_id
    assert stage.parent_span_id == flow.span_id
    assert {a.key: a.value.string_value or a.value.double_value for a in stage.attributes} == {
        "graftline.pipeline": "pets",
        "graftline.seconds": 1.5,
    }
    assert found.services == {"graftline-flows", "graftline-stages"}


STARTED_BY_A_WORKER = """
import sys
from pathlib import Path
from prefect import flow, task
from graftline.workflow import process, stages

@task
def reproduce():
    command = [sys.executable, "-c", sys.argv[1]]
    stages.run_command(command, stage="train", pipeline="pets", root=Path.cwd(), on_line=print)

@flow
def night():
    process.begin()
    reproduce()

night()
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_flow_that_a_worker_starts_has_one_trace_down_to_its_stages(
    tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    found, endpoint = collector
    prefect = {"PREFECT_HOME": str(tmp_path), **for_flows(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", STARTED_BY_A_WORKER, CHILD],
        cwd=tmp_path,
        env=os.environ | prefect | {tracing.ENDPOINT_VARIABLE: endpoint},
        check=True,
        timeout=240,
    )

    flow, stage = found.spans["flow night"], found.spans["stage train"]
    assert stage.trace_id == flow.trace_id
    (task,) = [span for span in found.spans.values() if span.span_id == stage.parent_span_id]
    assert task.parent_span_id == flow.span_id


def test_nothing_is_sent_or_handed_on_where_no_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.ENDPOINT_VARIABLE, raising=False)
    tracing.start("graftline")
    with tracing.span("stage train") as measured:
        measured["graftline.seconds"] = 1.0
        assert tracing.for_child() == {}


def test_an_endpoint_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLE, "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"is not installed; pip install .*\[telemetry\]"):
        tracing.start("graftline")
