# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What differs between two states of an optimizer, by the parameters' names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import _core
from .contents import Contents, contents, setting_text
from .tables import Part, Printed, count_text, listed, shape_text

# A state_dict of C++ or of older torch lacks them, which means the same.
_OFF = (None, False)


class Diff(Printed):
    """What differs. `print` shows it as tables, `to_dict()` has all of it.

    Attributes:
        gone_groups, new_groups: names of groups none of whose parameters are on the other side.
        gone, new: names of parameters that are on one side only.
        settings: one dict per setting that differs between a group and one on the other side that has
            parameters of it: `group`, `key`, `before`, `after`. The rule is one of them.
        state: one dict per parameter on both sides that differs: `name`; `step`, a pair of counts (None:
            not counted); `slots`, a dict of slot to largest absolute change, or to "new", "gone" or a
            text such as "shape 2×3 → 4×3". A number that came or went as NaN or infinity is a change of inf.
        frozen: names to pairs, of parameters that froze or thawed. Only files of fusestep know that.
        metadata: keys to pairs, of two such files. None: not there.
        unchanged: how many parameters on both sides have the same state.
    """

    def __init__(self, before: Contents, after: Contents) -> None:
        self.before, self.after = before.label, after.label
        pairs = _pairs(before, after)
        groups = {name: _groups_by_parameter(side) for name, side in (("before", before), ("after", after))}
        met = [(groups["before"][i], groups["after"][j]) for i, j in pairs.values()]
        self.gone_groups = _unmet(before, [i for i, _ in met])
        self.new_groups = _unmet(after, [j for _, j in met])
        self.gone = [p["name"] for p in before.parameters if p["name"] not in pairs]
        self.new = [p["name"] for p in after.parameters if p["name"] not in pairs]
        self.settings = [
            row
            for i, j in dict.fromkeys(met)
            for row in _settings(before.description[i], after.description[j])
            if before.has_settings and after.has_settings
        ]
        rows = [_state(name, before, i, after, j) for name, (i, j) in pairs.items()]
        self.state = [row for row in rows if row["step"][0] != row["step"][1] or row["slots"]]
        self.unchanged = len(rows) - len(self.state)
        self.frozen = dict(_frozen(before, after, pairs))
        self.metadata = _metadata(before, after)

    @property
    def same(self) -> bool:
        return not any(getattr(self, key) for key in _CHANGES)

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("before", "after", "same", *_CHANGES, "unchanged")}

    def _parts(self) -> Iterator[Part]:
        yield Part("title", f"{self.before} → {self.after}")
        if self.same:
            yield Part("text", f"No difference in {count_text(self.unchanged, 'parameter')}")
        one_sided = {"Groups gone": self.gone_groups, "New groups": self.new_groups}
        one_sided |= {"Parameters gone": self.gone, "New parameters": self.new}
        for title, names in one_sided.items():
            if names:
                yield Part("text", f"{title}: {listed(names)}")
        for title, way in (("Froze", (False, True)), ("Thawed", (True, False))):
            names = [name for name, pair in self.frozen.items() if pair == way]
            if names:
                yield Part("text", f"{title}: {listed(names)}")
        yield from self._tables()

    def _tables(self):
        if self.metadata:
            rows = [{"key": key, "before": b, "after": a} for key, (b, a) in self.metadata.items()]
            yield from _table("Metadata", rows, ("key",))
        if self.settings:
            yield from _table(
                "Settings", [{"setting": row["key"], **row} for row in self.settings], ("group", "setting")
            )
        if self.state:
            yield Part("title", f"State: largest absolute change; {self.unchanged} unchanged")
            slots = dict.fromkeys(slot for row in self.state for slot in row["slots"])
            table = {"name": [row["name"] for row in self.state], "step": [_steps(*row["step"]) for row in self.state]}
            for slot in slots:
                table[slot] = [_change(row["slots"].get(slot, 0)) for row in self.state]
            yield Part("table", table)


_CHANGES = ("gone_groups", "new_groups", "gone", "new", "settings", "state", "frozen", "metadata")


