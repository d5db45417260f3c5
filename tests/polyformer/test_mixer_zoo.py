"""Every mixer against its definition: fast = reference with gradients, matrix = mixer, causality, degree, training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer import mixers, recurrence
from polyformer.mixers.base import CausalConv, Mixer
from polyformer.model import Block, ModelConfig, Transformer

BASE = ModelConfig(
    vocab=16, length=40, width=8, heads=2, hidden=16, blocks=1, norms=("layer",) * 3, eps=0.7, state=3, expand=2
)
ZOO: dict[str, dict[str, object]] = {
    "softmax": {"mixer": "softmax"},
    "power_softmax": {"mixer": "power_softmax"},
    "pointwise-gelu": {"mixer": "pointwise"},
    "pointwise-relu-after": {"mixer": "pointwise", "activation": "relu", "length_scaling": "after"},
    "pointwise-square-both": {"mixer": "pointwise", "activation": "square", "length_scaling": "both"},
    "pointwise-silu-none": {"mixer": "pointwise", "activation": "silu", "length_scaling": "none"},
    "linear": {"mixer": "linear"},
    "linear-elu": {"mixer": "linear", "feature_map": "elu"},
    "gated-data-silu": {"mixer": "gated_linear"},
    "gated-data-linear": {"mixer": "gated_linear", "output_gate": "linear"},
    "gated-fixed-silu": {"mixer": "gated_linear", "decay": "fixed"},
    "gated-fixed-none": {"mixer": "gated_linear", "decay": "fixed", "output_gate": "none"},
    "mamba": {"mixer": "mamba"},
    "mamba-wide-conv": {"mixer": "mamba", "conv_width": 7, "state": 1},
    "mamba2": {"mixer": "mamba2"},
    "polynomial_s6-1": {"mixer": "polynomial_s6", "gate_degree": 1},
    "polynomial_s6-2": {"mixer": "polynomial_s6"},
    "rwkv": {"mixer": "rwkv"},
    "griffin": {"mixer": "griffin"},
    "griffin-no-conv": {"mixer": "griffin", "conv_width": 1},
}
EVERY = pytest.mark.parametrize("changes", [pytest.param(c, id=name) for name, c in ZOO.items()])
NOT_POLYNOMIAL = (
    "pointwise-gelu linear-elu gated-data-silu gated-data-linear gated-fixed-silu mamba mamba2 rwkv griffin"
)


def make(**changes) -> Mixer:
    """A mixer in float64, in evaluation mode, its weights disturbed so that no bias, gate or gain stays trivial."""
    torch.manual_seed(0)
    mixer = mixers.load(str(changes["mixer"]))(replace(BASE, **changes)).double().eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    return mixer


def inputs(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, BASE.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(mixer: Mixer, run, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients}


# 37 positions are more than one chunk and not a whole number of them; 1 has no past.
@pytest.mark.parametrize("length", [1, 37])
@EVERY
def test_forward_and_gradients_equal_the_reference(changes, length):
    mixer = make(**changes)
    fast, slow = (outputs_and_gradients(mixer, run, inputs(length)) for run in (mixer.forward, mixer.reference))
    assert length == 1 or set(fast) >= {"output", "input", *dict(mixer.named_parameters())}
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@EVERY
def test_matrix_with_the_offset_is_the_mixer(changes):
    mixer, x = make(**changes), inputs(11)
    a_BHTT = mixer.matrix(x)
    y = mixer.project(a_BHTT @ mixer.value(x) + mixer.offset(x))
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)
    assert torch.all(a_BHTT.triu(1) == 0)


@EVERY
def test_the_value_is_affine_in_x(changes):
    mixer, x, step = make(**changes), inputs(9), inputs(9).flip(1)
    at = [mixer.value(x + s * step) for s in (0.0, 1.0, 2.0)]
    torch.testing.assert_close(at[0] + at[2], 2 * at[1], rtol=1e-12, atol=1e-12)


@EVERY
def test_the_future_does_not_change_the_past_and_every_past_position_counts(changes):
    mixer, x = make(**changes), inputs(35, batch=1).requires_grad_()
    y = mixer(x)
    (gradient,) = torch.autograd.grad(y[0, 20].sum(), x)
    assert torch.all(gradient[0, 21:] == 0)
    assert mixer.receptive_field is None
    if changes.get("activation") != "relu":  # which is 0 with slope 0 on half of the scores
        assert torch.all(gradient[0, :21].abs().sum(-1) > 0)
    changed = x.detach().clone()
    changed[:, 21:] += 3
    torch.testing.assert_close(mixer(changed)[:, :21], y[:, :21].detach(), rtol=1e-12, atol=1e-12)


@EVERY
def test_one_step_in_the_same_block_lowers_the_loss(changes):
    torch.manual_seed(0)
    block = Block(replace(BASE, **changes), BASE.norms[:2])
    x, target = inputs(40).float(), inputs(40).float().flip(1)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        loss = F.mse_loss(block(x), target)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())
    assert losses[1] < losses[0]


@EVERY
def test_a_model_starts_near_the_entropy_of_its_vocabulary(changes):
    # the reset of the model must not undo what a mixer needs at the start
    torch.manual_seed(0)
    tokens = torch.randint(16, (4, 40))
    with torch.no_grad():
        logits = Transformer(replace(BASE, **changes))(tokens)
    assert float(F.cross_entropy(logits.flatten(0, 1), tokens.flatten())) < math.log(16) + 1


@pytest.mark.parametrize("how", ["autocast", "all"])
@EVERY
def test_bfloat16_keeps_decays_and_states_in_float32(changes, how):
    mixer, x = make(**changes).bfloat16(), inputs(40).bfloat16()  # so that both runs have the same rounded weights
    expected = mixer.float()(x.float())
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x.float())
    else:
        y = mixer.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
    assert torch.linalg.norm(y.float() - expected) < 0.03 * torch.linalg.norm(expected)


@pytest.mark.parametrize(
    ("changes", "degree", "depth"),
    [
        pytest.param({"mixer": "linear"}, 3, 5, id="linear"),
        pytest.param(ZOO["gated-fixed-none"], 3, 5, id="gated-none"),
        pytest.param({**ZOO["gated-fixed-none"], "output_gate": "linear"}, 4, 6, id="gated-linear"),
        pytest.param({"mixer": "pointwise", "activation": "square"}, 5, 6, id="pointwise-square"),
        pytest.param({"mixer": "pointwise", "activation": "polynomial", "activation_degree": 4}, 9, 7, id="quartic"),
        pytest.param({"mixer": "pointwise", "activation": "quartic"}, 9, 7, id="pointwise-quartic"),
        pytest.param({"mixer": "polynomial_s6", "gate_degree": 1}, 6, 6, id="s6-linear"),
        pytest.param({"mixer": "polynomial_s6", "gate_degree": 2}, 9, 7, id="s6-square"),
    ],
)
def test_degree_is_exact_along_a_line(changes, degree, depth):
    # the Chebyshev coefficients of a polynomial of degree n vanish above n, and the n-th does not
    mixer = make(**changes, length=4)
    assert (mixer.degree, mixer.depth) == (degree, depth)
    assert 2 ** (depth - 2) >= degree, "the two linears add no degree; each other level doubles it at most"
    x, step = inputs(4, 1), inputs(4, 1).flip(1)
    u = torch.cos((torch.arange(40, dtype=torch.float64) + 0.5) * torch.pi / 40)
    with torch.no_grad():
        y = torch.stack([mixer(x + t * step)[0, -1, 0] for t in u])
    basis = torch.stack([torch.cos(n * torch.acos(u)) for n in range(20)], 1)
    c = (basis.T @ y).abs()
    assert c[degree] > 1e4 * c[degree + 1 :].max()
    assert torch.all(c[degree + 1 :] < 1e-13 * c.max())


@pytest.mark.parametrize("name", NOT_POLYNOMIAL.split())
def test_what_is_not_polynomial_says_what_is(name):
    mixer = make(**ZOO[name])
    for question in ("degree", "depth"):
        with pytest.raises(ValueError, match=r"not polynomial; use '?\w+"):
            getattr(mixer, question)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer": "pointwise", "length_scaling": "before"},
        {"mixer": "linear", "feature_map": "relu"},
        {"mixer": "gated_linear", "decay": "none"},
        {"mixer": "gated_linear", "output_gate": "gelu"},
        {"mixer": "polynomial_s6", "gate_degree": 3},
        {"mixer": "mamba", "conv_width": 0},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=r"known:|degree 1 or 2|at least 1"):
        make(**changes)


def test_registry_finds_the_zoo_by_file_name():
    known = set(mixers.names())
    assert {str(c["mixer"]) for c in ZOO.values()} <= known
    assert "base" not in known


# --- One mixer at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["polynomial", "gelu"])
def test_pointwise_masks_after_sigma(activation):
    # a fitted polynomial at 0 need not be 0: the trap of methods.md 2.5
    mixer = make(mixer="pointwise", activation=activation)
    if mixer.act.polynomial is not None:
        mixer.act.polynomial.coefficients.data.copy_(torch.tensor([0.7, 0.2, 0.1]))
        assert abs(mixer.act(torch.zeros(())).item()) > 0.5
    assert torch.all(mixer.matrix(inputs(6)).triu(1) == 0)


@pytest.mark.parametrize(
    ("scaling", "after"), [("none", 1.0), ("after_sqrt", 40**-0.5), ("after", 1 / 40), ("both", 1 / 1600)]
)
def test_pointwise_scales_by_the_window(scaling, after):
    # ReLU is homogeneous, so that a scale of the scores is a scale of the weights
    make_one = {"mixer": "pointwise", "activation": "relu"}
    plain = make(**make_one, length_scaling="none").matrix(inputs(6))
    torch.testing.assert_close(make(**make_one, length_scaling=scaling).matrix(inputs(6)), plain * after)


def test_rows_of_rwkv_sum_to_the_gate_and_large_keys_do_not_overflow():
    mixer, x = make(mixer="rwkv"), inputs(12)
    gate = mixer.rkv(x)[0].sigmoid().transpose(1, 2)
    torch.testing.assert_close(mixer.matrix(x).sum(-1), gate)
    with torch.no_grad():
        mixer.k.weight.mul_(1000)
    torch.testing.assert_close(mixer(x), mixer.reference(x), rtol=1e-9, atol=1e-9)
    assert torch.isfinite(mixer.float()(x.float())).all()


def test_polynomial_s6_clamps_its_decay_in_training_alone():
    mixer, x = make(mixer="polynomial_s6"), inputs(12) * 5
    assert mixer.decay(x).abs().max() > 1
    seen: list[Tensor] = []
    mixer.tap.register_forward_hook(lambda module, args, output: seen.append(output))
    assert mixer.train().decay(x).abs().max() == 1
    assert seen[0].abs().max() > 1, "the range loss looks at the values before the clamp"


def test_mamba_gives_the_official_kernel_what_its_interface_asks_for():
    # selective_scan_fn of mamba_ssm as its documentation defines it, written as a loop; the kernel itself needs CUDA
    def selective_scan(u_BET, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert delta_softplus
        delta = F.softplus(delta + delta_bias[:, None])
        h_BEN, columns = torch.zeros(*u_BET.shape[:2], A.shape[1], dtype=u_BET.dtype), []
        for t in range(u_BET.shape[2]):
            step = delta[:, :, t, None]
            h_BEN = torch.exp(step * A) * h_BEN + step * B[:, None, :, t] * u_BET[:, :, t, None]
            columns.append((h_BEN * C[:, None, :, t]).sum(-1) + D * u_BET[:, :, t])
        return torch.stack(columns, -1) * F.silu(z)

    mixer, x = make(mixer="mamba"), inputs(12)
    v, z = mixer.inner(x).chunk(2, -1)
    y = mixer.o(mixer.by_kernel(selective_scan, F.silu(mixer.conv(v)), z).double())
    torch.testing.assert_close(y, mixer(x), rtol=1e-5, atol=1e-5)  # the kernel wants A, D and the bias in float32


# --- The pieces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_scan_is_the_sequential_one_with_gradients(length):
    generator = torch.Generator().manual_seed(0)
    a, b, weight = (torch.randn(2, length, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    results = []
    for run in (recurrence.scan, recurrence.sequential_scan):
        pair = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        h = run(*pair)
        (h * weight).sum().backward()
        results.append((h.detach(), pair[0].grad, pair[1].grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_sums_of_low_precision_are_taken_in_float32():
    # bfloat16 has no 999, and a sum of 400 decays by 2^-8 in it is off by tens of per cent
    ones = torch.ones(1, 999, 1, dtype=torch.bfloat16)
    assert recurrence.scan(ones, ones)[0, -1].item() == 999
    log_a = torch.full((1, 1, 401, 1), -(2.0**-8), dtype=torch.bfloat16)
    assert recurrence.decays(log_a)[0, 0, -1, 0].item() == pytest.approx(math.exp(-400 / 256), rel=1e-5)
    q = k = v = torch.ones(1, 1, 401, 1, dtype=torch.bfloat16)
    geometric = (1 - math.exp(-401 / 256)) / (1 - math.exp(-1 / 256))
    assert recurrence.decayed_attention(q, k, v, log_a)[0, 0, -1, 0].item() == pytest.approx(geometric, rel=0.01)


@pytest.mark.parametrize("strength", [0.1, 60.0], ids=["weak", "strong"])
@pytest.mark.parametrize("entries", [1, 4], ids=["a-head", "an-entry"])
def test_chunks_are_the_whole_matrix_even_where_a_quotient_of_decays_would_overflow(entries, strength):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 4, generator=generator) for _ in range(3))
    log_a = -strength * torch.rand(1, 2, 70, entries, generator=generator)
    whole = recurrence.decayed_scores(q, k, log_a) @ v
    torch.testing.assert_close(recurrence.decayed_attention(q, k, v, log_a), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_convolution_is_its_toeplitz_matrix_and_bias(width):
    torch.manual_seed(0)
    conv, x = CausalConv(3, width).double(), torch.randn(2, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.bias_E.normal_()
    by_matrix = torch.einsum("eij,bje->bie", conv.matrix(6), x) + conv.bias_E
    torch.testing.assert_close(conv(x), by_matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.reference(x), by_matrix, rtol=1e-12, atol=1e-12)
