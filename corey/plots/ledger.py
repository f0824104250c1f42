"""The ledger at a glance: a numbered square per claim, in rows by tier, coloured by verdict, open if not resolved."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from corey._check import bad_value
from corey.claims import FAILS, HOLDS, NOT_MEASURED, OTHER_REASON, TIERS, UNTESTABLE, VERDICTS
from corey.figures import GREY, NOTE_POINTS, PALETTE

COLOURS = {
    HOLDS: PALETTE[0],
    OTHER_REASON: PALETTE[8],
    FAILS: PALETTE[3],
    NOT_MEASURED: "#ffffff",
    UNTESTABLE: "#bbbbbb",
}
DARK = {HOLDS, FAILS}  # squares whose number is white


def plot_ledger(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `corey.claims.table` (columns id, tier, verdict, resolved); returns the axes."""
    missing = {"id", "tier", "verdict", "resolved"} - set(rows.columns)
    if missing:
        raise bad_value("rows", f"no column {sorted(missing)[0]!r}", "the table of corey.claims")
    ax = plt.gca() if ax is None else ax
    for line, tier in enumerate(TIERS):
        of_tier = sorted(rows[rows["tier"] == tier].itertuples(), key=lambda row: (VERDICTS.index(row.verdict), row.id))
        for place, claim in enumerate(of_tier):
            _square(ax, place, line, claim.id[1:], claim.verdict, claim.resolved)
    counts = rows["verdict"].value_counts()
    labels = [f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS]
    patches = [*(_patch(0, 0, COLOURS[verdict]) for verdict in VERDICTS), _patch(0, 0, GREY, resolved=False)]
    ax.legend(patches, [*labels, "open: not resolved"], loc="upper right", handlelength=0.9)
    ax.set(xlim=(-0.1, rows["tier"].value_counts().max() + 0.1), ylim=(len(TIERS), -0.1), aspect="equal", xticks=[])
    ax.set_yticks([line + 0.5 for line in range(len(TIERS))], TIERS)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _square(ax: Axes, x: float, y: float, text: str, verdict: str, resolved: bool) -> None:
    ax.add_patch(_patch(x + 0.05, y + 0.05, COLOURS[verdict], resolved))
    colour = "white" if resolved and verdict in DARK else "black"
    ax.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=NOTE_POINTS, color=colour)


def _patch(x: float, y: float, colour: str, resolved: bool = True) -> Rectangle:
    face, edge, width = (colour, GREY, 0.4) if resolved else ("white", colour, 1.4)
    return Rectangle((x, y), 0.9, 0.9, facecolor=face, edgecolor=edge, linewidth=width)