def diff(before: Any, after: Any, *, names: Sequence[str] | None = None) -> Diff:
    """What differs between two states of an optimizer.

    Args:
        before, after: state_dicts, optimizers, or files: of `save`, of torch.save, or other safetensors
            files with tensors named `<parameter>/<slot>`.
        names: of the parameters, for a side that has none.

    Raises FileError for a file that cannot be read, InvalidArgument for what is no such state.
    """
    sides = [contents(side) for side in (before, after)]
    return diff_of(*sides, names=names)


def diff_of(before: Contents, after: Contents, names: Sequence[str] | None = None) -> Diff:
    for side in (before, after):
        if names is not None and not side.has_names:
            side.name(names)
    if before.parameters and after.parameters and before.has_names != after.has_names:
        nameless = before if after.has_names else after
        raise _core.InvalidArgument(f"{nameless.label}: its parameters have no names, give names of them")
    return Diff(before, after)


# ---- what belongs together ---------------------------------------------------------------------


def _pairs(before, after):
    """Name to positions on both sides."""
    positions = {p["name"]: index for index, p in enumerate(after.parameters)}
    return {
        p["name"]: (index, positions[p["name"]]) for index, p in enumerate(before.parameters) if p["name"] in positions
    }


def _groups_by_parameter(side):
    return [number for number, group in enumerate(side.description) for _ in group["params"]]


def _unmet(side, met):
    return [group["name"] for number, group in enumerate(side.description) if number not in met]


def _settings(before, after):
    name = before["name"] if before["name"] == after["name"] else f"{before['name']} → {after['name']}"
    sides = [{"rule": side["rule"], **side["hyper"]} for side in (before, after)]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        old, new = (side.get(key) for side in sides)
        if old != new and not (old in _OFF and new in _OFF):
            yield {"group": name, "key": key, "before": old, "after": new}


def _frozen(before, after, pairs):
    for name, (i, j) in pairs.items() if _both_ours(before, after) else ():
        pair = tuple(p.get("frozen", False) for p in (before.parameters[i], after.parameters[j]))
        if pair[0] != pair[1]:
            yield name, pair


def _both_ours(before, after):
    return before.kind == after.kind == "fusestep"


def _metadata(before, after):
    if not _both_ours(before, after):
        return {}
    keys = dict.fromkeys([*before.metadata, *after.metadata])
    pairs = {key: (before.metadata.get(key), after.metadata.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


# ---- state -------------------------------------------------------------------------------------


def _state(name, before, i, after, j):
    sides = [before.parameters[i], after.parameters[j]]
    slots = {}
    for slot in dict.fromkeys([*sides[0]["slots"], *sides[1]["slots"]]):
        old, new = (side["slots"].get(slot) for side in sides)
        change = _described_change(old, new)
        if not change:
            change = _largest(before.tensor(i, slot), after.tensor(j, slot))
        if change:
            slots[slot] = change
    return {"name": name, "step": tuple(_count(side.get("step")) for side in sides), "slots": slots}


def _described_change(old, new):
    if old is None or new is None:
        return "new" if old is None else "gone"
    if old["shape"] != new["shape"]:
        return f"shape {shape_text(old['shape'])} → {shape_text(new['shape'])}"
    return f"{old['dtype']} → {new['dtype']}" if old["dtype"] != new["dtype"] else ""


def _largest(old, new):
    """The largest absolute difference of two tensors, in double precision; inf where one is no number."""
    import torch

    if torch.equal(old, new):
        return 0.0
    old, new = old.double(), new.double()
    apart = (old - new).abs()
    alike = (old == new) | (old.isnan() & new.isnan())
    apart = torch.where(alike, torch.zeros_like(apart), apart.nan_to_num(nan=math.inf, posinf=math.inf))
    return apart.max().item()


def _count(step):
    if isinstance(step, Mapping):
        return float(step["float"])
    return step if step is None or step != int(step) else int(step)


# ---- texts -------------------------------------------------------------------------------------


def _table(title, rows, keys):
    yield Part("title", title)
    table = {key: [str(row[key]) for row in rows] for key in keys}
    yield Part("table", table | {side: [setting_text(row[side]) for row in rows] for side in ("before", "after")})


def _steps(before, after):
    shown = ["-" if count is None else str(count) for count in (before, after)]
    return shown[0] if before == after else " → ".join(shown)


def _change(change):
    return change if isinstance(change, str) else f"{change:.2e}" if change else "0"
