"""A causal language model built from one config: token and position embeddings, pre-norm blocks, a final norm and a
head.

Shapes: B batch, T positions (always the full window `length`; a shorter prompt is padded on the left with the
end-of-text token, which training has seen there), D width, V vocabulary. The same class is the softmax twin, the
PowerSoftmax model and the polynomial model; only the config differs. `levels` adds up the certificate of the parts.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from polyformer import mixers
from polyformer.activations import Activation
from polyformer.norms import BatchNorm, Norm, make_norm


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that decides the shape of a model and of its state dict; goes into config.json and into the ONNX file."""

    vocab: int
    length: int
    width: int = 128
    heads: int = 4
    hidden: int = 512
    blocks: int = 2
    parallel: bool = False  # x + mixer(n(x)) + mlp(n(x)) with one norm a block: fewer levels, same work
    mixer: str = "power_softmax"
    mixers: tuple[str, ...] = ()  # one a block, in place of `mixer`: a hybrid stack
    norms: tuple[str, ...] = ()  # one a site, in order (2 a block, 1 if parallel, then the final one)
    activation: str = "gelu"
    power: int = 4  # p, even
    eps: float = 1.0  # on the sum of powers
    form: str = "stable"  # of PowerSoftmax: exact, stable, mean, rows
    reciprocal: str = "exact"  # exact, polynomial, goldschmidt
    reciprocal_degree: int = 4  # degree, or Goldschmidt steps
    activation_degree: int = 2
    norm_degree: int = 2  # of the inverse square root's seed
    norm_newton: int = 0
    mlp_norm: bool = False  # a BatchNorm before the activation of each MLP, for vision (methods.md 2.2)
    score_norm: bool = False  # a BatchNorm over the heads of attention scores, for vision
    causal: bool = True  # False: every position sees every position (encoders, vision)
    las_decay: float = 0.0  # LaS: largest decay of scores with distance; 0 is none
    las_width: int = 1  # LaS: positions over which weights are averaged; 1 is none
    grid: tuple[int, ...] = ()  # sides of the token grid in raster order, for mixers with more than one axis
    hyena_order: int = 2  # o products, degree o + 1
    hyena_filter: str = "product"  # product, joint, direct
    hyena_window: str = "decay"  # decay, learned, none
    hyena_direction: str = "4dirp"  # of hyena_nd: standard, seq, parallel, 4dir, 4dirp
    length_scaling: str = "after_sqrt"  # of pointwise attention: none, after_sqrt, after, both
    feature_map: str = "identity"  # of linear attention: identity, elu
    decay: str = "data"  # of gated linear attention: data, fixed
    output_gate: str = "silu"  # of gated linear attention: silu, linear, none
    state: int = 16  # N of the state-space mixers
    expand: int = 2  # inner channels of the state-space mixers, in widths
    conv_width: int = 4  # positions under the short convolution
    gate_degree: int = 2  # of the polynomial that stands for the decay of polynomial_s6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(self.norms) != self.sites:
            raise ValueError(
                f"{len(self.norms)} norms given, {self.sites} sites to fill "
                f"({self.blocks} blocks, parallel={self.parallel})"
            )

        if self.mixers and len(self.mixers) != self.blocks:
            raise ValueError(f"{len(self.mixers)} mixers given for {self.blocks} blocks; give one a block, or none")

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The name of each block's mixer."""
        return self.mixers or (self.mixer,) * self.blocks

    @property
    def sites(self) -> int:
        return self.blocks * (1 if self.parallel else 2) + 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        values = json.loads(text)
        for name in ("norms", "grid", "mixers"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


class MLP(nn.Module):
    """Two linears with an activation between: D -> hidden -> D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden)
        self.norm = BatchNorm(config.hidden) if config.mlp_norm else None
        self.act = Activation(config.activation, degree=config.activation_degree)
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTH = self.up(x_BTD)
        return self.down(self.act(h_BTH if self.norm is None else self.norm(h_BTH)))

    @property
    def depth(self) -> int:
        return 1 + self.act.depth + 1


class Block(nn.Module):
    """Pre-norm residual block: mixer, then MLP; in a parallel block both read the same normed x and only norm1
    exists.
    """

    def __init__(self, config: ModelConfig, norms: tuple[str, ...], mixer: mixers.Mixer | None = None) -> None:
        super().__init__()
        self.norm1 = _norm(config, norms[0])
        self.mixer = mixers.load(config.mixer)(config) if mixer is None else mixer
        self.norm2 = None if config.parallel else _norm(config, norms[1])
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.norm2 is None:
            h_BTD = self.norm1(x_BTD)
            return x_BTD + self.mixer(h_BTD) + self.mlp(h_BTD)
        x_BTD = x_BTD + self.mixer(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))

    @property
    def depth(self) -> int:
        """Levels of the block. A norm overlaps the linear after it (see `norms`), so it adds its own depth minus that
        linear's level.
        """
        if self.norm2 is None:
            return _joined(self.norm1, max(self.mixer.depth, self.mlp.depth))
        return _joined(self.norm1, self.mixer.depth) + _joined(self.norm2, self.mlp.depth)


class Transformer(nn.Module):
    """tokens_BT (int64) -> logits_BTV. Names of parameters and of ONNX nodes are the same dotted paths."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Parameter(torch.zeros(config.length, config.width))
        self.blocks = stack(config, [mixers.load(name)(config) for name in config.layer_mixers])
        self.norm = final_norm(config)
        self.head = nn.Linear(config.width, config.vocab)
        self.reset()

    def reset(self) -> None:
        """Initialise: embeddings at standard deviation 1, linears at 1/sqrt(fan in), outputs into the residual
        smaller by depth.
        """
        nn.init.normal_(self.token.weight)
        nn.init.normal_(self.position, std=0.2)
        reset_linears(self, self.config.blocks)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Return x0_BTD = E[token] + P[position]: the client computes this in clear."""
        return self.token(tokens_BT) + self.position[: tokens_BT.shape[1]]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))

    @property
    def levels(self) -> int:
        """Multiplicative levels from x0 to the logits, all plaintext products included; raises ValueError if a part is
        not polynomial.
        """
        return stack_levels(self.blocks, self.norm)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def stack(config: ModelConfig, layers: list[mixers.Mixer]) -> nn.ModuleList:
    """Return the blocks of a config around their mixers, one a block."""
    n = 1 if config.parallel else 2
    return nn.ModuleList(Block(config, config.norms[i * n : (i + 1) * n], mixer) for i, mixer in enumerate(layers))


def final_norm(config: ModelConfig) -> Norm | BatchNorm:
    """Return the norm before the head."""
    return _norm(config, config.norms[-1])


def stack_levels(blocks: nn.ModuleList, norm: Norm | BatchNorm) -> int:
    """Return the levels of blocks, final norm and head."""
    return sum(block.depth for block in blocks) + _joined(norm, 1)  # type: ignore[misc]


def reset_linears(model: nn.Module, blocks: int) -> None:
    """Initialise every linear at 1/sqrt(fan in), outputs into the residual smaller by depth, and the head smaller."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = (2 * blocks) ** -0.5 if name.endswith((".o", ".down")) else 0.25 if name == "head" else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _norm(config: ModelConfig, kind: str) -> Norm | BatchNorm:
    return make_norm(config.width, kind, degree=config.norm_degree, newton=config.norm_newton)


def _joined(norm: Norm | BatchNorm, depth: int) -> int:
    """Levels of a norm followed by a part whose first level is a linear: the linear runs beside the norm's
    polynomial.
    """
    return depth + max(norm.depth - 1, 0)
