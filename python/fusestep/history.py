# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""What happened in a training run, epoch by epoch, and a picture of it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class History(dict):
    """A dict of lists, all as long as there are records: what `record` is given, and what it looks up.

    >>> history = History()
    >>> for loss in (0.7, 0.4):
    ...     history.record(loss=loss)
    >>> history
    {'loss': [0.7, 0.4]}

    Besides the values given, each record has:

    - `lr/0`, `lr/1`, ...: the learning rate of each group of the optimizer. Record before the
      scheduler steps, and they are the rates the epoch was trained with;
    - `grad_norm/LAYER` and `update_norm/LAYER`: for each layer, the 2-norms of the gradient and of the
      change, in the first step after the record before. A layer is a module's own parameters.

    What a record lacks is NaN: a layer that did not step, a group that was not there yet.

    Args:
        optimizer: any of torch's kind; None: only values given are recorded.
        model: names layers. Without one, names are those of an optimizer made with
            `model.named_parameters()`; without names, there are no norms.
        norms: False: without norms. They cost one copy of the parameters, for one step per record.
    """

    def __init__(self, optimizer: Any = None, model: Any = None, norms: bool = True) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._records = 0
        self._sample = _StepSample(optimizer, model) if optimizer is not None and norms else None

    def record(self, **values: float) -> None:
        """Adds a record, at the end of an epoch as a rule.

        Args:
            **values: numbers, or tensors of one element: `loss`, `val_loss`, `accuracy`, whatever else.
        """
        found: dict[str, Any] = dict(values)
        if self._optimizer is not None:
            found.update({f"lr/{index}": group["lr"] for index, group in enumerate(self._optimizer.param_groups)})
        if self._sample is not None:
            found.update(self._sample.take())
        numbers = {key: float(value.item() if hasattr(value, "item") else value) for key, value in found.items()}
        for key in numbers:
            self.setdefault(key, [math.nan] * self._records)
        for key, column in self.items():
            column.append(numbers.get(key, math.nan))
        self._records += 1

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)  # a copy or a file of it is without the optimizer


class _StepSample:
    """Norms of one step: the first after `take` whose gradients are finite."""

    def __init__(self, optimizer, model):
        self._model, self._before, self._norms = model, None, {}
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def take(self) -> dict[str, float]:
        norms, self._norms = self._norms, {}
        return norms

    def _before_step(self, optimizer, args, kwargs):
        if self._norms:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = {
            layer: [(p, p.detach().clone()) for p in own if id(p) in held]
            for layer, own in _layers(self._model, optimizer).items()
        }

    def _after_step(self, optimizer, args, kwargs):
        if self._before is None:
            return
        moved = {layer: [(p, old) for p, old in own if p.grad is not None] for layer, own in self._before.items()}
        self._before = None
        grad_norms = {layer: _norm(p.grad for p, _ in own) for layer, own in moved.items() if own}
        if not grad_norms or not all(map(math.isfinite, grad_norms.values())):
            return  # a step that GradScaler skips has infinite gradients
        for layer, own in moved.items():
            self._norms[f"grad_norm/{layer}"] = grad_norms.get(layer, math.nan)
            self._norms[f"update_norm/{layer}"] = _norm(p.detach() - old for p, old in own) if own else math.nan


def _layers(model, optimizer):
    """Name of a module to its own parameters, in the model's order; each parameter once."""
    from .names import names_of  # imports torch, as whoever has an optimizer has done

    layers: dict[str, list] = {}
    for p, (name, *_) in names_of(model, optimizer).items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(p)
    return layers


def _norm(tensors):
    from .summary import norm_of

    return math.sqrt(sum((norm_of(t) or 0.0) ** 2 for t in tensors))


# ---- the picture -------------------------------------------------------------------------------

_LOSS, _ACCURACY, _OTHER, _RATES = "Loss", "Accuracy", "Other values", "Learning rate"
_GRADIENTS, _UPDATES = "Gradient norm of a step", "Update norm of a step"
_TITLES = (_LOSS, _ACCURACY, _OTHER, _RATES, _GRADIENTS, _UPDATES)
_LEGENDS = {_RATES: "group", _GRADIENTS: "layer", _UPDATES: "layer"}
_MOST_IN_A_LEGEND = 8


