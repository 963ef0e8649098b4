# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run, made of its JSON alone."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from .report import FLAT, OURS, OWN, TRUSTED, cases_of, clock_of

_COLORS = {OURS: "tab:red", "torch fused": "tab:blue", "torch foreach": "tab:cyan", "torch for-loop": "tab:gray"}
_COLORS |= {FLAT: "tab:orange", TRUSTED: "tab:pink"}
_MARKERS = {OURS: "o", "torch fused": "s", "torch foreach": "^", "torch for-loop": "v"}
_MORE_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:olive")


def draw(results: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes each picture as PNG and SVG; those for which nothing was measured are left out."""
    files = []
    for name, picture in (
        ("time_against_bytes", time_against_bytes),
        ("speedup", speedup),
        ("host_time", host_time),
    ):
        figure = picture(results["benchmarks"], results["context"])
        if figure is None:
            continue
        for suffix in (".png", ".svg"):
            files.append(folder / f"{name}{suffix}")
            figure.savefig(files[-1], dpi=150)
    return files


# ---- the pictures ------------------------------------------------------------------------------


def time_against_bytes(rows, context):
    """Every step as a point, and the line of the roof."""
    from matplotlib.ticker import EngFormatter

    rows = [row for row in rows if row["operation"] == "step" and "roof_gbps" in row]
    if not rows:
        return None
    figure = _figure(7.4, 4.8)
    axes = figure.add_subplot()
    rate = statistics.median(row["roof_gbps"] for row in rows)
    span = [min(row["bytes"] for row in rows) / 1.5, max(row["bytes"] for row in rows) * 1.5]
    roof = [moved / rate / 1e6 for moved in span]  # ms
    axes.plot(span, roof, color="black", linewidth=1, label=f"roof: {rate:.0f} GB/s", zorder=1)
    for label in reversed(_labels(rows)):
        own = [row for row in rows if row["contestant"] == label]
        x, y = [row["bytes"] for row in own], [_step_ms(row) for row in own]
        axes.plot(x, y, _marker(label), color=_color(label, rows), label=label, alpha=0.8, markersize=6)
    _name_models(axes, [row for row in rows if row["contestant"] == OURS])
    axes.set(xscale="log", yscale="log", xlabel="bytes that a step must move", ylabel="ms")
    _plain_ticks(axes.xaxis, EngFormatter("B", sep=" "), 6)
    _plain_ticks(axes.yaxis, _plain, 6)
    _finish(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize="small")
    which = "Device time" if any("device_us" in row for row in rows) else "Time"
    return _titled(figure, f"{which} of a step against its bytes", context)


def _step_ms(row):
    return row.get("device_us", row["wall_us"]) / 1e3


def _name_models(axes, rows):
    """At the lowest point of each model."""
    for model in dict.fromkeys(row["model"] for row in rows):
        lowest = min((row for row in rows if row["model"] == model), key=lambda row: row["bytes"])
        place = lowest["bytes"], _step_ms(lowest)
        text = {"xytext": (7, -10), "textcoords": "offset points", "fontsize": "small", "color": "dimgray"}
        axes.annotate(model, place, **text)


def speedup(rows, context):
    """A panel for each model and dtype, a group of bars for each rule; in two columns."""
    panels = _panels(rows)
    if not panels:
        return None
    columns = _two_columns(list(panels.items()))
    tallest = max(sum(_height(lines) for _, lines in column) for column in columns)
    figure = _figure(6.2 * len(columns), 1.1 + tallest)
    shown = [row for _, lines in panels.items() for own in lines.values() for row in own.values()]
    limits = _limits([row for row in shown if row["contestant"] not in OWN])
    handles: dict[str, Any] = {}
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        heights = [_height(lines) for _, lines in column]
        filler = tallest - sum(heights)
        ratios = [*heights, filler] if filler > 0.1 else heights
        grid = part.add_gridspec(len(ratios), 1, height_ratios=ratios)
        for index, (title, lines) in enumerate(column):
            axes = part.add_subplot(grid[index])
            _bars(axes, lines, rows)
            axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
            axes.set_xlim(*limits)
            handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False, ncols=6)
    return _titled(figure, "Times as long as fusestep (left of 1: fusestep is slower)", context)


def _panels(rows):
    """Title to lines: name to contestant to row."""
    panels: dict[str, dict[str, dict[str, Any]]] = {}
    for own in cases_of(rows).values():
        first = next(iter(own.values()))
        if clock_of(first) == "wall_us" and set(own).difference(OWN):
            panels.setdefault(f"{first['model']}, {first['dtype']}", {})[_line_of(first)] = own
    return panels


def _height(lines):
    """Of a panel in inches."""
    return 0.6 + 0.42 * len(lines)


def _two_columns(panels):
    """In their order, the break where the higher column is lowest."""
    if len(panels) < 2:
        return [panels]

    def higher(split):
        return max(sum(_height(lines) for _, lines in part) for part in (panels[:split], panels[split:]))

    best = min(range(1, len(panels)), key=higher)
    return [panels[:best], panels[best:]]


def _limits(rows):
    """Of all panels, so that bars can be compared."""
    lows, highs = zip(*(row["speedup_quartiles"] for row in rows), strict=True)
    return min(1.0, *lows, 1.0) / 1.15, max(1.0, *highs, 2.0) * 1.5


def _bars(axes, lines, rows):
    """Grouped horizontal bars from 1, the first line on top, with quartiles and figures."""
    for position, own in enumerate(lines.values()):
        others = [row for label, row in own.items() if label not in OWN]
        height = 0.8 / len(others)
        for index, row in enumerate(others):
            y = position - 0.4 + height * (index + 0.5)
            label, ratio, (low, high) = row["contestant"], row["speedup"], row["speedup_quartiles"]
            axes.barh(y, ratio - 1, height * 0.9, left=1, color=_color(label, rows), label=label)
            axes.plot([low, high], [y, y], color="black", linewidth=0.8)
            text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(text, (max(high, 1), y), **place)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, _plain, 8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize="small")
    axes.grid(True, axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def host_time(rows, context):
    """A panel for each rule; dashed where all gradients have moved."""
    rows = [row for row in rows if row["operation"] in ("host", "moved")]
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    if not rules:
        return None
    figure = _figure(1 + 4.4 * len(rules), 4.8)
    grid = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axes, rule in zip(grid, rules, strict=True):
        _host_lines(axes, [row for row in rows if row["rule"] == rule], rows)
        axes.set_title(rule, loc="left", fontsize="medium", fontweight="bold")
    grid[0].set_ylabel("us")
    grid[0].legend(frameon=False, fontsize="small")
    threads = "" if context.get("gpu") else ", one thread"
    return _titled(figure, f"Host time of a step against the number of tensors{threads}", context)


def _host_lines(axes, own, rows):
    for label in _labels(own):
        for operation, style in (("host", "-"), ("moved", "--")):
            line = [row for row in own if (row["contestant"], row["operation"]) == (label, operation)]
            line.sort(key=lambda row: row["tensors"])
            x, y = [row["tensors"] for row in line], [row["host_us"] for row in line]
            name = label if operation == "host" else None
            axes.plot(x, y, style, marker=_marker(label), color=_color(label, rows), label=name, markersize=4)
    if any(row["operation"] == "moved" for row in own):
        axes.plot([], [], "--", color="black", label="gradients have moved")
    sizes = {row["elements"] // row["tensors"] for row in own}
    axes.set(xscale="log", yscale="log", xlabel=f"tensors of {sizes.pop()} elements" if len(sizes) == 1 else "tensors")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis, _plain, 8, subs=(1,))
    _finish(axes)


# ---- what they share ---------------------------------------------------------------------------


def _figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _titled(figure, title, context):
    """A title for what is shown, and below it where it was measured."""
    threads = "" if context.get("gpu") else f", {context['threads']} thread{'s' if context['threads'] > 1 else ''}"
    machine = f"{context.get('gpu') or context['processor']}{threads}"
    where = f"{machine}, torch {context['torch']}, {context['date'][:10]}"
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontweight="bold", fontsize="large", linespacing=1.4)
    top = 1 - 0.36 / figure.get_figheight()
    figure.text(0.01, top, where, ha="left", va="top", fontsize="small", color="dimgray")
    return figure


def _finish(axes):
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(value, _=None):
    return f"{value:,g}" if value < 1 else f"{value:,.0f}"


def _plain_ticks(axis, formatter, count, subs=(1, 2, 5)):
    """Labels at 1, 2, 5, 10, ... and nowhere else."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs, numticks=count * len(subs)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _line_of(row):
    groups = "" if row["groups"] == 1 else f", {row['groups']} groups"
    operation = "" if row["operation"] == "step" else f": {row['operation']}"
    return f"{row['rule']}{groups}{operation}"


def _labels(rows):
    return list(dict.fromkeys(row["contestant"] for row in rows))


def _color(label, rows):
    if label in _COLORS:
        return _COLORS[label]
    others = [other for other in _labels(rows) if other not in _COLORS]
    return _MORE_COLORS[others.index(label) % len(_MORE_COLORS)]


def _marker(label):
    return _MARKERS.get(label, "D")
