"""The promotion of a release: a person's decision on the flow run's page, the signed approval, the channel's entry."""

import os
import sys
from pathlib import Path

from prefect import get_run_logger, pause_flow_run, task
from prefect.input import RunInput

from graftline import settings
from graftline.errors import GraftlineError, PromotionError
from graftline.plain_text import one_line
from graftline.workflow import stages
from graftline.workflow.outcome import Outcome
from graftline.workflow.process import RETRIES, RETRY_DELAYS_SECONDS, may_pass

APPROVAL_KEY = "GRAFTLINE_APPROVAL_KEY"
"""Environment variable with the path of the private key that signs decisions on the run's page."""


class Decision(RunInput):
    """The form on the flow run's page."""

    approve: bool
    """Whether the release may enter the channel."""
    actor: str
    """Who decides."""
    reason: str
    """Why; it becomes part of the channel's history."""


def check_channel(channel: str) -> None:
    """Raise ConfigError, before hours of work, if the current folder's pipelines.yaml lacks the channel."""
    file = Path.cwd() / settings.DEFAULT_FILE
    if file.is_file():
        settings.load(file).known_channel(channel)


def released(outcome: Outcome) -> str:
    """The version that a run released; PromotionError if its gates did not pass."""
    if outcome.version is None:
        raise PromotionError(
            f"{outcome.pipeline} has no release to promote: the gates say {outcome.verdict}; see {outcome.report}"
        )
    return outcome.version


def ask(pipeline: str, version: str, channel: str) -> tuple[str, str]:
    """Wait up to an hour for a person's decision on the run's page, and sign an approval if there is a key.

    Returns who decided, and why; raises PromotionError if they declined.
    """
    decision = pause_flow_run(wait_for_input=Decision, timeout=3600)
    if not decision.approve:
        raise PromotionError(one_line(f"{decision.actor} declined {version} for {channel}: {decision.reason}"))
    if key := os.environ.get(APPROVAL_KEY):
        sign(pipeline, version, channel, key)
    return decision.actor, decision.reason


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass)
def sign(pipeline: str, version: str, channel: str, key: str) -> None:
    """Put a signed approval into the store."""
    _run("approve", pipeline, version, "--channel", channel, "--key", key)


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass)
def enter(pipeline: str, version: str, channel: str, actor: str | None, reason: str) -> None:
    """Check the promotion and write the channel's entry, in a subprocess."""
    named = ["--as", actor] if actor else []
    _run("promote", pipeline, version, "--reason", reason, "--channel", channel, *named)


def tell(pipeline: str, channel: str) -> None:
    """See that the channel's webhooks are told of its newest entries; one that stays down is a line in the run's log.

    The entry's own command has told those that answered. This one asks the others again for some minutes.
    """
    if channel in _told_channels():
        # With its state, because a receiver must not fail a run that has promoted.
        tell_receivers(pipeline, channel, return_state=True)


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS)
def tell_receivers(pipeline: str, channel: str) -> None:
    """Send webhooks what they have not got yet."""
    _run("tell", pipeline, "--channel", channel)


def tell_all() -> None:
    """Send the webhooks of all channels what they have not got yet, such as after a crash; problems are logged only."""
    if not _told_channels():
        return
    try:
        _run("tell", "")
    except GraftlineError as error:
        get_run_logger().warning("not everybody was told what channels hold: %s", error)


def _told_channels() -> set[str]:
    """The channels of the current folder's pipelines.yaml that have webhooks."""
    file = Path.cwd() / settings.DEFAULT_FILE
    channels = settings.load(file).channels if file.is_file() else {}
    return {name for name, policy in channels.items() if policy.webhooks}


def _run(verb: str, pipeline: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "graftline.cli", verb, *filter(None, (pipeline, *arguments))]
    stages.run_command(command, stage=verb, pipeline=pipeline, root=Path.cwd(), on_line=get_run_logger().info)
