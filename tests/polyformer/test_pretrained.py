"""Released checkpoints: each family loads from its own names and gives the original's numbers; damage is refused."""

from __future__ import annotations

import importlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file

from polyformer.architectures.gguf_file import BLOCK_NAMES, GGUFFile, dequantise, rotate_half_rows
from polyformer.architectures.safetensors_file import SafetensorsFiles
from polyformer.export import export_onnx
from polyformer.export_step import export_step
from polyformer.model import ModelConfig, Transformer
from polyformer.pretrained import load_pretrained
from tests.polyformer.originals import (
    BERT,
    GPT2,
    HEADS,
    LLAMA,
    NEOX,
    ROBERTA,
    VOCAB,
    WINDOW,
    D,
    K,
    compute,
    random_weights,
    write,
)

IDS = [3, 22, 4, 7, 7, 19, 2, 12, 5]  # neither 0 nor 1: these are padding, which RoBERTa does not count

FAMILIES = {
    "gpt2": GPT2,
    "gpt2-inner": GPT2 | {"n_inner": 4 * D},
    "neox": NEOX,
    "neox-sequential": NEOX | {"use_parallel_residual": False},
    "neox-whole-heads": NEOX | {"rotary_pct": 1.0},
    "llama": LLAMA,
    "llama-untied": LLAMA | {"tie_word_embeddings": False},
    "llama-one-key-head": LLAMA | {"num_key_value_heads": 1},
    "llama-as-many-key-heads": LLAMA | {"num_key_value_heads": HEADS},
    "bert": BERT,
    "roberta": ROBERTA,
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_outputs_equal_the_original(config, tmp_path):
    weights = random_weights(config)
    model = load_pretrained(write(tmp_path, config, weights))
    expected = compute(config, weights, IDS)
    with torch.no_grad():
        found = model(torch.tensor([IDS]))[0].numpy()
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_outputs_equal_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, config, random_weights(config))
    auto = transformers.AutoModel if config["model_type"] in ("bert", "roberta") else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS]))[0]
        for source in (tmp_path, theirs):
            torch.testing.assert_close(load_pretrained(source)(torch.tensor([IDS])), expected, atol=2e-5, rtol=1e-5)


class InMemory(torch.nn.Module):
    """What `load_pretrained` uses of a model of `transformers`: its config as a dict, its tensors under the names of the files."""

    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.tensors = {name: torch.from_numpy(w).float() for name, w in weights.items()}
        self.config = type("Config", (), {"to_dict": lambda self: {"transformers_version": "5.0.0", **config}})()

    def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.tensors


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_model_in_memory_is_the_one_of_its_files(config, tmp_path):
    weights = random_weights(config)
    given = InMemory(config, weights)
    written, found = load_pretrained(write(tmp_path, config, weights)), load_pretrained(given)
    assert found.config == written.config
    assert all(torch.equal(found.state_dict()[name], value) for name, value in written.state_dict().items())
    before = {name: value.clone() for name, value in given.tensors.items()}
    with torch.no_grad():
        for p in found.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in given.tensors.items())  # they were copied
    with pytest.raises(ValueError, match=r"InMemory was made for windows of 1 to 1[46] tokens"):
        load_pretrained(given, length=17)


def test_token_types_and_padding_of_an_encoder(tmp_path):
    weights = random_weights(BERT)
    model = load_pretrained(write(tmp_path, BERT, weights))
    types = [0, 0, 0, 0, 1, 1, 1, 1, 1]
    padded, visible = torch.tensor([[*IDS, 9, 9]]), torch.tensor([[True] * len(IDS) + [False] * 2])
    with torch.no_grad():
        found = model(padded, visible_BT=visible, types_BT=torch.tensor([[*types, 0, 0]]))[0, : len(IDS)].numpy()
    np.testing.assert_allclose(found, compute(BERT, weights, IDS, types), atol=1e-5)
    assert np.abs(found - compute(BERT, weights, IDS)).max() > 0.1


