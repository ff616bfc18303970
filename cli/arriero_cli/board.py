"""What `arriero up` shows: one line per rank, rewritten in place on a terminal while the weights load, and printed at
each change elsewhere and afterwards.
"""

from __future__ import annotations

import re

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arriero_cli.view import DeploymentView, ProcessView, RankLine

_STYLES = {
    "gone": "red",
    "starting": "dim",
    "loading": "cyan",
    "warming": "yellow",
    "joining": "magenta",
    "serving": "green",
    "draining": "yellow",
    "failed": "bold red",
}
_QUIET_RECORD = re.compile(r"\S+ [DI] ")  # log lines of this project: time, level, name, message
_BAR = 24


class Board:
    """Prints to one console. `verbose` also shows the processes' log records that are no warnings."""

    def __init__(self, view: DeploymentView, console: Console, *, verbose: bool = False) -> None:
        self._view, self._console, self._verbose = view, console, verbose
        self._shown: dict[tuple[int, int], RankLine] = {}
        self._live: Live | None = None

    def open(self) -> None:
        """Begin to rewrite lines in place, where the console can."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def close(self) -> None:
        """Leave the lines as they are; from now on changes are printed."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._print_changes()

    def refresh(self) -> None:
        """Show what changed since the last time."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._print_changes()

    def say(self, text: str, style: str = "") -> None:
        """Print a text of its own; it is never wrapped, so that what it holds can be pasted."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def row(self, name: str, view: ProcessView) -> Row:
        """Where the events of one process go: to its view, and shown under its name."""
        return Row(self, name, view)

    def shows(self, line: str) -> bool:
        """Whether a line that a process wrote is worth showing."""
        return self._verbose or bool(line.strip() and not _QUIET_RECORD.match(line))

    def _ranks(self) -> list[tuple[int, RankLine]]:
        return [(index, line) for index, replica in enumerate(self._view.replicas) for line in replica.ranks()]

    def _print_changes(self) -> None:
        for replica, line in self._ranks():
            shown = self._shown.get((replica, line.rank))
            if shown is None or shown.key != line.key:
                self._shown[replica, line.rank] = line
                self._console.print(_sentence(self._view.name(replica, "rank", line.rank), line), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for replica, line in self._ranks():
            bar = ProgressBar(total=max(line.total, 1), completed=line.loaded, width=_BAR)
            table.add_row(
                self._view.name(replica, "rank", line.rank),
                Text(line.place, style="dim"),
                Text(line.phase, style=_STYLES[line.phase]),
                bar if line.phase == "loading" else "",
                Text(line.detail, style="dim"),
            )
        return table


class Row:
    """The events of one process (ProcessEvents)."""

    def __init__(self, board: Board, name: str, view: ProcessView) -> None:
        self._board, self._name, self._view = board, name, view

    def started(self, pid: int) -> None:
        self._view.started(pid)
        if self._view.starts > 1:
            self._board.say(f"{self._name} was started again", "yellow")

    def ended(self, how: str, again_in: float) -> None:
        self._view.ended()
        when = "at once" if not again_in else f"in {again_in:g} s"
        self._board.say(f"{self._name} ended ({how}); it starts again {when}", "red")
        self._board.refresh()

    def said(self, line: str) -> None:
        if self._board.shows(line):
            self._board.say(f"{self._name} | {line}", "dim")


def _sentence(name: str, line: RankLine) -> Text:
    text = Text(f"{name} ({line.place}): ")
    text.append(line.phase, style=_STYLES[line.phase])
    if line.detail:
        text.append(f", {line.detail}")
    return text
