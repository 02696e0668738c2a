"""Decide about a rollout: ask the servers every half minute, give the candidate the next share, or go back.

`flows.promote` starts a rollout where the channel's policy has shares. Without this flow the last state stays; it can
be started again at any time, and several are no harm.

    python -m flows.rollout wordnet-category --server http://127.0.0.1:8000
"""

import argparse

from prefect import flow, get_run_logger

from graftline.workflow import promotion, rolling_out
from graftline.workflow.process import begin, flow_command


@flow(name="rollout", flow_run_name="rollout-{pipeline}-{channel}")
def rollout(pipeline: str, servers: list[str], channel: str = "production", every_seconds: float = 30.0) -> str:
    """Drive a channel's rollout until the candidate is promoted or gone.

    Args:
        pipeline: a name from pipelines.yaml.
        servers: addresses of all servers that answer the channel's requests.
        channel: a name from pipelines.yaml's ``channels``, with a ``rollout``.
        every_seconds: time between two looks, which cost the test nothing.

    Returns:
        The version that the channel holds now.
    """
    begin()
    driver = rolling_out.open_driver(pipeline, channel, servers)
    version = rolling_out.drive(driver, every_seconds=every_seconds, tell=get_run_logger().info).version
    promotion.tell(pipeline, channel)
    return version


def main() -> None:
    """Command line: exit code 0 the rollout is over, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description="Drive a channel's rollout: next share, or back.",
        epilog="example: python -m flows.rollout wordnet-category --server http://127.0.0.1:8000",
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--channel", default="production", help="a name from channels (default production)")
    parser.add_argument("--server", action="append", required=True, metavar="URL", help="one that answers; repeatable")
    parser.add_argument("--every-seconds", type=float, default=30.0, help="time between two looks (default 30)")
    given = parser.parse_args()
    with flow_command():
        version = rollout(given.pipeline, given.server, given.channel, given.every_seconds)
    print(f"{given.channel} of {given.pipeline} holds {version}")


if __name__ == "__main__":
    main()
