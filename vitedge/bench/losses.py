"""What a verification found in, something to read out: one line on the whole, and a terminal table of what each layer loses.

    Verification  ->  end_to_end, layer_table

Knows nothing of graphs: it prints what was measured and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from vitedge.bench.verify import LayerLoss, Verification


def end_to_end(found: Verification) -> str:
    """One line on how far two answers are apart."""
    worst = f" (worst: {found.worst_db:.1f} dB, {found.worst_image})" if found.worst_db is not None else ""
    parts = [
        f"SQNR {_decibels(found.sqnr_db)} dB{worst}",
        "" if found.cosine is None else f"cosine {found.cosine:.6f}",
        f"largest difference {found.largest:.3g}",
        "" if found.agreement is None else f"same top-1 for {found.agreement:.2f}%",
    ]
    return f"{found.images} image{'' if found.images == 1 else 's'}: {', '.join(filter(None, parts))}"


def layer_table(layers: Sequence[LayerLoss], most: int) -> Table:
    """The `most` layers that lose most by themselves, the worst first; `#` is their place in the flow."""
    result = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("#", "layer", "own dB", "SQNR dB"):
        result.add_column(head, justify="left" if head == "layer" else "right")
    ranked = sorted(enumerate(layers, 1), key=lambda entry: _rank(entry[1]))
    for place, layer in ranked[:most]:
        name = " + ".join((*layer.within, layer.name))
        result.add_row(str(place), Text(name), _decibels(layer.own_db), _decibels(layer.sqnr_db))
    return result


def _rank(layer: LayerLoss) -> tuple[float, float]:
    """Lower for a layer that loses more; what is not known goes last."""
    own, total = (math.inf if value is None else value for value in (layer.own_db, layer.sqnr_db))
    return own, total


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
