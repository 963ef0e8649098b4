# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Titles, lines and tables, for terminals of any width and for notebooks. torch is not needed."""

from __future__ import annotations

import html
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Table = dict[str, Sequence[str]]
"""Title of column to cells."""

_TO_THE_LEFT = ("name", "shape", "dtype", "device", "condition", "setting", "key", "before", "after")
_FOLDED = ("name", "before", "after")
_GAP = 2


class Part(NamedTuple):
    """`kind`: title, text or table."""

    kind: str
    content: Any


class Printed:
    """Something that prints as titles, lines and tables: those of `_parts`, where a class has no layout of its own."""

    def _parts(self) -> Iterator[Part]:
        raise NotImplementedError

    def text(self, width: int | None = None) -> str:
        """As it is printed, at most `width` characters wide where names can be folded so far; None: the terminal's."""
        return rendered(self, width)

    __str__ = text
    __repr__ = text

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.text import Text

        for number, (kind, content) in enumerate(self._parts()):
            if kind == "table":
                yield from (Text(), rich_table(content))
            else:
                gap = "\n" if kind == "title" and number else ""
                yield Text(gap + content, style="bold" if kind == "title" else "")

    def _repr_html_(self) -> str:
        parts = self._parts()
        return "\n".join(
            html_table(content) if kind == "table" else html_line("p", content, bold=kind == "title")
            for kind, content in parts
        )


def rendered(thing: Any, width: int | None = None) -> str:
    """What rich prints of it, without colours; ImportError without rich."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f"the table of a {type(thing).__name__.lower()} needs rich: {_INSTALL}") from error
    file = io.StringIO()
    width = width or shutil.get_terminal_size().columns
    Console(file=file, width=width, color_system=None, highlight=False, force_jupyter=False).print(thing)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


_INSTALL = "pip install fusestep[torch]"


# ---- layouts -----------------------------------------------------------------------------------


def widths_of(tables: Sequence[Table], width: int) -> dict[str, int]:
    """Of every column but the name's its longest cell or word of the title; the name has what is left."""
    longest: dict[str, int] = {}
    for table in tables:
        for title, cells in table.items():
            longest[title] = max([longest.get(title, 0), *map(len, [*title.split("_"), *cells])])
    others = sum(size + _GAP for title, size in longest.items() if title != "name")
    longest["name"] = min(longest["name"], max(width - others, 12))
    return longest


def rich_table(table: Table, widths: Mapping[str, int] | None = None, header: bool = True) -> Any:
    """A rich table. Without widths, columns of names and values are folded to fit."""
    from rich import box
    from rich import table as rich

    layout = dict(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    made = rich.Table(show_header=header, **layout)
    for title in table:
        justify = "left" if title in _TO_THE_LEFT else "right"
        width = None if widths is None else widths[title]
        fixed = widths is None and title not in _FOLDED
        shown = title if widths is None else title.replace("_", " ")  # so that it can be folded
        made.add_column(shown, justify=justify, overflow="fold", width=width, no_wrap=fixed)
    for cells in zip(*table.values(), strict=True):
        made.add_row(*cells)
    return made


def html_line(tag: str, text: str, bold: bool = False) -> str:
    text = html.escape(text)
    return f"<{tag}>{f'<b>{text}</b>' if bold else text}</{tag}>"


def html_table(table: Table) -> str:
    def line(tag, cells):
        return f"<tr>{''.join(html_line(tag, cell) for cell in cells)}</tr>"

    rows = [line("td", cells) for cells in zip(*table.values(), strict=True)]
    return "\n".join(["<table>", line("th", table), *rows, "</table>"])


# ---- texts -------------------------------------------------------------------------------------


def settings_text(settings: Mapping[str, Any]) -> str:
    """Without what is switched off or left to torch."""
    shown = {name: value for name, value in settings.items() if value is not None and value is not False}
    return ", ".join(f"{name} {value_text(value)}" for name, value in shown.items())


def value_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(value_text, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shape_text(shape: Iterable[int]) -> str:
    return "\u00d7".join(map(str, shape)) or "scalar"


def count_text(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(number: float) -> str:
    """Of bytes."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.0f} {units[0]}" if units[0] == "B" or number >= 100 else f"{number:.1f} {units[0]}"


def listed(names: Iterable[str], limit: int = 6) -> str:
    """`a, b and 3 more`."""
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[: limit - 1])} and {len(names) - limit + 1} more"
