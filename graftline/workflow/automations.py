"""Automations of the Prefect server: restart the runs of dead workers, and notify people.

    python -m graftline.workflow.automations    applies them to the server at PREFECT_API_URL; repeat after an update

Messages are posted to ``GRAFTLINE_NOTIFY_URL`` as ``{"text": …}``, which Slack, Mattermost and many others accept.
Without that variable nobody is notified.
"""

import os
from datetime import timedelta
from typing import cast
from uuid import UUID

from prefect.automations import (
    AutomationCore,
    CallWebhook,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.blocks.fields import SecretDict
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from pydantic import SecretStr

from graftline.errors import ConfigError
from graftline.workflow import leases
from graftline.workflow.outcome import GATE_STOPPED, NIGHT_FINISHED, explained_errors

PREFIX = "graftline: "
NOTIFY_VARIABLE = "GRAFTLINE_NOTIFY_URL"
_BLOCK = "graftline-notify"
_JSON = SecretDict({"Content-Type": "application/json"})

HEARTBEAT_SECONDS = 30
"""Interval of a flow run's heartbeats; workers are started with this PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""
SILENT_SECONDS = 3 * HEARTBEAT_SECONDS
"""A run without a heartbeat for this long is dead."""

_ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled", "Suspended", "Paused")}
_HEARTBEAT = "prefect.flow-run.heartbeat"
_OURS = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.graftline"})
_ANY_RUN = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})


def wanted(notify: CallWebhook | None, *, silent_seconds: float = SILENT_SECONDS) -> list[AutomationCore]:
    """The automations, without the notifications if ``notify`` is None."""
    return [*_recovery(notify, silent_seconds), *(_messages(notify) if notify else ())]


def _recovery(notify: CallWebhook | None, silent_seconds: float) -> list[AutomationCore]:
    def again(message: str) -> ChangeFlowRunState:
        return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message, force=False)

    told = (
        [_say(notify, "'graftline: the worker of ' ~ flow_run.name ~ ' died; the run starts again'")] if notify else []
    )
    return [
        AutomationCore(
            name=PREFIX + "a run that is silent starts again",
            description="Its worker or machine died. Any worker takes it; the flow refuses a fourth attempt.",
            # Straight to the next attempt: a rule that waits for the crash event can wait for a quarter of an hour,
            # if the server has lost the event before it.
            trigger=EventTrigger(
                after={_HEARTBEAT},
                expect={_HEARTBEAT} | _ENDED,
                match=_ANY_RUN,
                match_related=_OURS,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=silent_seconds),
            ),
            actions=[again("no heartbeat: its worker died"), *told],
        ),
        AutomationCore(
            name=PREFIX + "a run that crashed starts again",
            description="Its process ended and its worker said so. The flow refuses a fourth attempt.",
            # Only after a heartbeat: a run that cannot start, such as one whose clone fails, would restart for ever.
            trigger=_event(
                {"prefect.flow-run.Crashed"}, match_related=_OURS, after={_HEARTBEAT}, within=timedelta(days=7)
            ),
            actions=[again("its process ended")],
        ),
    ]


def _say(notify: CallWebhook, text: str) -> CallWebhook:
    return notify.model_copy(update={"payload": '{"text": {{ (' + text + ") | tojson }}}"})


def _messages(notify: CallWebhook) -> list[AutomationCore]:
    failure = "'graftline: ' ~ flow_run.name ~ ' ended badly: ' ~ flow_run.state.message ~ ' ' ~ flow_run|ui_url"
    gate = "'graftline: a gate stopped ' ~ event.resource.id.split('.')[-1] ~ ': ' ~ event.payload['summary']"
    night = "'graftline: the night: ' ~ event.payload"
    return [
        AutomationCore(
            name=PREFIX + "tell people of a failure",
            trigger=_event({"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, match_related=_OURS),
            actions=[_say(notify, failure)],
        ),
        AutomationCore(
            name=PREFIX + "tell people of a gate that stopped a release",
            trigger=_event({GATE_STOPPED}, resource="graftline.pipeline.*"),
            actions=[_say(notify, gate)],
        ),
        AutomationCore(
            name=PREFIX + "tell people how the night was",
            trigger=_event({NIGHT_FINISHED}, resource="graftline.night"),
            actions=[_say(notify, night)],
        ),
    ]


def _event(
    names: set[str],
    *,
    resource: str = "prefect.flow-run.*",
    match_related: ResourceSpecification | None = None,
    after: frozenset[str] | set[str] = frozenset(),
    within: timedelta = timedelta(0),
) -> EventTrigger:
    return EventTrigger(
        after=set(after),
        expect=names,
        match=ResourceSpecification({"prefect.resource.id": resource}),
        match_related=match_related or ResourceSpecification({}),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=within,
    )


def apply(notify_url: str | None, *, silent_seconds: float = SILENT_SECONDS) -> dict[str, str]:
    """Create, update and remove the server's automations of ours; returns what was done, by name."""
    notify = None
    if notify_url:
        block = Webhook(method="POST", url=SecretStr(notify_url), headers=_JSON).save(_BLOCK, overwrite=True)
        notify = CallWebhook(block_document_id=cast(UUID, block))
    done = {}
    with get_client(sync_client=True) as client:
        names = set()
        for automation in wanted(notify, silent_seconds=silent_seconds):
            names.add(automation.name)
            done[automation.name] = _put(client, automation)
        for old in client.read_automations():
            if old.name.startswith(PREFIX) and old.name not in names:
                client.delete_automation(old.id)
                done[old.name] = "removed"
    return done


def _put(client: SyncPrefectClient, automation: AutomationCore) -> str:
    there = client.read_automations_by_name(automation.name)
    if not there:
        client.create_automation(automation)
        return "created"
    client.update_automation(there[0].id, automation)
    return "updated"


def main() -> None:
    """Command line: exit code 2 for an error that its message explains."""
    with explained_errors():
        if not leases.has_server():
            raise ConfigError("PREFECT_API_URL is not set; expected the address of the server, http://HOST:4200/api")
        url = os.environ.get(NOTIFY_VARIABLE)
        for name, what in apply(url).items():
            print(f"{what:<8} {name}")
        if not url:
            print(f"note: {NOTIFY_VARIABLE} is not set, so nobody is told of failures and stopped releases")


if __name__ == "__main__":
    main()
