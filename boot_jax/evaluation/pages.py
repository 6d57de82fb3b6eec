"""Parts of self-contained HTML pages: frame, tables, pictures; one file, no network.

Every text is plain, and escaped here. A page asks its browser to refuse whatever is not
in the file, and any script but its own.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import ArrayLike
from PIL import Image

from boot_jax.evaluation import plots

EN_DASH = "–"

# Edges up to this many pixels are kept to the pixel; longer images become JPEG files.
_EXACT_SIZE = 64

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --quiet: #63636a; --page: #ffffff;
  --line: #dcdce0; --mark: #fdf0e6; --accent: #b34a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececef; --quiet: #a5a5ad;
  --page: #17171a; --line: #3a3a40; --mark: #3a2a1c; --accent: #ff9a4d; } }
@media print { :root { --ink: #000; --quiet: #444; --page: #fff; --line: #bbb;
  --mark: #f4f4f4; --accent: #000; }
  figure, table, section { break-inside: avoid; } body { margin: 0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.headline { font-size: 1.15rem; border-left: 4px solid var(--accent);
  padding-left: .9rem; margin: 1rem 0; overflow-wrap: anywhere; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .9rem;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  margin: .4rem 0; }
caption { text-align: left; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(100%, 100vw - 2.4rem); }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem;
  text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
td:first-child { white-space: nowrap; }
td .interval { display: block; color: var(--quiet); font-size: .8rem;
  font-weight: 400; white-space: nowrap; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
tr.student { background: var(--mark); font-weight: 600; }
table.pairs td { text-align: left; overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--quiet); }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem;
  box-sizing: border-box; }
.plots img { max-width: min(100%, 46rem); }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .4rem; }
"""


class Cell(NamedTuple):
    """What a cell of a table shows.

    Attributes:
      text: its value.
      interval: in small letters below; empty for none.
      key: what a column is sorted by; None for nothing, which comes last.
    """

    text: str
    interval: str = ""
    key: float | str | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.interval})" if self.interval else self.text


def _cell(cell: object) -> str:
    if not isinstance(cell, Cell):
        return f"<td>{escape(str(cell))}</td>"
    key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"'
    # The space is for those who copy the table.
    below = f' <span class="interval">({escape(cell.interval)})</span>'
    return f"<td{key}>{escape(cell.text)}{below if cell.interval else ''}</td>"


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: str = "",
    *,
    sortable: bool = False,
) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
      header: of the columns.
      rows: of texts or `Cell`; one whose first begins with "student" is marked.
      caption: above it.
      sortable: whether a click on a header sorts (needs `SORT_SCRIPT` in the page).
    """

    def heading(cell: object) -> str:
        text = escape(str(cell))
        content = f'<button type="button">{text}</button>' if sortable else text
        return f'<th scope="col">{content}</th>'

    body = []
    for row in rows:
        kind = ' class="student"' if str(row[0]).startswith("student") else ""
        body.append(f"<tr{kind}>{''.join(map(_cell, row))}</tr>")
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"<thead><tr>{''.join(map(heading, header))}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


SORT_STYLE = """
body { max-width: 80rem; }
.sortable { font-size: .88rem; }
.sortable th, .sortable td { padding: .3rem .4rem; }
.sortable th button { all: unset; cursor: pointer; }
.sortable th button:hover { color: var(--accent); }
.sortable th[aria-sort] button { color: var(--accent); text-decoration: underline; }
.sortable th[aria-sort="ascending"] button::after { content: " (rising)"; }
.sortable th[aria-sort="descending"] button::after { content: " (falling)"; }
.sortable th button:focus-visible { outline: 3px solid var(--accent); }
"""

SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headers.forEach((header, column) => header.firstChild.onclick = () => {
    const falling = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key;
    const compare = (a, b) => Number.isFinite(+a) && Number.isFinite(+b)
      ? a - b : a.localeCompare(b);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      const missing = (x === undefined) - (y === undefined);
      if (missing || x === undefined) return missing;
      return falling ? compare(y, x) : compare(x, y);
    });
    body.append(...rows);
  });
}
"""


def pairs(found: Mapping[str, object]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in found.items()
    )
    return f'<div class="scroll"><table class="pairs">{rows}</table></div>'


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """A nested config's values by dotted names."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def folded(summary: str, content: str) -> str:
    """Content that opens by a click on its summary."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def figure(caption: str, png: bytes) -> str:
    """A picture, with its caption below.

    Raises:
      ValueError: it is not a PNG.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"the image {caption!r} must be the bytes of a PNG file")
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def image_uri(image: ArrayLike) -> str:
    """An image ``[H, W, C]`` in [-1, 1], grey or RGB, as a ``data:`` address.

    Small ones are kept to the pixel; others become JPEG files of good quality.
    """
    pixels = plots.to_uint8(image)
    whole = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if max(whole.size) <= _EXACT_SIZE:
        kind, data = "png", plots.encode_png(whole)
    else:
        buffer = io.BytesIO()
        whole.save(buffer, format="JPEG", quality=92)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def page(title: str, body: Sequence[str], style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
      title: of the window, and above everything.
      body: its parts, as HTML.
      style: beside `STYLE`.
      script: run when the body is there; no other may run.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}{style}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            *([f"<script>{script}</script>"] if script else []),
            "</body>\n</html>\n",
        ]
    )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
