"""Progress: a bar on a terminal, lines in a log."""

import io

from fitscale.config import bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(stream: io.StringIO, monkeypatch) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with bars.bar(40, "samples", "image") as bar:
        for _ in range(4):
            bar.update(10)
            bar.refresh()
    return stream.getvalue()


def test_without_a_terminal_every_state_is_a_line(monkeypatch):
    lines = shown_on(io.StringIO(), monkeypatch).split("\n")
    assert lines.pop() == "" and len(lines) == 6 and not any("\r" in line for line in lines)
    assert all(line.startswith("samples: ") and "image/s" in line for line in lines)
    assert "0/40" in lines[0] and "40/40" in lines[-1]


def test_without_a_terminal_lines_are_seconds_apart(monkeypatch):
    """Updates come as often as images; a log gets the first state and the last."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with bars.bar(1000, "samples", "image") as bar:
        for _ in range(1000):
            bar.update()
    assert stream.getvalue().count("\n") == 2


def test_a_terminal_has_one_line_that_is_written_over(monkeypatch):
    told = shown_on(Terminal(), monkeypatch)
    assert told.count("\n") == 1 and told.count("\r") == 6