@pytest.mark.parametrize("kind", ["safetensors-bf16", "shards"])
def test_other_ways_of_writing_the_same_weights(kind, tmp_path):
    weights = random_weights(LLAMA)
    write(tmp_path, LLAMA, weights)
    before = load_pretrained(tmp_path).state_dict()
    whole = SafetensorsFiles(tmp_path / "model.safetensors")
    if kind == "shards":
        (tmp_path / "model.safetensors").unlink()
        names = sorted(weights)
        where = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in set(where.values()):
            save_file({n: weights[n].astype(np.float32) for n in names if where[n] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        tolerance = 0.0
    else:
        from safetensors.torch import save_file as save_torch

        save_torch({n: whole[n].bfloat16() for n in whole}, tmp_path / "half.safetensors")
        (tmp_path / "half.safetensors").rename(tmp_path / "model.safetensors")
        tolerance = 2**-8
    after = load_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=tolerance, atol=0)


def test_a_shorter_window_is_the_same_function(tmp_path):
    for config in (GPT2, ROBERTA, NEOX):
        folder = write(tmp_path / config["model_type"], config, random_weights(config))
        whole, short = load_pretrained(folder), load_pretrained(folder, length=len(IDS))
        with torch.no_grad():
            torch.testing.assert_close(short(torch.tensor([IDS])), whole(torch.tensor([IDS])))
        with pytest.raises(ValueError, match="window is 9"):
            short(torch.tensor([[*IDS, 1]]))
    assert load_pretrained(tmp_path / "roberta").config.length == WINDOW - 2
    with pytest.raises(ValueError, match="1 to 14 tokens"):
        load_pretrained(tmp_path / "roberta", length=15)


def test_tied_head_is_one_parameter(tmp_path):
    model = load_pretrained(write(tmp_path, LLAMA, random_weights(LLAMA)))
    assert model.head.weight is model.token.weight
    assert model.parameter_count() == sum(v.size for v in random_weights(LLAMA).values())


DAMAGE = {
    "missing": (lambda c, w: w.pop("model.layers.1.mlp.up_proj.weight"), KeyError, r"layers\.1\.mlp\.up_proj"),
    "unknown": (lambda c, w: w.update({"model.layers.0.extra": np.ones(3)}), ValueError, "no place in the model"),
    "bias not in config": (
        lambda c, w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(D)}),
        ValueError,
        "no place in the model",
    ),
    "shape": (lambda c, w: c.update(intermediate_size=41), ValueError, r"\(40, 24\).*\(41, 24\)"),
    "family": (lambda c, w: c.update(model_type="mamba"), ValueError, "known: bert, gpt2"),
    "activation": (lambda c, w: c.update(hidden_act="mish"), ValueError, "mish.*known: gelu"),
    "scaled rotary": (lambda c, w: c.update(rope_scaling={"rope_type": "llama3"}), ValueError, "llama3"),
    "head size": (lambda c, w: c.update(head_dim=32), ValueError, "head_dim=32"),
}


@pytest.mark.parametrize(("change", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_checkpoint_that_does_not_fit_is_refused(change, error, message, tmp_path):
    config, weights = dict(LLAMA), random_weights(LLAMA)
    change(config, weights)
    with pytest.raises(error, match=message):
        load_pretrained(write(tmp_path, config, weights))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"convert the \.bin"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [4, 40, -10], ids=["no-header", "half-a-header", "short-data"])
def test_a_cut_file_is_refused(size, tmp_path):
    path = write(tmp_path, GPT2, random_weights(GPT2)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut|fetch it again"):
        load_pretrained(tmp_path)


def test_shards_outside_their_folder_are_refused(tmp_path):
    write(tmp_path, GPT2, {})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="own folder"):
        load_pretrained(tmp_path)


def test_configs_survive_json_and_old_files_keep_their_bytes(tmp_path):
    config = load_pretrained(write(tmp_path, BERT, random_weights(BERT))).config
    assert ModelConfig.from_json(config.to_json()) == config
    plain = ModelConfig(vocab=8, length=4, width=8, heads=2, blocks=1, norms=("affine",) * 3)
    assert list(json.loads(plain.to_json()))[-1] == "norm_newton"


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_exported_file_equals_the_original(config, tmp_path):
    weights = random_weights(config)
    model = load_pretrained(write(tmp_path, config, weights), length=len(IDS))
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"tokens": np.array([IDS])})[0][0]
    assert session.get_outputs()[0].name == ("states" if config["model_type"] in ("bert", "roberta") else "logits")
    expected = compute(config, weights, IDS)
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1.0, np.abs(expected).max()), rtol=0)


def test_a_tied_head_is_written_once(tmp_path):
    model = load_pretrained(write(tmp_path, LLAMA, random_weights(LLAMA)))
    export_onnx(model, tmp_path / "model.onnx")
    tables = [t.name for t in onnx.load(tmp_path / "model.onnx").graph.initializer if sorted(t.dims) == [VOCAB, D]]
    assert tables == ["token.weight"]


