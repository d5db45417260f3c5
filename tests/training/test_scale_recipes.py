"""Every recipe builds without memory, and its accounts equal counts made in other ways."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polyformer import mixers
from polyformer.architectures import family
from polyformer.model import Transformer
from training import accounts, one_step, recipes
from training.loop import token_loss
from training.one_step import fit_polynomials

# Published parameters, and the config.json of the release, as far as it decides the shape.
RELEASED = {
    "pythia-70m": (70_426_624, 512, 6, 8, 2048),
    "160m": (162_322_944, 768, 12, 12, 3072),
    "410m": (405_334_016, 1024, 24, 16, 4096),
    "1.4b": (1_414_647_808, 2048, 24, 16, 8192),
    "llama-7b-shape": (6_738_415_616, 4096, 32, 32, 11_008),
}
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50_304, "rotary_pct": 0.25, "rotary_emb_base": 10_000,
          "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False,
          "max_position_embeddings": 2048}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 32_000, "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False, "max_position_embeddings": 2048}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_recipes_have_the_shapes_of_released_models(name):
    """So their weights load, by the code that translates their config.json; and as many as were published."""
    published, width, blocks, heads, hidden = RELEASED[name]
    shape = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
    values = (LLAMA if name.startswith("llama") else PYTHIA) | shape | {"intermediate_size": hidden}
    theirs = family(values["model_type"]).config(values, 2048)
    config = recipes.load(name).model
    assert config == replace(theirs, mixer="power_softmax")
    folded = 2 * width * blocks if config.parallel else 0  # the second norm of a parallel block
    assert accounts.on_meta(config).parameter_count() == published - folded


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_builds_on_meta_with_accounts(name):
    recipe = recipes.load(name)
    model = accounts.on_meta(recipe.model)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    d, h, blocks, v, t = (getattr(recipe.model, n) for n in ("width", "hidden", "blocks", "vocab", "length"))
    found, count = accounts.account(recipe), model.parameter_count()
    assert found.parameters == count
    assert found.parameter_bytes == found.gradient_bytes == 4 * count  # fp32 weights
    assert found.optimiser_bytes == pytest.approx(8 * count, rel=1e-3)
    matrices = 3 if recipe.model.gated else 2
    assert found.forward_flops == blocks * (8 * d * d + 2 * matrices * d * h + 4 * t * d) + 2 * d * v
    assert found.step_flops == 4 * found.forward_flops  # the forward is done twice
    assert found.peak_bytes > 16 * count
    sharded = accounts.account(recipe, world=8)
    assert sharded.parameter_bytes == found.parameter_bytes // 8
    assert sharded.activation_bytes == found.activation_bytes > 0


@pytest.mark.parametrize("name", recipes.names())
def test_polynomial_form_builds_on_meta(name):
    recipe = recipes.load(name)
    model = accounts.on_meta(recipe.polynomial_config())
    assert model.parameter_count() == accounts.on_meta(recipe.model).parameter_count() + 5 * recipe.model.blocks


TINY = recipes.load("tiny_cpu").model
# Recurrences and FFTs, which torch's counter does not see: FLOPs a position and block, D = 32, E = 64, N = 16, 2 heads.
UNSEEN = {
    "griffin": 2 * 32,
    "mamba": 2 * 64 * 16,
    "polynomial_s6": 2 * 64 * 16,
    "rwkv": 2 * 2 * 32,
    "hyena": 32 * round((2 * 2.5 * 64 * 6 + 6 * 33) / 32),
    "hyena_nd": 4 * 32 * round((2 * 2.5 * 128 * 7 + 6 * 65) / 32),
    "gated_linear": 2 * 2 * 16 * 16 / 8,  # from each chunk to the next
}


def counted(config) -> float:
    """Return FLOPs a token of a forward pass over three windows, by torch's counter."""
    model, tokens = Transformer(config), torch.zeros(3, config.length, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):  # it knows no fused kernel of the CPU
        model(tokens)
    return forward.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_counts_what_torch_counts_and_what_it_does_not_see(name):
    changes = {"hyena_filter": "direct"} if name.startswith("hyena") else {}  # an MLP runs once for all windows
    if name == "hyena_nd":
        changes |= {"causal": False, "grid": (8, 4)}
    config = replace(TINY, mixer=name, **changes)
    assert accounts.forward_flops(config) == counted(config) + 2 * UNSEEN.get(name, 0)
    by_hand = sum(p.numel() for p in Transformer(config).parameters())
    assert accounts.account(recipes.load("tiny_cpu").with_(model=config)).parameters == by_hand


