"""BatchNorm is torch's in training, an affine map after it, and folds into its neighbours without changing a model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from polyformer.activations import Activation
from polyformer.export import export_onnx
from polyformer.fold import folded
from polyformer.mixers.base import Attention
from polyformer.model import ModelConfig, Transformer
from polyformer.norms import BatchNorm, Norm, fold, fold_before, make_norm

CONFIG = ModelConfig(
    vocab=20,
    length=6,
    width=12,
    heads=2,
    hidden=16,
    blocks=2,
    norms=("batch",) * 5,
    causal=False,
    mlp_norm=True,
    score_norm=True,
    activation="quartic",
    form="mean",
)


def x_btd(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.7 + 0.4


def trained(width: int = 12, axis: int = -1) -> BatchNorm:
    """A norm with parameters and statistics that are not the initial ones."""
    torch.manual_seed(0)
    norm = BatchNorm(width, axis=axis).double()
    nn.init.normal_(norm.gamma, 1.0, 0.3)
    nn.init.normal_(norm.beta)
    for seed in range(5):
        norm(x_btd(seed) if axis == -1 else x_btd(seed).transpose(1, 2)[:, :, :, None])
    return norm.eval()


def test_it_is_the_batch_norm_of_torch():
    ours, theirs = BatchNorm(12).double(), nn.BatchNorm1d(12).double()
    for seed in range(3):
        x = x_btd(seed)
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.variance, theirs.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_weights_may_be_narrower_than_statistics(training):
    wide, x = BatchNorm(12), x_btd().float()
    nn.init.normal_(wide.gamma, 1.0, 0.3)
    nn.init.normal_(wide.beta)
    narrow = BatchNorm(12)
    for mine, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        mine.data = theirs.data.bfloat16()
    wide.train(training), narrow.train(training)
    y = narrow(x.bfloat16())
    assert y.dtype == torch.bfloat16 and narrow.mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide(x), rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(narrow.mean, wide.mean, rtol=1e-2, atol=1e-3)
    y.float().square().sum().backward()
    assert narrow.gamma.grad is not None and narrow.gamma.grad.dtype == torch.bfloat16


def test_it_normalises_over_heads():
    s_BHTT = torch.randn(3, 4, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2, 2.0])[:, None, None] + 3
    y = BatchNorm(4, axis=1).double()(s_BHTT)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), unbiased=False), torch.ones(4, dtype=torch.float64), atol=1e-3, rtol=0)


def test_folding_into_the_next_and_the_previous_linear_and_into_a_norm():
    torch.manual_seed(1)
    norm, x = trained(), x_btd(9)
    after, before = nn.Linear(12, 7).double(), nn.Linear(12, 12).double()
    torch.testing.assert_close(fold(norm, after)(x), after(norm(x)))
    torch.testing.assert_close(fold_before(before, norm)(x), norm(before(x)))
    affine = norm.to_norm()
    torch.testing.assert_close(affine(x), norm(x))
    assert affine.kind == "affine" and affine.depth == norm.depth == 0
    with torch.no_grad():
        assert (norm(x) - x).abs().max() > 0.5  # folding nothing would not pass


def model_after_training() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(8):
        loss = model(torch.randint(0, 20, (16, 6))).logsumexp(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("mixer", ["power_softmax", "softmax"])
def test_a_folded_model_is_the_model_in_evaluation_mode(mixer, tmp_path):
    torch.manual_seed(0)
    source = model_after_training()
    model = Transformer(replace(CONFIG, mixer=mixer))
    model.load_state_dict(source.state_dict())
    tokens = torch.randint(0, 20, (1, 6))
    in_training = model(tokens)
    plain = folded(model)
    assert model.training and not plain.training
    model.eval()
    with torch.no_grad():
        expected = model(tokens)
        torch.testing.assert_close(plain(tokens), expected, rtol=1e-4, atol=1e-5)
        assert (in_training - expected).abs().max() > 1e-2
    left = [type(m) for m in plain.modules() if isinstance(m, BatchNorm)]
    assert len(left) == sum(isinstance(m, Attention) for m in plain.modules())  # those over scores are constants
    assert plain.config == replace(CONFIG, mixer=mixer, norms=("affine",) * 5, mlp_norm=False)
    reloaded = Transformer(ModelConfig.from_json(plain.config.to_json())).eval()
    reloaded.load_state_dict(plain.state_dict())
    torch.testing.assert_close(reloaded(tokens), plain(tokens))

    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"tokens": tokens.numpy()})[0], expected, rtol=1e-4, atol=1e-4)


def test_after_folding_the_file_holds_no_root_comparison_or_division_but_that_of_the_mixer(tmp_path):
    export_onnx(model_after_training(), tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert not {n.op_type for n in nodes} & {"Sqrt", "Max", "Relu", "Less", "Greater", "Where", "BatchNormalization"}
    assert {n.name for n in nodes if n.op_type in ("Div", "Reciprocal")} == {f"blocks.{i}.mixer.out" for i in (0, 1)}


def test_mixers_with_a_norm_over_scores_equal_their_reference():
    model = model_after_training().double().eval()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    for name in ("power_softmax", "softmax", "pointwise"):
        other = Transformer(replace(CONFIG, mixer=name)).double().eval()
        other.load_state_dict(model.state_dict())
        mixer = other.blocks[0].mixer
        torch.testing.assert_close(mixer(x), mixer.reference(x), rtol=1e-9, atol=1e-9)
        y = mixer.o(mixer.merge(mixer.matrix(x) @ mixer.split(mixer.v(x))))
        torch.testing.assert_close(mixer(x), y, rtol=1e-9, atol=1e-9)


def test_quartic_is_the_fourth_power_in_two_levels():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    act = Activation("quartic")
    torch.testing.assert_close(act(x), x**4)
    assert act.depth == 2


def test_names_of_norms():
    assert isinstance(make_norm(4, "batch"), BatchNorm) and isinstance(make_norm(4, "rms"), Norm)
    with pytest.raises(ValueError, match="batch"):
        make_norm(4, "bacth")


def test_a_norm_over_causal_scores_is_refused():
    with pytest.raises(ValueError, match="causal=False"):
        Transformer(replace(CONFIG, causal=True))
