import pytest

from flows.command import explained_errors
from graftline.errors import ConfigError


def test_an_explained_error_is_its_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"), explained_errors():
        raise ConfigError("given 3; expected 4")
    assert capsys.readouterr().err == "error: given 3; expected 4\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), explained_errors():
        raise ZeroDivisionError