@pytest.mark.parametrize("name", ["linear", "gated_linear", "mamba2"])
def test_chunks_of_a_long_window_count_as_they_are_computed(name):
    config = replace(TINY, mixer=name, length=96)
    heads, states, chunk = {"linear": (2, 16, 32), "gated_linear": (2, 16, 8), "mamba2": (4, 16, 32)}[name]
    assert accounts.forward_flops(config) == counted(config) + 2 * heads * 2 * states * 16 // chunk


def test_a_mixer_in_linear_time_makes_the_same_flops_a_token_in_any_window():
    """And attention more: its share of T is 4 D a block."""
    for name, growth in (("mamba", 0), ("rwkv", 0), ("softmax", 2 * 4 * 32 * 64)):
        config = replace(TINY, mixer=name)
        assert accounts.forward_flops(config, 96) - accounts.forward_flops(config, 32) == growth


def test_a_hybrid_stack_is_the_sum_of_its_blocks():
    """Two blocks of each kind hold what two of the hybrid do, added and halved."""
    kinds = [("mamba", "mamba"), ("softmax", "softmax"), ("mamba", "softmax"), ("softmax", "mamba")]
    configs = [replace(TINY, mixers=kind) for kind in kinds]
    recipe = recipes.load("tiny_cpu").with_(checkpointing=False)
    found = [accounts.activation_bytes(recipe.with_(model=config)) for config in configs]
    assert found[2] == found[3] == (found[0] + found[1]) // 2 != found[0]
    flops = [accounts.forward_flops(config) for config in configs]
    assert flops[2] == flops[3] == (flops[0] + flops[1]) // 2 != flops[0]
    largest = [accounts.activation_bytes(recipe.with_(model=c, checkpointing=True)) for c in configs]
    assert largest[0] == largest[2] == largest[3] > largest[1]


@pytest.mark.parametrize(
    "changes",
    [{"gated": True}, {"kv_heads": 1}, {"gated": True, "kv_heads": 2, "heads": 8, "biases": False}, {"head": "tied"},
     {"head": "none"}],
    ids=lambda c: "-".join(c),
)  # fmt: skip
def test_gates_key_heads_and_heads_of_models_are_counted(changes):
    config = replace(TINY, **changes)
    assert accounts.forward_flops(config) == counted(config)


def test_flops_equal_torchs_own_count():
    recipe = recipes.load("tiny_cpu")
    model, tokens = Transformer(recipe.model), torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        loss = token_loss(model(tokens), tokens)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == 3 * 32 * accounts.forward_flops(recipe.model)
    # backward makes the scores again, 2 T D flops a position and block, which model_flops leaves out on purpose
    again = 3 * 32 * recipe.model.blocks * 2 * 32 * recipe.model.width
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(
        3 * 32 * accounts.model_flops(recipe.model) + again, rel=1e-9
    )


def test_saved_bytes_on_meta_equal_those_of_a_real_run():
    """Of a whole model, and by hand for a linear with an activation: its input and the value before the activation."""
    config = recipes.load("tiny_cpu").model
    found = []
    for model in (Transformer(config), accounts.on_meta(config)):
        tokens = torch.zeros(2, 32, dtype=torch.int64, device=model.position.device)
        found.append(accounts.saved_bytes(model, lambda m=model, t=tokens: token_loss(m(t), t)))
    assert found[0] == found[1]
    layer, x = torch.nn.Linear(8, 16, device="meta"), torch.empty(4, 8, device="meta")
    act = torch.nn.GELU()
    assert accounts.saved_bytes(layer, lambda: act(layer(x))) == 4 * (4 * 8 + 4 * 16)