def plot_history(history: Mapping[str, Sequence[float]], path: str | pathlib.Path) -> list[pathlib.Path]:
    """Draws a history into two files, PNG and SVG, and returns their paths.

    One panel each, over epochs, for losses, accuracies, other values, the learning rates of groups, and
    the norms of gradients and updates by layer.

    Args:
        history: a `History` or any dict of names to numbers, one for each epoch. A name goes by what
            is in it: `loss`, `acc`, or a beginning `lr/`, `grad_norm/`, `update_norm/`. `epoch`, if
            there is one, is the horizontal axis; otherwise it is 1, 2, ...
        path: with or without `.png` or `.svg`; directories are made.

    Raises ValueError if there is nothing to draw, and ImportError without matplotlib.
    """
    panels = _panels(history)
    if not panels:
        raise ValueError("the history is empty: nothing to plot")
    figure = _figure(panels, history.get("epoch"))
    path = pathlib.Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def _panels(history):
    """Title of panel to curves: label to numbers."""
    panels: dict[str, dict[str, Sequence[float]]] = {title: {} for title in _TITLES}
    for key, values in history.items():
        title, label = _place(key)
        if key != "epoch" and any(map(math.isfinite, values)):
            panels[title][label] = values
    return {title: curves for title, curves in panels.items() if curves}


def _place(key):
    for beginning, title in (("lr/", _RATES), ("grad_norm/", _GRADIENTS), ("update_norm/", _UPDATES)):
        if key.startswith(beginning):
            return title, key.removeprefix(beginning)
    if "loss" in key.lower():
        return _LOSS, key
    return (_ACCURACY if "acc" in key.lower() else _OTHER), key


def _figure(panels, epochs):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install fusestep[plot]") from error
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns, 3.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for position, (title, curves) in enumerate(panels.items()):
        alone = position % columns == 0 and position == len(panels) - 1
        place = grid[position // columns, :] if alone else grid[position // columns, position % columns]
        _draw(figure.add_subplot(place), title, curves, epochs)
    return figure


def _draw(axes, title, curves, epochs):
    from matplotlib.ticker import MaxNLocator

    steps = "steps-mid" if title == _RATES else "default"
    for (label, values), color in zip(curves.items(), _colors(len(curves)), strict=True):
        x = range(1, len(values) + 1) if epochs is None else epochs
        axes.plot(x, values, label=label, color=color, marker="o", markersize=3, linewidth=1.5, drawstyle=steps)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log" if title != _ACCURACY and _spans_decades(curves) else "linear")
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) <= _MOST_IN_A_LEGEND:
        # The frame is white, so that what lies beneath does not go through the names.
        legend = axes.legend(framealpha=0.8, fontsize="small", title=_LEGENDS.get(title), title_fontsize="small")
        legend.get_frame().set_linewidth(0)
    else:
        _name_the_ends(axes, list(curves), _LEGENDS.get(title))


def _colors(count) -> Iterator[Any]:
    """Distinct colours for a few curves, and for many those of a scale, in their order."""
    from matplotlib import colormaps

    if count <= _MOST_IN_A_LEGEND:
        return iter(colormaps["tab10"].colors[:count])
    return iter(colormaps["viridis"](index / (count - 1) * 0.95) for index in range(count))


def _name_the_ends(axes, labels, title):
    """A bar of the scale in place of a legend."""
    from matplotlib.cm import ScalarMappable

    bar = axes.figure.colorbar(ScalarMappable(cmap="viridis"), ax=axes, ticks=[0, 0.95], aspect=30)
    bar.ax.set_title(title, fontsize="small")
    bar.ax.set_ylim(0.95, 0)  # as a legend and a model read: the first on top
    bar.ax.set_yticklabels([labels[0], labels[-1]], fontsize="small")


def _spans_decades(curves):
    values = [value for numbers in curves.values() for value in numbers if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)
