# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""One page of HTML about a run of the demo, with all it needs inside."""

from __future__ import annotations

import base64
import html
import pathlib
from typing import Any

import fusestep

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem }
h3 { font-size: 1rem }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
th { border-bottom: 2px solid #999 }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap }
img { width: 100%; height: auto }
p { margin: .3rem 0 }
.good { color: #17692b } .bad { color: #b00020 }
.tables { overflow-x: auto }
"""


def write(path: pathlib.Path, what: str, records: list[dict], good: bool, sentence: str, changes: Any) -> None:
    body = [
        "<h1>Fine-tuning with fusestep, beside torch.optim</h1>",
        f"<p>{_text(what)}. The same network, data and seeds, once with <code>fusestep.optim</code> and once with "
        "<code>torch.optim</code>.</p>",
        f'<p class="{"good" if good else "bad"}"><b>{"Good" if good else "Not good"}</b>: {_text(sentence)}.</p>',
        _table(["phase", "steps", "library", "loss", "accuracy", "largest difference of losses"], _rows(records)),
        *(part for record in records for part in _phase(record, path.parent)),
        "<h2>What the last phase changed in the optimizer</h2>",
        f'<div class="tables">{changes._repr_html_()}</div>',
        "<h2>Made with</h2>",
        _table(["", ""], [(key.replace("_", " "), str(value)) for key, value in fusestep.info().items()]),
    ]
    page = ['<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>fusestep demo</title>']
    page += [f"<style>{STYLE}</style>\n</head>\n<body>", *body, "</body>\n</html>\n"]
    path.write_text("\n".join(page), encoding="utf-8")


def _rows(records):
    for record in records:
        for library, history in record["history"].items():
            first = library == "fusestep"
            yield (
                record["title"] if first else "",
                str(record["steps"]) if first else "",
                library,
                f"{history['loss'][-1]:.4f}",
                f"{100 * history['accuracy'][-1]:.2f} %",
                f"{record['difference']:.1e}" if first else "",
            )


def _phase(record, folder):
    yield f"<h2>{_text(record['title'])}</h2>\n<p>{_text(record['text'])}</p>"
    for note in record["notes"]:
        yield f"<h3>{_text(note['heading'])}</h3>"
        yield f'<div class="tables">{note["html"]}</div>' if note["html"] else f"<pre>{_text(note['text'])}</pre>"
    yield "<h3>Curves</h3>\n<p>Where one of two curves cannot be seen, it is under the other.</p>"
    yield f"{_image(folder / record['plot'], record['title'])}"


def _image(file, title):
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{data}">'


def _table(head, rows):
    def line(tag, cells):
        return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = [line("th", head)] if any(head) else []
    return "\n".join(['<div class="tables"><table>', *lines, *(line("td", row) for row in rows), "</table></div>"])


def _text(text):
    return html.escape(str(text))
