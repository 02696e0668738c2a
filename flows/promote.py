"""Put a release into a channel, if everything that the channel's policy asks for is there.

1. Bring the pipeline's line up to date: if production has moved on since the verdict, the candidate is judged again.
2. With ``ask``, wait for a person's decision on the flow run's page. Where ``GRAFTLINE_APPROVAL_KEY`` names a key of
   this server's own, a yes becomes an approval signed with it; its roles in keys.yaml say what it counts for.
3. Promote: signature, digests, verdict, approvals and smoke run are checked, then one entry is written.

    python -m flows.promote wordnet-category --reason "approved in review"
"""

import argparse
import os
import sys
from pathlib import Path

from prefect import flow, get_run_logger, pause_flow_run, task
from prefect.input import RunInput

from flows.retrain import RETRIES, RETRY_DELAYS_SECONDS, may_pass, retrain
from graftline import settings
from graftline.cli.arguments import known_channel
from graftline.errors import PromotionError
from graftline.plain_text import one_line
from graftline.workflow import stages
from graftline.workflow.command import explained_errors

APPROVAL_KEY = "GRAFTLINE_APPROVAL_KEY"
"""Environment variable with the path of the private key that signs what people decide on the run's page."""


class Decision(RunInput):
    """What the person at the page is asked."""

    approve: bool
    """Whether the release may enter the channel."""
    actor: str
    """Who decides."""
    reason: str
    """Why; it becomes part of the channel's history."""


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass)
def sign(pipeline: str, version: str, channel: str, key: str, root: Path) -> None:
    """Put the decision into the store as a signed approval."""
    command = [sys.executable, "-m", "graftline.cli", "approve", pipeline, version, "--channel", channel, "--key", key]
    stages.run_command(command, stage="approve", pipeline=pipeline, root=root, on_line=get_run_logger().info)


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass)
def enter(pipeline: str, version: str, channel: str, actor: str | None, reason: str, root: Path) -> None:
    """Check and write the entry, in a process of its own."""
    command = [sys.executable, "-m", "graftline.cli", "promote", pipeline, version, "--reason", reason]
    command += ["--channel", channel] + (["--as", actor] if actor else [])
    stages.run_command(command, stage="promote", pipeline=pipeline, root=root, on_line=get_run_logger().info)


@flow(name="promote", flow_run_name="promote-{pipeline}-{channel}")
def promote(pipeline: str, channel: str, reason: str, actor: str | None = None, ask: bool = False) -> str:
    """Promote the pipeline's newest release.

    Args:
        pipeline: a name from pipelines.yaml.
        channel: a name from pipelines.yaml's ``channels``.
        reason: why; part of the channel's history.
        actor: who promotes; the user that the process runs as when left out.
        ask: wait up to an hour for a person's decision on the run's page. Needs a Prefect server that stays.

    Returns:
        The version that the channel holds now.
    """
    root = Path.cwd()
    if (root / settings.DEFAULT_FILE).is_file():
        known_channel(settings.load(root / settings.DEFAULT_FILE), channel)  # before hours of work for a mistyped name
    outcome = retrain(pipeline)
    if outcome.version is None:
        raise PromotionError(
            f"{pipeline} has no release to promote: the gates say {outcome.verdict}; see {outcome.report}"
        )
    if ask:
        decision = pause_flow_run(wait_for_input=Decision, timeout=3600)
        if not decision.approve:
            said = one_line(f"{decision.actor} declined {outcome.version} for {channel}: {decision.reason}")
            raise PromotionError(said)
        actor, reason = decision.actor, decision.reason
        if key := os.environ.get(APPROVAL_KEY):
            sign(pipeline, outcome.version, channel, key, root)
    enter(pipeline, outcome.version, channel, actor, reason, root)
    return outcome.version


def main() -> None:
    """Command line: exit code 0 promoted, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description="Put the newest release of a pipeline into a channel.",
        epilog='example: python -m flows.promote wordnet-category --channel staging --reason "nightly"',
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--channel", default="production", help="a name from channels (default production)")
    parser.add_argument("--reason", required=True, help="why; part of the channel's history")
    parser.add_argument("--actor", help="who promotes (default: the user that this runs as)")
    parser.add_argument("--ask", action="store_true", help="wait for a person's decision on the flow run's page")
    arguments = parser.parse_args()
    with explained_errors():
        version = promote(arguments.pipeline, arguments.channel, arguments.reason, arguments.actor, arguments.ask)
    print(f"{arguments.channel} of {arguments.pipeline} holds {version}")


if __name__ == "__main__":
    main()
