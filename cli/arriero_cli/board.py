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

from arriero_cli.view import GroupView, RankLine

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
_QUIET_RECORD = re.compile(r"\S+ [DI] ")  # the workers' log lines: time, level, name, message
_BAR = 24


class Board:
    """Prints to one console. `verbose` also shows the pods' log records that are no warnings."""

    def __init__(self, view: GroupView, console: Console, *, verbose: bool = False) -> None:
        self._view, self._console, self._verbose = view, console, verbose
        self._shown: dict[int, RankLine] = {}
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

    # PodEvents

    def pod_started(self, pod: int, pid: int) -> None:
        self._view.pod_started(pod, pid)
        if self._view.pods[pod].starts > 1:
            self.say(f"pod {pod} was started again", "yellow")

    def pod_ended(self, pod: int, how: str, again_in: float) -> None:
        self._view.pod_ended(pod)
        when = "at once" if not again_in else f"in {again_in:g} s"
        self.say(f"pod {pod} ended ({how}); it starts again {when}", "red")
        self.refresh()

    def pod_said(self, pod: int, line: str) -> None:
        if self._verbose or (line.strip() and not _QUIET_RECORD.match(line)):
            self.say(f"pod {pod} | {line}", "dim")

    def _print_changes(self) -> None:
        for line in self._view.ranks():
            shown = self._shown.get(line.rank)
            if shown is None or shown.key != line.key:
                self._shown[line.rank] = line
                self._console.print(_sentence(line), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        for line in self._view.ranks():
            bar = ProgressBar(total=max(line.total, 1), completed=line.loaded, width=_BAR)
            table.add_row(
                f"rank {line.rank}",
                Text(line.place, style="dim"),
                Text(line.phase, style=_STYLES[line.phase]),
                bar if line.phase == "loading" else "",
                Text(line.detail, style="dim"),
            )
        return table


def _sentence(line: RankLine) -> Text:
    text = Text(f"rank {line.rank} ({line.place}): ")
    text.append(line.phase, style=_STYLES[line.phase])
    if line.detail:
        text.append(f", {line.detail}")
    return text
