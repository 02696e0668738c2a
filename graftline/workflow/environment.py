"""The environment of git, DVC and the stages, without variables that would lead them to other code.

Git hooks and aliases set GIT_DIR and GIT_INDEX_FILE, images and shells set PYTHONPATH or PYTHONSAFEPATH. With those, a
child process would work on another repository, or run other code than its folder's.
"""

import os
import re
import sys
from pathlib import Path

from graftline import logs, program
from graftline.doctor import prefect_server
from graftline.errors import ConfigError

# How a server is reached, who commits, and where the user's configuration is. All others of git's are removed.
_GIT = re.compile(
    r"GIT_(SSH|SSH_COMMAND|SSH_VARIANT|ASKPASS|TERMINAL_PROMPT|SSL_\w+|HTTP_\w+|PROXY_\w+|ALLOW_PROTOCOL|"
    r"CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)|(AUTHOR|COMMITTER)_(NAME|EMAIL))"
)
# None of these names code, or something that runs before it.
_PYTHON = re.compile(
    r"PYTHON(UTF8|IOENCODING|NOUSERSITE|USERBASE|DONTWRITEBYTECODE|PYCACHEPREFIX|FAULTHANDLER|MALLOC|HASHSEED)"
)
# Start-up files and functions of a shell can put another `python` first; DVC's variables are those of an outer run.
_NEVER = re.compile(
    r"GIT_.*|PYTHON.*|VIRTUAL_ENV|__PYVENV_LAUNCHER__|BASH_ENV|ENV|BASH_FUNC_.*|DVC_(ROOT|STAGE|EXP_.*)", re.DOTALL
)
# Of git's settings in variables (`git -c`, CI): those about trust and about how a server is reached.
_SETTING = re.compile(r"(safe|http|credential|url|protocol|ssh|user)\.|core\.sshcommand$", re.IGNORECASE)

# Paths, which are relative to the folder in which the flow was started, not to a worktree.
_PATHS = re.compile(
    r"GRAFTLINE_(CACHE|SIGNING_KEY|CHANNEL_KEY)|AWS_(CONFIG_FILE|SHARED_CREDENTIALS_FILE|CA_BUNDLE|WEB_IDENTITY_TOKEN_FILE)|HF_HOME|"
    r"SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|GIT_(SSL_(CAINFO|CAPATH|CERT|KEY)|CONFIG_(GLOBAL|SYSTEM))|"
    r"DVC_(GLOBAL_CONFIG|SYSTEM_CONFIG|SITE_CACHE)_DIR"
)

_OURS = {
    # Hooks are for people's commits and checkouts; DVC's post-checkout hook fails in our worktrees.
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    # Submodules are cloned from the user's checkout (graftline.workflow.worktree), not by `git checkout`.
    "submodule.recurse": "false",
}


def begin_flow_program() -> None:
    """Set Prefect's defaults if a module of the package is started as a program (``python -m flows.retrain``).

    The package `flows` calls it before the module imports Prefect, which then reads the environment. The program is
    restarted where Python does not read file names as UTF-8, as git, DVC and the stages' processes do.
    """
    program.end_quietly_while_importing()
    if program.is_starting():
        program.start_again_where_needed()
        for name, value in for_flows(Path()).items():
            os.environ.setdefault(name, value)


def check_names_of_files(folder: Path) -> None:
    """Raise ConfigError in a process that reads the name of ``folder`` otherwise than as UTF-8: a worker's run."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not os.fsencode(folder).isascii():
        raise ConfigError(
            f"{folder!a} has a name that is not ASCII, and Python reads names of files as {encoding} here, where git "
            "and DVC write UTF-8; start the worker with PYTHONUTF8=1, or in a UTF-8 locale: export LC_ALL=C.UTF-8"
        )


def for_flows(root: Path) -> dict[str, str]:
    """Defaults of Prefect's settings in a flow's process in ``root``, as environment variables."""
    defaults = {
        **prefect_server.stand_ins(root),
        # A first start with telemetry ended in "database is locked".
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # The temporary server takes 10 s of CPU to start; on a busy machine the default of 20 s is not enough.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    }
    if os.environ.get(logs.FORMAT_VARIABLE) == "json":
        defaults["PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER"] = "json"
    return defaults


def for_git() -> dict[str, str]:
    """This process's environment, without what leads git or Python elsewhere, and with git's hooks off."""
    kept = {name: _absolute(name, value) for name, value in os.environ.items() if _is_kept(name)}
    settings = [*_given_settings(), *_OURS.items()]
    kept["GIT_CONFIG_COUNT"] = str(len(settings))
    for index, (key, value) in enumerate(settings):
        kept |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
    # `git status` would otherwise write the user's index, and collide with a commit.
    return kept | {"GIT_OPTIONAL_LOCKS": "0"}


def for_child(root: Path) -> dict[str, str]:
    """The environment of DVC and of stages that run the code of ``root`` with this process's interpreter."""
    own = {
        # `python -m tasks.…` in dvc.yaml must be this interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(root),
        # DVC runs commands in the user's shell, which may read files that change the path.
        "SHELL": "/bin/sh",
    }
    return for_git() | own


def _is_kept(name: str) -> bool:
    return bool(_GIT.fullmatch(name) or _PYTHON.fullmatch(name)) or not _NEVER.fullmatch(name)


def _absolute(name: str, value: str) -> str:
    return str(Path(os.path.expanduser(value)).absolute()) if value and _PATHS.fullmatch(name) else value


def _given_settings() -> list[tuple[str, str]]:
    count = os.environ.get("GIT_CONFIG_COUNT", "")
    given = [
        (os.environ.get(f"GIT_CONFIG_KEY_{index}", ""), os.environ.get(f"GIT_CONFIG_VALUE_{index}", ""))
        for index in range(int(count) if count.isdecimal() else 0)
    ]
    return [(key, value) for key, value in given if _SETTING.match(key)]
