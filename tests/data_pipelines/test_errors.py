"""Messages are one line that no terminal acts on, whatever names they quote."""

import pickle

import pytest

from data_pipelines.errors import MAX_MESSAGE, UserError, one_line_logger, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("take 1 – Übung 日.mp4", "take 1 – Übung 日.mp4"),
        ("a\nb\t\r.mp4", r"a\nb\t\r.mp4"),
        ("\x1b[2J.mp4", r"\x1b[2J.mp4"),
        ("\x9b2J\u202e4pm", r"\x9b2J\u202e4pm"),
        ("caf\udce9.mp4", r"caf\udce9.mp4"),
    ],
)
def test_names_are_shown_on_one_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    error = UserError(f"'{name}' is missing")
    assert str(error) == f"'{shown}' is missing" == str(pickle.loads(pickle.dumps(error)))


def test_log_messages_are_one_line_too(caplog: pytest.LogCaptureFixture) -> None:
    one_line_logger("data_pipelines.anywhere").warning("'%s' and %d more", "a\n\x1b[2J", 3)
    assert caplog.messages == [r"'a\n\x1b[2J' and 3 more"]


def test_the_middle_of_a_very_long_message_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    text = f"fps={'x' * 100_000}: it must be a number"
    one_line_logger("data_pipelines.anywhere").warning(text)
    for message in (str(UserError(text)), *caplog.messages):
        assert message.startswith("fps=xxx") and message.endswith("x: it must be a number")
        assert "96,0" in message and len(message) <= MAX_MESSAGE
    assert str(UserError("x" * MAX_MESSAGE)) == "x" * MAX_MESSAGE
