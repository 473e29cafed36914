"""What was measured in, the sections of the report out, as HTML: tables, distributions, layers, mistakes, machines.

    [Line, ...]  ->  measurements, speeds, layers, mistakes
    [Document, ...]  ->  remarks, machines

A section of which nothing is known is "". Knows nothing of the page around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape

from vitedge.bench import charts
from vitedge.bench.document import Confused, Disagreement, Document, Judged, LayerTime
from vitedge.bench.frontier import machine_names
from vitedge.bench.plot import three
from vitedge.bench.scatter import key_of
from vitedge.bench.tables import LEGEND, MORE_COLUMNS, Column, Line, columns, failures

MOST_LINES = 240  # of a table
MOST_RIDGES = 24
MOST_ENGINES = 6  # whose layers are shown
LAYER_BYTES = 250_000  # of all layers
PICTURE_BYTES = 350_000  # of all pictures
MATRIX = 20  # classes, up to which all of them are shown against each other
FEWER = 6  # pictures of any candidate but the first
PAIRS = 8  # of classes that are most confused
JPEG = re.compile(r"[A-Za-z0-9+/]+=*")  # base64
LONG = 60  # letters of a fact that takes a line of its own


def measurements(shown: Sequence[Line], narrow: Sequence[Line], documents: Sequence[Document]) -> str:
    """Every timing. narrow: those at the batch of the plot, which come first; all figures of all timings can be unfolded."""
    heads = [column for column in columns(narrow) if column.head not in _elsewhere(narrow)]
    main = _table(narrow, heads, documents) if narrow or failures(documents) else ""
    kept = shown[:MOST_LINES]
    left = "" if len(kept) == len(shown) else f", the first {MOST_LINES} of them; the CSV has all"
    every = [*columns(kept), *columns(kept, MORE_COLUMNS)]
    full = _table(kept, every, ()) if kept else ""
    count = f"All figures of {'the timing' if len(shown) == 1 else f'all {len(shown):,} timings'}{left}"
    more = f"<details><summary>{count}</summary>{full}</details>" if full else ""
    batch = narrow[0].timed.batch if narrow else 1
    calls = "Calls of one image." if batch == 1 else f"Calls of {batch} images."
    said = f"{calls} ± is half of the interval that holds the figure with 95 % confidence. A press on a heading sorts."
    legend = f'<p class="key-line">{escape(LEGEND)}</p>'
    return f'<section><h2>Measurements</h2><p class="said">{said}</p>{main}{legend}{more}</section>'


def speeds(shown: Sequence[Line], narrow: Sequence[Line]) -> str:
    """How steady the latency is at the batch of the plot, and what larger batches bring."""
    ridges, curves = _ridges(narrow), _curves(shown)
    if not ridges:
        return ""
    said = "Each ridge is one candidate's calls: the tall tick is the median, the red one the 99th percentile."
    more = " Larger batches: the candidate to ship, the reference and the frontier." if curves else ""
    figures = f'<div class="pair">{ridges}{curves}</div>' if curves else f'<div class="narrow">{ridges}</div>'
    title = "How steady, how much at a time" if curves else "How steady the latency is"
    return f'<section><h2>{title}</h2><p class="said">{said}{more}</p>{figures}</section>'


def layers(shown: Sequence[Line]) -> str:
    """What each engine computes where, in which type, and how long that takes."""
    figures: list[str] = []
    size = 0
    for line in _of_interest(shown, lambda line: bool(line.candidate.layers)):
        figure = _layers(line, line.candidate.layers)
        size += len(figure)
        if len(figures) == MOST_ENGINES or (figures and size > LAYER_BYTES):
            break
        figures.append(figure)
    if not figures:
        return ""
    said = "Parts of the model downwards, its blocks to the right. The colour is the type, the strength the time."
    return f'<section><h2>Layer by layer</h2><p class="said">{said}</p><div class="pair">{"".join(figures)}</div></section>'


def mistakes(shown: Sequence[Line]) -> str:
    """Which classes are confused, and the images on which a candidate and the reference are furthest apart."""
    line = next(iter(_of_interest(shown, lambda line: bool(line.judged.confusion))), None)
    confused = "" if line is None else _confusion(line, _judged_reference(line.document))
    pictures = "".join(_galleries(shown))
    if not confused and not pictures:
        return ""
    return f"<section><h2>What it gets wrong</h2>{_said_of_mistakes(confused, pictures)}{confused}{pictures}</section>"


def remarks(documents: Sequence[Document], own: Sequence[str]) -> str:
    """What was noticed on the way."""
    notes = list(dict.fromkeys([*own, *(note for document in documents for note in document.notes)]))
    if not notes:
        return ""
    entries = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section><h2>Notes</h2><div class="card pad"><ul>{entries}</ul></div></section>'


def machines(documents: Sequence[Document]) -> str:
    """Where, when, with what and on what it was measured."""
    blocks = []
    for document, name in zip(documents, machine_names(documents), strict=True):
        judged = max((one.judged.images for one in document.candidates if one.judged), default=0)
        images = f"{document.dataset}, {judged:,} images" if judged else ""
        facts = {**document.environment, "images": images, "reference": document.reference}
        entries = "".join(
            f"<div{_long(value)}><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value
        )
        head = f"<h3>{escape(name)}</h3>" if len(documents) > 1 else ""
        blocks.append(f"{head}<dl>{entries}</dl>")
    return f'<section><h2>Environment</h2><div class="card pad">{"".join(blocks)}</div></section>'


def _table(kept: Sequence[Line], heads: Sequence[Column], documents: Sequence[Document]) -> str:
    """A table that sorts; with what failed in `documents` at its end."""
    side = {column.head: column.is_number(kept) for column in heads}
    head = "".join(
        f'<th{_class(column, side)}{_best(column)} title="{escape(column.about)}">{escape(column.head)}</th>' for column in heads
    )
    rows = []
    for line in kept:
        cells = "".join(_cell(line, column, side, kept) for column in heads)
        chosen = ' class="chosen"' if line.chosen else ""
        rows.append(f'<tr{chosen} data-key="{escape(key_of(line.document, line.candidate))}">{cells}</tr>')
    for name, reason in failures(documents):
        lead = "<td></td>" if heads and not heads[0].head else ""
        span = max(1, len(heads) - (2 if lead else 1))
        rows.append(
            f'<tr class="failed">{lead}<td class="key">{escape(name)}</td>'
            f'<td colspan="{span}"><b>failed</b> {escape(reason)}</td></tr>'
        )
    return (
        f'<div class="card scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(line: Line, column: Column, side: dict[str, bool], kept: Sequence[Line]) -> str:
    value = column.value(line)
    text = escape(column.text(line, spread=False)) if column.head else line.mark
    between = column.spread(line)
    small = f"<small>±{escape(column.text(line).partition('±')[2])}</small>" if between and value is not None else ""
    text = f"<b>{text}</b>" if column.is_best(line, kept) else text
    data = "" if value is None or not column.head else f' data-value="{escape(str(value))}"'
    return f"<td{_class(column, side)}{data}>{text}{small}</td>"


def _class(column: Column, side: dict[str, bool]) -> str:
    if not column.head:
        return ' class="mark-cell"'
    if column.head == "candidate":
        return ' class="key"'
    return ' class="number"' if side[column.head] else ""


def _best(column: Column) -> str:
    return f' data-best="{column.best}"' if column.best else ""


def _is_reference(line: Line) -> bool:
    return line.candidate.name == line.document.reference


def _of_interest(shown: Sequence[Line], has: Callable[[Line], bool]) -> list[Line]:
    """A line of each candidate that has something to show: the choice, then the reference, then the frontier, then others."""
    first: dict[tuple[int, str], Line] = {}
    for line in filter(has, shown):
        first.setdefault((id(line.document), line.name), line)
    chosen = {(id(line.document), line.name) for line in shown if line.chosen}

    def rank(line: Line) -> tuple[bool, bool, bool]:
        return (id(line.document), line.name) not in chosen, not _is_reference(line), not line.mark

    return sorted(first.values(), key=rank)


def _elsewhere(narrow: Sequence[Line]) -> set[str]:
    """The columns that the first table leaves to the second: what is the same, and what says less than another."""
    return {"batch", "SQNR dB"} if any(line.judged.top1 is not None for line in narrow) else {"batch"}


def _ridges(narrow: Sequence[Line]) -> str:
    """A ridge a candidate; those that matter are kept where there are many."""
    ranked = sorted(narrow, key=lambda line: (not line.chosen, not _is_reference(line), not line.mark, line.timed.p50_ms))
    kept = sorted(ranked[:MOST_RIDGES], key=lambda line: line.timed.p50_ms)
    if not kept:
        return ""
    left = f"; {len(narrow) - len(kept)} more are not shown" if len(kept) < len(narrow) else ""
    batch = "one image" if kept[0].timed.batch == 1 else f"a batch of {kept[0].timed.batch}"
    caption = "<figcaption><b>Latency</b><span>narrow and to the left is better</span></figcaption>"
    return f'<figure class="card plot">{caption}{charts.distributions(kept)}<p class="axis">ms for {batch}{left}</p></figure>'


def _curves(shown: Sequence[Line]) -> str:
    """Throughput over the batch, where there are several."""
    marked = {(id(line.document), line.name) for line in shown if line.mark}
    kept = [line for line in shown if (id(line.document), line.name) in marked or _is_reference(line)]
    if len({line.timed.batch for line in kept}) < 2:
        return ""
    chosen = {(id(line.document), line.name) for line in kept if line.chosen}
    kept.sort(key=lambda line: ((id(line.document), line.name) not in chosen, not _is_reference(line), line.timed.batch))
    caption = "<figcaption><b>Throughput, images/s</b><span>up is better</span></figcaption>"
    return f'<figure class="card plot">{caption}{charts.throughput(kept)}<p class="axis">images in a call</p></figure>'


def _layers(line: Line, found: Sequence[LayerTime]) -> str:
    total = sum(layer.ms for layer in found)
    return (
        f'<figure class="card plot"><figcaption><b>{escape(line.name)}</b><span>{three(total)} ms in {len(found)} layers</span>'
        f"</figcaption>{charts.type_bar(found)}{charts.layer_grid(found)}</figure>"
    )


def _judged_reference(document: Document) -> Judged:
    return next((one.judged for one in document.finished if one.name == document.reference and one.judged), Judged(0))


def _said_of_mistakes(confused: str, pictures: str) -> str:
    said = ["Which classes are taken for which others."] if confused else []
    said += ["Then the images on which a candidate is furthest from the reference."] if pictures else []
    return f'<p class="said">{" ".join(said)}</p>'


def _confusion(line: Line, reference: Judged) -> str:
    """The pairs most confused, beside the whole matrix where there are few classes."""
    labels, found = _labels(line.document, line.judged.confusion), line.judged.confusion
    before = {(entry.truth, entry.answer): entry.images for entry in reference.confusion}
    ranked = sorted(found, key=lambda entry: -entry.images)[:PAIRS]
    own = _is_reference(line)
    head = f'<tr><th>truth</th><th>answer</th><th class="number">images</th>{"" if own else _reference_head(line)}</tr>'
    rows = "".join(
        f'<tr><td>{escape(labels[entry.truth])}</td><td>{escape(labels[entry.answer])}</td><td class="number">{entry.images}</td>'
        f"{'' if own else _before(before, entry)}</tr>"
        for entry in ranked
    )
    pairs = (
        f'<div class="card pad"><h3>{escape(line.name)}: the classes most confused</h3>'
        f'<table class="pairs"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    )
    if len(labels) > MATRIX:
        return f'<div class="pair">{pairs}</div>'
    caption = f"<figcaption><b>{escape(line.name)}</b><span>truth downwards, answer to the right</span></figcaption>"
    grid = f'<figure class="card plot">{caption}{charts.confusion_grid(found, labels)}</figure>'
    return f'<div class="pair">{grid}{pairs}</div>'


def _reference_head(line: Line) -> str:
    return f'<th class="number">by {escape(line.document.reference.rpartition("/")[2])}</th>'


def _before(before: dict[tuple[int, int], int], entry: Confused) -> str:
    return f'<td class="number">{before.get((entry.truth, entry.answer), 0)}</td>'


def _labels(document: Document, confused: Sequence[Confused]) -> list[str]:
    """The names of the classes; numbers where there are none, or too few."""
    most = max([len(document.labels) - 1, *(max(entry.truth, entry.answer) for entry in confused)])
    return [document.labels[place] if place < len(document.labels) else str(place) for place in range(most + 1)]


def _galleries(shown: Sequence[Line]) -> Iterator[str]:
    """The worst images of the choice, then of others, folded and fewer, as long as there is room."""
    size = 0
    for place, line in enumerate(_of_interest(shown, lambda line: bool(line.judged.worst))):
        figures = [_picture(one) for one in line.judged.worst[: FEWER if place else None]]
        size += sum(map(len, figures))
        if size > PICTURE_BYTES or place > MOST_ENGINES:
            return
        title = f"{escape(line.name)} furthest from {escape(line.document.reference.rpartition('/')[2])}"
        gallery = f'<div class="gallery">{"".join(figures)}</div>'
        yield (
            f'<details><summary>{title}</summary><div class="card pad">{gallery}</div></details>'
            if place
            else f'<div class="card pad worst"><h3>{title}</h3>{gallery}</div>'
        )


def _picture(one: Disagreement) -> str:
    image = (
        f'<img alt="" width="96" height="96" src="data:image/jpeg;base64,{one.picture}">' if JPEG.fullmatch(one.picture) else ""
    )
    told = (("truth", one.truth), ("reference", one.reference), ("answer", one.answer))
    words = "".join(f'<span class="soft">{name}: {escape(value)}</span>' for name, value in told if value)
    return f"<figure>{image}<figcaption>{escape(one.image)}{words}</figcaption></figure>"


def _long(value: str) -> str:
    return ' class="long"' if len(value) > LONG else ""
