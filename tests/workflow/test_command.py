from types import SimpleNamespace

import pytest

from graftline.errors import ConfigError, GraftlineError
from graftline.workflow import line
from graftline.workflow.outcome import explained_errors


def test_an_explained_error_is_its_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"), explained_errors():
        raise ConfigError("given 3; expected 4")
    assert capsys.readouterr().err == "error: given 3; expected 4\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), explained_errors():
        raise ZeroDivisionError


def test_a_run_whose_worker_died_three_times_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "flow_run", SimpleNamespace(run_count=line.MAX_ATTEMPTS))
    line._check_attempts()
    monkeypatch.setattr(line, "flow_run", SimpleNamespace(run_count=line.MAX_ATTEMPTS + 1))
    with pytest.raises(GraftlineError, match="attempt 4 of this run: its worker died each time"):
        line._check_attempts()