def test_a_step_refuses_what_it_cannot_write(tmp_path):
    model = load_pretrained(write(tmp_path, LLAMA, random_weights(LLAMA)))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer is a Softmax"):
        export_step(model, tmp_path / "step.onnx")


def test_gated_post_norm_levels():
    config = ModelConfig(
        vocab=8, length=4, width=8, heads=2, blocks=1, norms=("rms_poly",) * 3, norm_degree=2, activation="square",
        mixer="power_softmax", form="mean", reciprocal="polynomial", reciprocal_degree=2, power=2,
    )  # fmt: skip
    attention, mlp, norm = 7, 1 + 1 + 1, 3
    assert Transformer(config).levels == (attention + norm - 1) + (mlp + norm - 1) + (1 + norm - 1)
    assert Transformer(replace(config, gated=True)).levels == Transformer(config).levels + 1
    assert Transformer(replace(config, rotary=2)).levels == Transformer(config).levels  # in the weights of q and k
    assert Transformer(replace(config, order="post", head="none")).levels == attention + norm + mlp + norm


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    """A GGUF file of version 3, float32, with q and k in interleaved order."""
    part = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    fields = {
        "general.architecture": "llama",
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.tokens": ["a", "bc"],
    }

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(v) -> bytes:
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        if isinstance(v, list):
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(fields))
    head += b"".join(string(k) + value(v) for k, v in fields.items())
    data = b""
    for name, w in weights.items():
        if name in plain:
            theirs = plain[name]
        else:
            _, _, block, middle = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{block}.{part[middle]}.weight"
        if theirs.endswith(("attn_q.weight", "attn_k.weight")):  # halves of each head -> neighbours
            w = w.reshape(-1, 2, K // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        shape = struct.pack(f"<I{w.ndim}Q", w.ndim, *w.shape[::-1])
        head += string(theirs) + shape + struct.pack("<IQ", 0, len(data))
        raw = w.astype("<f4").tobytes()
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def test_gguf_equals_the_original(tmp_path):
    weights = random_weights(LLAMA)
    write_gguf(tmp_path / "model.gguf", LLAMA, weights)
    with torch.no_grad():
        found = load_pretrained(tmp_path / "model.gguf")(torch.tensor([IDS]))[0].numpy()
    expected = compute(LLAMA, weights, IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert GGUFFile(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"] == ["a", "bc"]


@pytest.mark.parametrize("kind", [2, 3, 8], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_dequantisation_follows_the_definition(kind):
    """Weight by weight from the layout of a block."""
    rng = np.random.default_rng(0)
    size = {2: 18, 3: 20, 8: 34}[kind]
    blocks = rng.integers(0, 256, (5, size), dtype=np.uint8)
    scales = rng.normal(size=(5, 2)).astype(np.float16)
    blocks[:, :2] = scales[:, :1].view(np.uint8)
    if kind == 3:
        blocks[:, 2:4] = scales[:, 1:].copy().view(np.uint8)
    found = dequantise(blocks.reshape(-1), kind).reshape(5, 32)
    for b, block in enumerate(blocks):
        for j in range(32):
            d, m = float(scales[b, 0]), float(scales[b, 1])
            if kind == 8:
                expected = d * int(np.int8(block[2 + j : 3 + j].view(np.int8)[0]))
            else:
                byte = int(block[size - 16 + j % 16])
                q = byte % 16 if j < 16 else byte // 16
                expected = d * (q - 8) if kind == 2 else d * q + m
            assert found[b, j] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [2, 3, 8], ids=["Q4_0", "Q4_1", "Q8_0"])
def test_dequantisation_equals_the_gguf_package(kind):
    quants = pytest.importorskip("gguf.quants")
    constants = importlib.import_module("gguf.constants")
    rng = np.random.default_rng(1)
    raw = quants.quantize(rng.normal(size=(4, 64)).astype(np.float32), constants.GGMLQuantizationType(kind))
    expected = quants.dequantize(raw, constants.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(dequantise(raw.reshape(-1), kind).reshape(4, 64), expected)


def test_rows_for_rotate_half():
    weight = torch.arange(8.0)[:, None]  # two heads of 4 rows
    assert rotate_half_rows(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, LLAMA, random_weights(LLAMA))
    whole = path.read_bytes()
    for content, message in (
        (b"GGML" + whole[4:], "does not begin with GGUF"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
        (whole[:200], "fetch it again"),
        (whole[:-64], "fetch it again"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_pretrained(path)
