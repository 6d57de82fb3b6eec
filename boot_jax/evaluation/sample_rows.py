"""Rows of samples on a page; a click shows one large, beside the nearest real images.

Rows whose samples have no neighbours are plain pictures. The page needs `STYLE` and
`SCRIPT`; of what the script shows, all words are made here.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from boot_jax.evaluation.nearest import Neighbour, ShownSample
from boot_jax.evaluation.pages import image_uri

STYLE = """
.samples .row { display: grid; gap: .25rem; margin: .25rem 0; align-items: center;
  grid-template-columns: 9.5rem repeat(var(--columns), minmax(2.6rem, 4.6rem)); }
.samples .name { font-size: .9rem; line-height: 1.25; padding-right: .5rem;
  overflow-wrap: anywhere; }
.samples img, dialog img { display: block; width: 100%; border-radius: 3px;
  background: #fff; }
img[src^="data:image/png"] { image-rendering: pixelated; }
button.sample { padding: 0; border: 2px solid transparent; border-radius: 5px;
  background: none; cursor: pointer; }
span.sample { padding: 2px; }
button.sample:hover { border-color: var(--quiet); }
button:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
dialog { color: var(--ink); background: var(--page); border: 1px solid var(--line);
  border-radius: 10px; padding: 1rem 1.2rem; width: min(50rem, 100vw - 1.5rem);
  box-sizing: border-box; max-height: calc(100vh - 1.5rem); overflow: auto; }
dialog::backdrop { background: rgb(0 0 0 / 55%); }
dialog .head { display: flex; gap: 1rem; align-items: center;
  justify-content: space-between; }
dialog h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
dialog .beside { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr);
  gap: 1.2rem; margin: .8rem 0; }
