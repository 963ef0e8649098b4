# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""A run as Markdown, made of its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

OURS, ARRAYS, ONE_GROUP = "fusestep", "fusestep.Optimizer", "fusestep, one group"
FLAT, TRUSTED = "fusestep flat", "fusestep flat, trusted"
OWN = (OURS, ARRAYS, FLAT, TRUSTED, ONE_GROUP)
_FASTER, _EVEN, _SLOWER = "faster", "even", "slower"

_TITLES = {
    "step": "Step",
    "clip": "clip_grad_norm_ and step",
    "scaler": "GradScaler: step and update",
    "zero_grad": "zero_grad(set_to_none=False)",
    "save": "State to a file",
    "load": "State from a file",
    "host": "Host time, nothing changed since the last step",
    "skipped": "Host time of a step that found_inf skips",
    "moved": "Host time, all gradients at other addresses than in the last step",
    "dtensor": "Host time, DTensors",
}


def markdown(results: dict[str, Any]) -> str:
    rows = results["benchmarks"]
    context = results["context"]
    parts = ["# Benchmark of fusestep", _machine(context), *_busy(context), _summary(rows), _reading(context)]
    for operation, title in _TITLES.items():
        own = [row for row in rows if row["operation"] == operation]
        if own:
            parts += [f"## {title}", _times(own)]
    if rows:
        parts += ["## Memory, launches and errors", _details(rows)]
    if results["left_out"]:
        parts += ["## Left out", _left_out(results["left_out"])]
    return "\n\n".join(parts) + "\n"


# ---- who wins ----------------------------------------------------------------------------------


def cases_of(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Case to contestant to row, in the order in which they were measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["contestant"]] = row
    return found


def clock_of(row: dict[str, Any]) -> str:
    return "host_us" if row["operation"] in ("host", "skipped", "moved", "dtensor") else "wall_us"