def test_checkpointing_keeps_less():
    for name in ("410m", "1.4b"):  # of smaller ones the logits are most of what is kept
        recipe = recipes.load(name)
        assert accounts.activation_bytes(recipe) < accounts.activation_bytes(recipe.with_(checkpointing=False)) / 2


@pytest.mark.parametrize(
    ("batch", "micro_batch", "world", "passes"), [(8, 2, 1, 4), (8, 2, 2, 2), (8, 8, 1, 1), (8, 1, 8, 1)]
)
def test_accumulation(batch, micro_batch, world, passes):
    assert recipes.load("tiny_cpu").with_(batch=batch, micro_batch=micro_batch).accumulation(world) == passes


def test_impossible_recipes_are_refused_with_their_numbers():
    tiny = recipes.load("tiny_cpu")
    with pytest.raises(ValueError, match=r"tiny_cpu, pythia-70m, 160m, 410m, 1\.4b, llama-7b-shape"):
        recipes.load("13b")
    with pytest.raises(ValueError, match="batch 8 is not a multiple of micro_batch 3"):
        tiny.with_(micro_batch=3)
    with pytest.raises(ValueError, match="batch 8 does not divide over 3 processes"):
        tiny.accumulation(3)
    with pytest.raises(ValueError, match="fp32, bf16"):
        tiny.with_(precision="fp16")
    with pytest.raises(ValueError, match="seed is -1"):
        tiny.with_(seed=-1)


def test_recipes_differ_in_what_decides_the_curve_alone():
    tiny = recipes.load("tiny_cpu")
    other = tiny.with_(name="x", checkpointing=False, compile=True, checkpoint_every=3)
    assert tiny.differences(other.to_json()) == []
    other = other.with_(steps=41, model=replace(tiny.model, heads=4))
    assert tiny.differences(other.to_json()) == ["steps is 41 there and 40 here", "model.heads is 4 there and 2 here"]
    stored = json.loads(tiny.to_json())
    for values, name in ((stored, "optimiser"), (stored["model"], "grid"), (stored["model"], "norm_eps")):
        del values[name]  # from before this field
    assert tiny.differences(json.dumps(stored)) == []
    assert tiny.with_(optimiser="factored").differences(json.dumps(stored)) == [
        "optimiser is 'adamw' there and 'factored' here"
    ]


def test_one_step_lowers_the_loss_of_a_polynomial_model(tmp_path):
    one_step.main(["--recipe", "tiny_cpu", "--tokens", "32", "--lr", "1e-3", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["loss_after"] < found["loss_before"] < 6.5
    assert found["parameters"] == accounts.on_meta(recipes.load("tiny_cpu").model).parameter_count() + 10
    assert found["peak_bytes"] > 50e6 and found["levels"] > 0
    with pytest.raises(ValueError, match="2 to 32"):
        one_step.one_step(recipes.load("tiny_cpu"), tokens=33)


def test_fitted_polynomials_are_near_the_exact_functions():
    """On values inside their intervals the polynomial model of random weights is near the exact one."""
    recipe = recipes.load("tiny_cpu")
    config = replace(recipe.polynomial_config(), activation_degree=16, reciprocal_degree=24, norm_degree=8)
    exact, polynomial = Transformer(recipe.model), Transformer(config)
    polynomial.load_state_dict(exact.state_dict(), strict=False)
    fit_polynomials(polynomial, recipe.model.activation)
    tokens = one_step.text_windows(4, 32)
    difference = (exact(tokens) - polynomial.train()(tokens)).square().mean().sqrt()
    assert difference < 0.1 * exact(tokens).std()
