"""The tokenizer of a released checkpoint, and what its ids mean to a run.

It is the tokenizer.json of a Hugging Face folder, or the byte-level BPE in a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from polyformer.architectures.gguf_file import GGUFFile

# tokenizer.ggml.pre -> whether digits are split one by one before the byte-level rule
DIGITS = {"smollm": True, "gpt-2": False, "default": False}
CONTROL = 3  # token type of GGUF: stands for no text
# Documents of pre-training end with one of these; the eos_token_id of a chat model ends a turn instead.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>")


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer that belongs to a checkpoint, without truncation and padding.

    Args:
        path: what `load_pretrained` takes, a folder with tokenizer.json or a .gguf file; or a tokenizer.json itself.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no tokenizer.json.
        ValueError: the file is damaged, or the GGUF file holds another kind of tokenizer.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    file = path if path.suffix == ".json" else path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: fetch it with the checkpoint, vocab.txt alone is not enough")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def document_end(tokenizer: Tokenizer, values: Mapping[str, Any], wanted: str | None = None) -> int:
    """Return the id that ends a document and pads: the `wanted` token or id, a mark of pre-training, or eos_token_id.

    Args: `values` of config.json.

    Raises:
        ValueError: the wanted one is not in the vocabulary, or nothing says which it is.
    """
    special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
    if wanted is not None:
        found = tokenizer.token_to_id(wanted)
        if found is None and wanted.isdecimal() and tokenizer.id_to_token(int(wanted)) is not None:
            found = int(wanted)
        if found is None:
            raise ValueError(f"the tokenizer has no token {wanted!r}; its special ones: {', '.join(special) or 'none'}")
        return int(found)
    known = [tokenizer.token_to_id(mark) for mark in ENDS]
    eos = values.get("eos_token_id")
    known += list(eos) if isinstance(eos, list) else [eos]
    found = next((i for i in known if i is not None), None)
    if found is None:
        raise ValueError(
            f"nothing says which token ends a document: none of {', '.join(ENDS)}, no eos_token_id; name one with --end, "
            f"for example of {', '.join(special[:8]) or 'the vocabulary'}"
        )
    return int(found)


def require_rows(tokenizer: Tokenizer, vocab: int, checkpoint: Path) -> None:
    """Raise ValueError if the tokenizer gives ids that the model's table of `vocab` rows has not."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab:
        raise ValueError(
            f"the tokenizer of {checkpoint} has ids up to {largest}, the model's table rows 0 to {vocab - 1}: they do not "
            "belong together, fetch both from one release"
        )


def _of_gguf(path: Path) -> Tokenizer:
    fields = {k.removeprefix("tokenizer.ggml."): v for k, v in GGUFFile(path).fields.items()}
    kind, rule = fields.get("model"), fields.get("pre", "default")
    if kind != "gpt2" or rule not in DIGITS:
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r} with pre-tokenizer {rule!r}; read are model 'gpt2' with "
            f"{', '.join(DIGITS)}. Use the tokenizer.json of the checkpoint"
        )
    tokens: list[str] = fields["tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if DIGITS[rule]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("token_type", [])
    control = [token for token, k in zip(tokens, kinds, strict=False) if k == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer
