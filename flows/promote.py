"""Put a pipeline's newest release into a channel, if everything that the channel's policy asks for is there.

The line is brought up to date first: if production has moved on since the verdict, the candidate is judged again. Where
``GRAFTLINE_APPROVAL_KEY`` names a private key, a yes on the run's page becomes an approval signed with it.

    python -m flows.promote wordnet-category --reason "approved in review"
"""

import argparse

from prefect import flow

from flows.retrain import retrain
from graftline.workflow import promotion
from graftline.workflow.process import begin, flow_command


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
        The version that entered the channel: whole, or with the first share of its traffic.
    """
    begin()
    promotion.check_channel(channel)
    version = promotion.released(retrain(pipeline))
    if ask:
        actor, reason = promotion.ask(pipeline, version, channel)
    promotion.enter(pipeline, version, channel, actor, reason)
    promotion.tell(pipeline, channel)
    return version


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
    given = parser.parse_args()
    with flow_command():
        version = promote(given.pipeline, given.channel, given.reason, given.actor, given.ask)
    print(f"{version} entered {given.channel} of {given.pipeline}")


if __name__ == "__main__":
    main()