def best_other(own: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the fastest contestant that is not ours."""
    others = [row for label, row in own.items() if label not in OWN]
    return min(others, key=lambda row: row[clock_of(row)], default=None)


def verdict(row: dict[str, Any]) -> str:
    """Of fusestep against the contestant of a row. Even: 1 lies between the quartiles of the ratio."""
    low, high = row["speedup_quartiles"]
    return _FASTER if low > 1 else _SLOWER if high < 1 else _EVEN


def _summary(rows):
    bests = {name: best_other(own) for name, own in cases_of(rows).items()}
    verdicts = {name: verdict(row) for name, row in bests.items() if row is not None}
    counts = {word: list(verdicts.values()).count(word) for word in (_FASTER, _EVEN, _SLOWER)}
    if not verdicts:
        return "Nothing was measured."
    text = (
        f"Against the fastest other contestant, fusestep is **faster in {counts[_FASTER]}, even in"
        f" {counts[_EVEN]} and slower in {counts[_SLOWER]}** of {len(verdicts)} cases."
    )
    for name, word in verdicts.items():
        if word == _SLOWER:
            text += f"\n- slower: `{name}`, {bests[name]['speedup']:.2f} x the speed of {bests[name]['contestant']}"
    return text


# ---- tables ------------------------------------------------------------------------------------


def _times(rows):
    found = cases_of(rows)
    labels = list(dict.fromkeys(row["contestant"] for row in rows if row["contestant"] != OURS))
    with_roof = any("roof_fraction" in row for row in rows)
    head = ["case", OURS, *(["of the roof"] if with_roof else []), *labels, "against the fastest"]
    lines = []
    for name, own in found.items():
        ours = own[OURS]
        roof = [f"{ours['roof_fraction']:.2f}" if "roof_fraction" in ours else ""] if with_roof else []
        others = [_other(own.get(label)) for label in labels]
        lines.append([f"`{name}`", _time_with_spread(ours), *roof, *others, _against(best_other(own))])
    return _table(head, lines)


def _time_with_spread(row):
    clock = clock_of(row)
    low, high = row[f"{clock}_quartiles"]
    return f"{_time(row[clock])} ({_time(low)} to {_time(high)})"


def _other(row):
    return "" if row is None else f"{_time(row[clock_of(row)])} ({row['speedup']:.2f} x)"


def _against(best):
    if best is None:
        return ""
    low, high = best["speedup_quartiles"]
    text = f"{best['speedup']:.2f} x ({low:.2f} to {high:.2f}), {verdict(best)}"
    return f"**{text}**" if verdict(best) == _SLOWER else text


def _details(rows):
    columns = {
        "peak extra memory": lambda row: _bytes(row.get("peak_bytes")),
        "state": lambda row: _bytes(row.get("state_bytes")),
        "GB/s": lambda row: _figure(row.get("gbps"), ".1f"),
        "of the roof": lambda row: _figure(row.get("roof_fraction"), ".2f"),
        "host": lambda row: _time(row.get("host_us")),
        "device": lambda row: _time(row.get("device_us")),
        "launches": lambda row: _figure(row.get("launches"), "d"),
        "copies, fills": lambda row: _figure(row.get("copies"), "d"),
        "error, ulp a step": lambda row: _figure(row.get("error_ulps"), ".2f"),
    }
    used = {head: cell for head, cell in columns.items() if any(cell(row) for row in rows)}
    lines = [[f"`{row['name']}`", row["contestant"], *(cell(row) for cell in used.values())] for row in rows]
    return _table(["case", "contestant", *used], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    rows = [head, ["-" * width for width in widths], *lines]
    padded = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {row} |" for row in padded)


def _time(us):
    if us is None:
        return ""
    for limit, factor, unit in ((1e3, 1, "us"), (1e6, 1e3, "ms")):
        if us < limit:
            return f"{us / factor:#.3g} {unit}".replace(". ", " ")
    return f"{us / 1e6:#.3g} s".replace(". ", " ")


def _bytes(count):
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def _figure(value, form):
    return "" if value is None else format(value, form)


# ---- words -------------------------------------------------------------------------------------


def _machine(context):
    info = context["fusestep"]
    lines = {
        "date": context["date"],
        "command": f"`{context['command']}`",
        "GPU": context.get("gpu"),
        "processor": f"{context['processor']}, {context['usable_cores']} of {context['cores']} cores",
        "memory": f"{context['memory_bytes'] / 1e9:.1f} GB" if context["memory_bytes"] else None,
        "threads": context["threads"],
        "system": context["system"],
        "load over 1, 5, 15 minutes": f"{context['load_before']} before, {context['load_after']} after",
        "fusestep": f"{info['version']}, {info['compiler']}, {info['instruction_set']}",
        "torch": context["torch"],
        "roof": context["roof_is"],
    }
    return "\n".join(f"- {what}: {value}" for what, value in lines.items() if value)


def _reading(context):
    until = ", until the device has finished" if context["device"] == "cuda" else ""
    host = "until the call returns" if context["device"] == "cuda" else "of one thread, and of its processor alone"
    return (
        f"Times are wall times{until}: the median and the quartiles of {context['rounds']} calls, everybody in turn."
        f" Host times are those {host}. `x` is how many times as long as fusestep somebody took, the median of the"
        f" ratios in each round; even: 1 lies between the quartiles of the ratio. docs/benchmarking.md has the method."
    )


def _busy(context):
    """Times of a machine with other work are those of the other work too."""
    before, cores = context["load_before"], context["usable_cores"]
    if not before or before[0] < 0.5 * cores:
        return []
    return [
        f"**The machine was busy**: {before[0]:.1f} processes wanted its {cores} cores before anything was measured."
        f" Threads that wait for each other then wait for other programs. Do not quote these times; host times, of one"
        f" thread's own processor, with care."
    ]


def _left_out(left_out):
    """One line for each reason, whoever and how often it was."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        reasons.setdefault((entry["contestant"], entry["why"]), []).append(entry["name"])
    lines = []
    for (contestant, why), names in reasons.items():
        where = f"`{names[0]}`" if len(names) == 1 else f"`{names[0]}` and {len(names) - 1} more"
        lines.append(f"- {contestant + ': ' if contestant else ''}{why} ({where})")
    return "\n".join(lines)
