"""The tokenizer of a released checkpoint: tokenizer.json of a Hugging Face folder, or the byte-level BPE in a GGUF file."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from polyformer.architectures.gguf_file import GGUFFile

# tokenizer.ggml.pre -> whether digits are split one by one before the byte-level rule
DIGITS = {"smollm": True, "gpt-2": False, "default": False}
CONTROL = 3  # token type of GGUF: stands for no text


def checkpoint_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer that belongs to a checkpoint, without truncation and padding.

    Args:
        path: what `load_pretrained` takes: a folder with tokenizer.json, or a .gguf file.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
        ValueError: the GGUF file holds another kind of tokenizer.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: fetch it with the checkpoint, vocab.txt alone is not enough")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
