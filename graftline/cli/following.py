"""The command that has vLLM follow channels: a sidecar for the replicas, and the router in front of them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from graftline import settings
from graftline.cli.arguments import Unsigned, trust_of
from graftline.cli.serving import followed_channels, tokens_in
from graftline.data.sources import default_cache
from graftline.errors import ConfigError
from graftline.registry.keys import KEY_FILE, KeyFile
from graftline.registry.store import Store, open_store
from graftline.registry.trust import Trust, judged_head
from graftline.serve import ADMIN_TOKENS_VARIABLE

API_KEY_VARIABLE = "VLLM_API_KEY"

Followed = Annotated[
    list[str], typer.Argument(metavar="PIPELINE[@CHANNEL]...", help="Channels of one store.", show_default=False)
]
Replicas = Annotated[list[str] | None, typer.Option("--vllm", metavar="URL", help="A vLLM process; may be repeated.")]
Base = Annotated[Path | None, typer.Option("--base", metavar="FOLDER", help="The base that vLLM serves.")]
Shared = Annotated[
    Path | None, typer.Option("--folder", metavar="FOLDER", help="Adapters go here; vLLM sees it at the same path.")
]
Host = Annotated[str, typer.Option("--host", help="Address of the router.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535)]
PrintLlmD = Annotated[
    str | None,
    typer.Option(
        "--print-llm-d",
        metavar="POOL",
        help="Do not follow: print an InferenceModelRewrite for this InferencePool, with what the channels hold now.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    example = (
        "Example: graftline follow wordnet-category --vllm http://10.0.0.5:8000 --base runs/wordnet-category/init/base "
        "--folder /srv/adapters"
    )
    app.command("follow", epilog=example)(follow)


def follow(  # noqa: PLR0913  # each is an option of the command
    followed: Followed,
    vllm: Replicas = None,
    base: Base = None,
    folder: Shared = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    print_llm_d: PrintLlmD = None,
    unsigned: Unsigned = False,
) -> None:
    """Have vLLM serve what channels hold: load, try, and route to it. Clients ask the router for PIPELINE@CHANNEL.

    vLLM is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora; its --api-key comes from VLLM_API_KEY.
    """
    loaded, cache = settings.load(), default_cache(Path.cwd())
    trust = trust_of(loaded, unsigned=unsigned)
    if print_llm_d is not None:
        url, named = followed_channels(followed)
        _print_llm_d(open_store(url, seen=cache / "seen"), named, print_llm_d, trust)
        return
    if not (vllm and base and folder):
        raise ConfigError(
            "--vllm, --base and --folder are needed: vLLM's addresses, its base, and a folder it sees too"
        )
    if not base.is_dir():
        raise ConfigError(f"--base {base} was given; there is no such folder")
    for address in vllm:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"--vllm {address} was given; expected an address such as http://127.0.0.1:8000")
    url, named = followed_channels(followed)

    # Imported here: torch takes seconds.
    from graftline.serve.follower import ChannelRef
    from graftline.serve.vllm_follower import VllmFollowing, exporter, serve

    following = VllmFollowing(
        channels=tuple(ChannelRef(pipeline, channel) for pipeline, channel in named),
        folder=folder.absolute(),
        export=exporter(base),
        keys=KeyFile(loaded.root / KEY_FILE, may_be_absent=unsigned),
        policies=loaded.channels,
        judges={name: one.rollout.judge for name, one in loaded.channels.items() if one.rollout},
        token=os.environ.get(API_KEY_VARIABLE) or None,
    )
    store = open_store(url, seen=cache / "seen")
    serve(store, vllm, following, admin_tokens=tokens_in(ADMIN_TOKENS_VARIABLE), address=(host, port))


def _print_llm_d(store: Store, named: list[tuple[str, str]], pool: str, trust: Trust | None) -> None:
    from ruamel.yaml import YAML

    from graftline.serve.follower import ChannelRef
    from graftline.serve.llm_d import model_rewrite

    found = []
    for pipeline, channel in named:
        entry, _ = judged_head(store, pipeline, channel, trust)
        if entry is None:
            raise ConfigError(f"nothing was ever promoted into {channel} of {pipeline}; promote a release first")
        found.append(model_rewrite(ChannelRef(pipeline, channel), entry, pool=pool))
    yaml = YAML()
    yaml.explicit_start = True
    yaml.dump_all(found, sys.stdout)
