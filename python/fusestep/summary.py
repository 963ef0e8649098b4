# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What an optimizer holds, as a table for people and as rows for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .names import listed, names_of
from .tables import (
    Printed,
    count_text,
    html_line,
    html_table,
    rich_table,
    settings_text,
    shape_text,
    size_text,
    widths_of,
)

# Slots of torch's optimizers that are shaped like their parameter; Adafactor's, for one, are not.
_SHAPED_SLOTS = frozenset(
    ("master_weight", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg")
    + ("acc_delta", "sum", "prev", "step_size", "ax")
)
_COLUMNS = ("params", "param_names", "lr", "weight_decay")


class Summary(Printed):
    """What an optimizer holds. `print` shows it as a table, a notebook as HTML.

    Attributes:
        optimizer: the name of its class.
        rows: one dict per parameter, in the optimizer's order. `group` and `index` are its position in
            `state_dict()`; `name` ("" if unknown), `shape`, `dtype`, `device`, `elements`, `bytes`;
            `lr`, `weight_decay`, and `settings`, a dict of the group's others; `step`, the steps taken
            (None where they are not counted); `condition`: "stepping", "frozen" (requires no gradient)
            or "no gradient" (has none, and no state of earlier steps); `state`, a dict of slot to bytes,
            without `step`. With norms also `norm`, `grad_norm` and `state_norms`: 2-norms, None where
            there is nothing to measure.
        groups: one dict per group: `group`, `lr`, `weight_decay`, `settings`, and totals: `parameters`,
            `elements`, `bytes`, `state` (slot to bytes), `state_bytes`, and the number of parameters of
            each condition.
        warnings: sentences about what is probably not meant.

    Of sharded tensors, bytes are those of this process and norms those of the whole.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None, norms: bool) -> None:
        names = {p: own[0] for p, own in names_of(None, optimizer).items()}
        names.update({p: own[0] for p, own in names_of(model).items()})
        self.optimizer = type(optimizer).__name__
        self.rows: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        first = 0
        for number, group in enumerate(optimizer.param_groups):
            index = {p: first + i for i, p in enumerate(group["params"])}
            rows = [
                {"group": number, "index": index[p], "name": names.get(p, "")}
                | _row(p, group, optimizer.state.get(p, {}), norms)
                for p in group["params"]
            ]
            first += len(rows)
            self.rows += rows
            self.groups.append(_total(number, group, rows))
        self.warnings: list[str] = list(_warnings(optimizer, model, self))

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.text import Text

        tables = list(map(self._table, self.groups))
        widths = widths_of(tables, options.max_width)
        yield Text(self._title(), style="bold")
        if self._common():
            yield Text(f"All groups: {settings_text(self._common())}")
        yield from (Text(), rich_table(dict.fromkeys(tables[0], ()), widths, header=True))
        for group, table in zip(self.groups, tables, strict=True):
            yield Text(("\n" if group["group"] else "") + self._heading(group), style="bold")
            yield from [rich_table(table, widths, header=False)] if group["parameters"] else []
            yield Text(_totals(group))
        norms = self._norms()
        if norms:
            yield from (Text("\nNorms", style="bold"), rich_table(norms, widths_of([norms], options.max_width)))
        if self.warnings:
            yield Text("\n" + "\n".join(f"Warning: {warning}" for warning in self.warnings), style="yellow")

    def _repr_html_(self) -> str:
        parts = [html_line("p", self._title(), bold=True)]
        if self._common():
            parts.append(html_line("p", f"All groups: {settings_text(self._common())}"))
        for group in self.groups:
            parts.append(html_line("p", self._heading(group), bold=True))
            parts += [html_table(self._table(group))] if group["parameters"] else []
            parts.append(html_line("p", _totals(group)))
        norms = self._norms()
        if norms:
            parts += [html_line("p", "Norms", bold=True), html_table(norms)]
        return "\n".join(parts + [html_line("p", f"Warning: {warning}") for warning in self.warnings])

    def _title(self):
        state = size_text(sum(group["state_bytes"] for group in self.groups))
        parts = [count_text(len(self.rows), "parameter"), count_text(len(self.groups), "group"), f"state {state}"]
        return f"{self.optimizer}: {', '.join(parts + [f'all {value}' for value in self._shared().values()])}"

    def _shared(self):
        """dtype and device where they are the same everywhere: said once instead of in every row."""
        values = {key: {row[key] for row in self.rows} for key in ("dtype", "device")}
        return {key: found.pop() for key, found in values.items() if len(found) == 1}

    def _common(self):
        """Further settings that all of several groups share: likewise."""
        first, *others = [group["settings"] for group in self.groups]
        return {
            name: value
            for name, value in first.items()
            if others and all(name in other and other[name] == value for other in others)
        }

    def _heading(self, group):
        own = {name: value for name, value in group["settings"].items() if name not in self._common()}
        shown = {"lr": group["lr"], "weight_decay": group["weight_decay"], **own}
        return f"Group {group['group']}: {settings_text(shown)}"

    def _table(self, group):
        """Title of column to cells."""
        shared = self._shared()
        rows = [row for row in self.rows if row["group"] == group["group"]]
        table = {"index": _column(rows, "index"), "name": _column(rows, "name")}
        table["shape"] = [shape_text(row["shape"]) for row in rows]
        table |= {key: _column(rows, key) for key in ("dtype", "device") if key not in shared}
        table |= {key: _column(rows, key) for key in ("step", "condition")}
        table["state"] = [size_text(sum(row["state"].values())) for row in rows]
        return table

    def _norms(self):
        if not (self.rows and "norm" in self.rows[0]):
            return None
        slots = dict.fromkeys(slot for row in self.rows for slot in row["state_norms"])
        table = {"index": _column(self.rows, "index"), "name": _column(self.rows, "name")}
        table["parameter"] = [_short(row["norm"]) for row in self.rows]
        table["gradient"] = [_short(row["grad_norm"]) for row in self.rows]
        return table | {slot: [_short(row["state_norms"].get(slot)) for row in self.rows] for slot in slots}


def summary(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None, norms: bool = False) -> Summary:
    """What an optimizer, any of torch's kind, holds: one row per parameter, totals per group, and warnings.

    Args:
        optimizer: is only read.
        model: gives names, and what of it no group holds is warned of. Without one, names are those of
            an optimizer made with `model.named_parameters()`.
        norms: with the norms of parameters, gradients and state, for which all of them are read.

    Waits for the devices the optimizer works on.
    """
    return Summary(optimizer, model, norms)


class Summarizable:
    """`summary` as a method of an optimizer."""

    def summary(self, model: torch.nn.Module | None = None, norms: bool = False) -> Summary:
        """What it holds, as a table: `fusestep.optim.summary` of this optimizer."""
        return summary(self, model, norms)


# ---- rows --------------------------------------------------------------------------------------


def _row(p, group, state, norms):
    slots = {name: value for name, value in state.items() if name != "step" and list(_tensors(value))}
    row = {
        "shape": tuple(p.shape),
        "dtype": str(p.dtype).removeprefix("torch."),
        "device": str(p.device),
        "elements": p.numel(),
        "bytes": _bytes(p),
        "lr": _number(group.get("lr")),
        "weight_decay": _number(group.get("weight_decay")),
        "settings": _settings(group),
        "step": _step(state.get("step")),
        "condition": _condition(p, state),
        "state": {name: _bytes(value) for name, value in slots.items()},
    }
    if norms:
        row["norm"], row["grad_norm"] = norm_of(p), norm_of(p.grad)
        row["state_norms"] = {name: norm_of(value) for name, value in slots.items() if torch.is_tensor(value)}
    return row


def _condition(p, state):
    if not p.requires_grad:
        return "frozen"
    return "stepping" if p.grad is not None or state else "no gradient"


def _settings(group):
    return {name: _number(value) for name, value in group.items() if name not in _COLUMNS}


def _number(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(_number, value))
    return value.item() if torch.is_tensor(value) and value.numel() == 1 and not value.is_meta else value


def _step(value):
    number = _number(value)
    return int(number) if isinstance(number, (int, float)) else None


def _tensors(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (list, tuple)):  # LBFGS
        for one in value:
            yield from _tensors(one)


def _bytes(value):
    parts = (t.to_local() if hasattr(t, "to_local") else t for t in _tensors(value))
    return sum(t.numel() * t.element_size() for t in parts)


def norm_of(tensor: torch.Tensor | None) -> float | None:
    """The 2-norm of all of a tensor; None where there is nothing to measure."""
    if tensor is None or tensor.is_meta:
        return None
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    norm = torch.linalg.vector_norm(tensor, dtype=_dtype_of_norm(tensor))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _dtype_of_norm(tensor):
    if tensor.device.type == "cpu":  # adds one square after the other
        return torch.complex128 if tensor.is_complex() else torch.float64
    return torch.float32 if tensor.dtype.itemsize < 4 else None


def _total(number, group, rows):
    state: dict[str, int] = {}
    for row in rows:
        for slot, size in row["state"].items():
            state[slot] = state.get(slot, 0) + size
    conditions = [row["condition"] for row in rows]
    return {
        "group": number,
        "lr": _number(group.get("lr")),
        "weight_decay": _number(group.get("weight_decay")),
        "settings": _settings(group),
        "parameters": len(rows),
        "elements": sum(row["elements"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "state": state,
        "state_bytes": sum(state.values()),
        "stepping": conditions.count("stepping"),
        "frozen": conditions.count("frozen"),
        "no_gradient": conditions.count("no gradient"),
    }


# ---- warnings ----------------------------------------------------------------------------------


def _warnings(optimizer, model, made):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    labels = {p: row["name"] or f"parameter {row['index']}" for p, row in zip(parameters, made.rows, strict=True)}
    if model is not None:
        yield from _about_model(model, labels)
    stale = [labels[p] for p in labels if not p.requires_grad and p.grad is not None]
    if stale:
        yield f"{listed(stale)}: frozen, but with a gradient, so a step changes it; freeze() or p.grad = None helps."
    for group in made.groups:
        if group["lr"] == 0:
            yield f"Group {group['group']} has lr 0, so its parameters do not change."
    for p, label in labels.items():
        for slot, value in optimizer.state.get(p, {}).items():
            if slot in _SHAPED_SLOTS and torch.is_tensor(value) and value.shape != p.shape:
                yield f"{label}: {slot} is of shape {shape_text(value.shape)}, the parameter of {shape_text(p.shape)}."


def _about_model(model, labels):
    names = dict(model.named_parameters())
    missing = [name for name, p in names.items() if p.requires_grad and p not in labels]
    if missing:
        yield f"{listed(missing)}: requires a gradient, but is in no group, so no step changes it."
    own = set(names.values())
    others = [label for p, label in labels.items() if p not in own]
    if others:
        yield f"{listed(others)}: in a group, but not of the model."
    moving = [name or "the model" for name, module in model.named_modules() if _still_moves(module)]
    if moving:
        yield f"{listed(moving)}: frozen, but in training mode, so running statistics change; eval() helps."


def _still_moves(module):
    """A normalisation whose weights are frozen while its running mean is not."""
    if not module.training or getattr(module, "running_mean", None) is None:
        return False
    weights = list(module.parameters(recurse=False))
    return bool(weights) and not any(p.requires_grad for p in weights)


# ---- texts -------------------------------------------------------------------------------------


def _column(rows, key):
    return ["-" if row[key] is None else str(row[key]) for row in rows]


def _totals(group):
    conditions = {"stepping": "stepping", "frozen": "frozen", "no_gradient": "no gradient"}
    counts = ", ".join(f"{group[key]} {text}" for key, text in conditions.items() if group[key])
    counted = [count_text(group[f"{noun}s"], noun) for noun in ("parameter", "element")]
    slots = ", ".join(f"{slot} {size_text(size)}" for slot, size in group["state"].items())
    what = ", ".join([*counted, size_text(group["bytes"])])
    return f"Total: {what}; {counts or 'empty'}; {f'state {slots}' if slots else 'no state'}"


def _short(norm):
    return "-" if norm is None else f"{norm:.3g}"