dialog .near { display: grid; align-content: start; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
dialog figure { margin: 0; }
dialog figure img { padding: 0; border: 0; border-radius: 3px; }
dialog figcaption { font-size: .85rem; line-height: 1.3; padding-top: .2rem; }
dialog p { margin: .5rem 0; }
dialog button { font: inherit; color: inherit; background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .7rem; }
@media (max-width: 40rem) {
  .samples .row { margin: .7rem 0;
    grid-template-columns: repeat(var(--columns), minmax(2.6rem, 4.6rem)); }
  .samples .name { grid-column: 1 / -1; position: sticky; left: 0; width: 80vw; }
  dialog .beside { grid-template-columns: minmax(0, 1fr); gap: .8rem; }
  dialog .large { width: min(9rem, 60%); }
  dialog .near { grid-template-columns: repeat(auto-fill, minmax(4.8rem, 1fr)); }
}
@media print { .scroll { overflow: visible; }
  .samples .row { grid-template-columns: 9.5rem repeat(var(--columns), minmax(0, 3rem));
    break-inside: avoid; } }
"""

_DIALOG = """
<noscript><p class="quiet">This page needs JavaScript to show neighbours.</p></noscript>
<dialog id="viewer" aria-labelledby="viewer-title"><div class="head">
<h3 id="viewer-title"></h3><button type="button" class="close">Close</button></div>
<div class="beside"><figure class="large"><img alt="">
<figcaption></figcaption></figure><div class="near"></div></div>
<p class="told"></p><p><button type="button" class="previous">Previous</button>
<button type="button" class="next">Next</button></p></dialog>
"""

SCRIPT = """
{
  const part = name => document.querySelector("#viewer " + name);
  const viewer = document.getElementById("viewer");
  const buttons = [...document.querySelectorAll("button.sample")];
  const data = JSON.parse(document.getElementById("neighbours")?.textContent || "null");
  let shown = 0;
  const picture = (source, text) => {
    const figure = document.createElement("figure"), image = new Image();
    const caption = document.createElement("figcaption");
    image.src = source;
    image.alt = caption.textContent = text;
    figure.append(image, caption);
    return figure;
  };
  const show = index => {
    shown = (index + buttons.length) % buttons.length;
    const sample = data.samples[shown];
    part("h3").textContent = sample.title;
    part(".large img").src = buttons[shown].firstChild.src;
    part(".large img").alt = sample.title;
    part(".large figcaption").textContent = sample.caption;
    part(".near").replaceChildren(
      ...sample.near.map(([image, text]) => picture(data.images[image], text)));
    part(".told").textContent = sample.told;
    if (!viewer.open) viewer.showModal();
  };
  if (data) {
    buttons.forEach((button, index) => button.onclick = () => show(index));
    part(".close").onclick = () => viewer.close();
    part(".previous").onclick = () => show(shown - 1);
    part(".next").onclick = () => show(shown + 1);
    viewer.onclick = event => event.target === viewer && viewer.close();
    viewer.onclose = () => buttons[shown].focus();
    viewer.onkeydown = event => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (step) show(shown + step);
    };
  }
}
"""


def distance_text(distance: float) -> str:
    """A distance with four digits."""
    return f"{distance:#.4g}".rstrip(".")


def _neighbour_text(neighbour: Neighbour) -> str:
    return f"real image {neighbour.index}, distance {distance_text(neighbour.distance)}"


def _told(sample: ShownSample) -> str:
    """Where the distance of the nearest lies among those of real images."""
    if sample.typical is None or sample.share is None:
        return ""
    low, median, high = map(distance_text, sample.typical)
    near = distance_text(sample.neighbours[0].distance)
    among = (
        "no real image has another as near"
        if sample.share == 0
        else f"{100 * sample.share:.3g} % of real images have another at least as near"
    )
    return (
        f"The nearest real image is at {near}; {among}. Real images have their nearest "
        f"other at {median} in the median (5 to 95 %: {low} to {high})."
    )


def _titled(
    rows: Mapping[str, Sequence[ShownSample]],
) -> Iterator[tuple[str, str, ShownSample]]:
    """Row, title and sample."""
    for name, samples in rows.items():
        for number, sample in enumerate(samples, 1):
            yield name, f"{name}: sample {number}", sample


def _data(rows: Mapping[str, Sequence[ShownSample]]) -> str:
    """What the script shows; every real image stands there once."""
    samples, places, images = [], {}, []
    for _, title, sample in _titled(rows):
        near = []
        for neighbour in sample.neighbours:
            if neighbour.index not in places:
                places[neighbour.index] = len(images)
                images.append(image_uri(neighbour.image))
            near.append((places[neighbour.index], _neighbour_text(neighbour)))
        samples.append(
            {
                "title": title,
                "caption": sample.caption,
                "near": near,
                "told": _told(sample),
            }
        )
    found: dict[str, Any] = {"samples": samples, "images": images}
    # No text may end the element.
    text = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="neighbours">{text}</script>'


def section(rows: Mapping[str, Sequence[ShownSample]]) -> str:
    """The rows, and what a click shows.

    Args:
      rows: name to samples; give every row the same noises in the same order, so that a
        column shows one noise. Of samples with neighbours, all must have some.
    """
    clickable = any(sample.neighbours for _, _, sample in _titled(rows))
    cells: dict[str, list[str]] = {}
    for name, title, sample in _titled(rows):
        alt = escape(f"{title}, {sample.caption}" if sample.caption else title)
        image = f'<img src="{image_uri(sample.image)}" alt="{alt}">'
        kind, type_ = ("button", ' type="button"') if clickable else ("span", "")
        cell = f'<{kind} class="sample"{type_}>{image}</{kind}>'
        cells.setdefault(name, []).append(cell)
    columns = max(map(len, cells.values()), default=0)
    parts = [
        f'<div class="row"><div class="name">{escape(name)}</div>{"".join(own)}</div>'
        for name, own in cells.items()
    ]
    hint = (
        '<p class="quiet">Each column shows one noise. A click on a sample shows the '
        "real images nearest to it.</p>"
        if clickable
        else '<p class="quiet">Each column shows one noise.</p>'
    )
    drawn = (
        f'{hint}<div class="scroll samples" style="--columns: {columns}">'
        f"{''.join(parts)}</div>"
    )
    return drawn + (_DIALOG + _data(rows) if clickable else "")
