"""A language model or encoder built from one config: embeddings, residual blocks, a norm and a head.

Shapes: B batch, T positions (at most the window `length`; our own models always get the full window, a shorter prompt
padded on the left with the end-of-text token, which training has seen there), D width, V vocabulary. The same class is
the softmax twin, the PowerSoftmax model and the polynomial model; only the config differs. `levels` adds up the
certificate of the parts.

The defaults are our own causal model: pre-norm, learned positions, as many key heads as heads. The fields at the end
of the config give the shapes of released checkpoints (GPT-2, GPT-NeoX, Llama, BERT), see `pretrained.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyformer import mixers
from polyformer.activations import Activation
from polyformer.layers import beside
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
    # Fields from here on are written to JSON only where they differ from their default, so that adding one changes no
    # file that exists.
    norm_eps: float = 1e-5  # of the exact norms
    order: str = "pre"  # pre: x + f(n(x)), the last norm closes the stack; post: n(x + f(x)), the first opens it
    causal: bool = True  # False: every position sees every key
    kv_heads: int = 0  # heads of k and v, each shared by heads/kv_heads queries; 0: as many as heads
    rotary: int = 0  # leading channels of each head that rotary positions turn (rotate-half); 0: none
    rotary_base: float = 10000.0
    positions: str = "learned"  # learned, none
    token_types: int = 0  # rows of a segment embedding; 0: none
    biases: bool = True  # on the linears of the blocks
    gated: bool = False  # MLP down(act(gate x) * up x): SwiGLU when the activation is silu
    head: str = "linear"  # linear, tied (the token embedding transposed), none (states come out)
    head_bias: bool = True
    mixers: tuple[str, ...] = ()  # one a block, in place of `mixer`: a hybrid stack
    mlp_norm: bool = False  # a BatchNorm before the activation of each MLP, for vision (methods.md 2.2)
    score_norm: bool = False  # a BatchNorm over the heads of attention scores, for vision
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
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.rotary % 2 or not 0 <= self.rotary <= self.width // self.heads:
            raise ValueError(
                f"rotary is {self.rotary}; it must be even, from 0 to the head size {self.width // self.heads}"
            )
        for name, known in (
            ("order", ("pre", "post")),
            ("positions", ("learned", "none")),
            ("head", ("linear", "tied", "none")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.parallel and self.order == "post":
            raise ValueError("a parallel block has one norm, before its branches; order is 'post': set parallel=False")
        if len(self.norms) != self.sites:
            raise ValueError(
                f"{len(self.norms)} norms given, {self.sites} sites to fill "
                f"({self.blocks} blocks, parallel={self.parallel})"
            )
        if self.mlp_norm and not self.biases:
            raise ValueError("mlp_norm folds into the bias of the linear before it; set biases=True")
        if self.mixers and len(self.mixers) != self.blocks:
            raise ValueError(f"{len(self.mixers)} mixers given for {self.blocks} blocks; give one a block, or none")
        defaults = {f.name: f.default for f in fields(self)}
        for name in mixers.unread(self.layer_mixers):
            if getattr(self, name) != defaults[name]:
                ours = ", ".join(dict.fromkeys(self.layer_mixers))
                others = ", ".join(other for other in mixers.names() if name in mixers.load(other).options)
                raise ValueError(
                    f"{name}={getattr(self, name)}, which no mixer of this model reads ({ours}); leave it at "
                    f"{defaults[name]}, or use one that does: {others}"
                )

    def at_defaults(self, names: Iterable[str]) -> ModelConfig:
        """Return a copy with these fields at their defaults."""
        chosen = set(names)
        changes: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in chosen}
        return replace(self, **changes)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The name of each block's mixer."""
        return self.mixers or (self.mixer,) * self.blocks

    @property
    def sites(self) -> int:
        return self.blocks * (1 if self.parallel else 2) + 1

    def to_json(self) -> str:
        later = fields(self)[[f.name for f in fields(self)].index("norm_newton") + 1 :]
        unset = {f.name for f in later if getattr(self, f.name) == f.default}
        return json.dumps({name: value for name, value in asdict(self).items() if name not in unset})

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        values = json.loads(text)
        for name in ("norms", "grid", "mixers"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


class MLP(nn.Module):
    """Two linears with an activation between, D -> hidden -> D; gated, the activation of a third multiplies the
    middle.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=config.biases)
        self.gate = nn.Linear(config.width, config.hidden, bias=config.biases) if config.gated else None
        self.norm = BatchNorm(config.hidden, eps=config.norm_eps) if config.mlp_norm else None
        self.act = Activation(config.activation, degree=config.activation_degree)
        self.down = nn.Linear(config.hidden, config.width, bias=config.biases)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTH = self.up(x_BTD) if self.gate is None else self.gate(x_BTD)
        h_BTH = self.act(h_BTH if self.norm is None else self.norm(h_BTH))
        return self.down(h_BTH if self.gate is None else h_BTH * self.up(x_BTD))

    @property
    def depth(self) -> int:
        return 1 + self.act.depth + (self.gate is not None) + 1


class Block(nn.Module):
    """Residual block: mixer, then MLP, each behind its norm (pre) or before it (post). In a parallel block both read
    the same normed x and only norm1 exists.
    """

    def __init__(self, config: ModelConfig, norms: tuple[str, ...], mixer: mixers.Mixer | None = None) -> None:
        super().__init__()
        self.post = config.order == "post"
        self.norm1 = _norm(config, norms[0])
        self.mixer = mixers.load(config.mixer)(config) if mixer is None else mixer
        self.norm2 = None if config.parallel else _norm(config, norms[1])
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, visible_BT: Tensor | None = None) -> Tensor:
        if self.norm2 is None:
            h_BTD = self.norm1(x_BTD)
            return x_BTD + self._mix(h_BTD, visible_BT) + self.mlp(h_BTD)
        if self.post:
            x_BTD = self.norm1(x_BTD + self._mix(x_BTD, visible_BT))
            return self.norm2(x_BTD + self.mlp(x_BTD))
        x_BTD = x_BTD + self._mix(self.norm1(x_BTD), visible_BT)
        return x_BTD + self.mlp(self.norm2(x_BTD))

    def _mix(self, x_BTD: Tensor, visible_BT: Tensor | None) -> Tensor:
        """Not every mixer can hide keys, so the argument is passed on only where there is one."""
        if visible_BT is None:
            return self.mixer(x_BTD)
        if not self.mixer.hides_keys:
            raise ValueError(
                f"mixer {type(self.mixer).__name__} cannot hide keys (visible_BT was given); use softmax, power_softmax "
                "or pointwise, or windows without padding"
            )
        return self.mixer(x_BTD, visible_BT)

    @property
    def depth(self) -> int:
        """Levels of the block. A norm overlaps the linear after it (see `norms`), so it adds its own depth minus that
        linear's level; after a residual (post) nothing overlaps.
        """
        if self.norm2 is None:
            return _joined(self.norm1, max(self.mixer.depth, self.mlp.depth))
        if self.post:
            return self.mixer.depth + self.norm1.depth + self.mlp.depth + self.norm2.depth
        return _joined(self.norm1, self.mixer.depth) + _joined(self.norm2, self.mlp.depth)


class Transformer(nn.Module):
    """tokens_BT (int64) -> logits_BTV, or states_BTD without a head. Names of parameters and of ONNX nodes are the same
    dotted paths.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = (
            nn.Parameter(torch.zeros(config.length, config.width)) if config.positions == "learned" else None
        )
        self.segment = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.blocks = stack(config, [mixers.load(name)(config) for name in config.layer_mixers])
        self.norm = lone_norm(config)
        self.head = nn.Identity() if config.head == "none" else nn.Linear(config.width, config.vocab, config.head_bias)
        if config.head == "tied":
            self.head.weight = self.token.weight
        self.reset()

    def reset(self) -> None:
        """Initialise: embeddings at standard deviation 1, linears at 1/sqrt(fan in), outputs into the residual
        smaller by depth.
        """
        nn.init.normal_(self.token.weight)
        if self.position is not None:
            nn.init.normal_(self.position, std=0.2)
        if self.segment is not None:
            nn.init.normal_(self.segment.weight, std=0.2)
        # tied: the embedding takes the scale of a head, or logits would start at sqrt(D)
        reset_linears(self, self.config.blocks)

    def embed(self, tokens_BT: Tensor, types_BT: Tensor | None = None) -> Tensor:
        """Return x0_BTD = E[token] + P[position] + S[type]: the client computes this in clear. Types default to 0.

        Raises:
            ValueError: more tokens than the window holds, or types given to a model that has none.
        """
        t = tokens_BT.shape[1]
        if t > self.config.length:
            raise ValueError(f"{t} tokens, the window is {self.config.length}; cut them or load with a longer window")
        x_BTD = self.token(beside(tokens_BT, self.token.weight))
        if self.position is not None:
            x_BTD = x_BTD + self.position[:t]
        if self.segment is not None:
            x_BTD = x_BTD + (self.segment.weight[0] if types_BT is None else self.segment(beside(types_BT, x_BTD)))
        elif types_BT is not None:
            raise ValueError("token types given, the model has none (token_types is 0); leave them out")
        return x_BTD

    def forward(self, tokens_BT: Tensor, *, visible_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Tensor:
        """Return logits or states. `visible_BT` (bool) marks the tokens that may be attended to, padding False; a row
        needs at least one.
        """
        x_BTD = self.embed(tokens_BT, types_BT)
        visible_BT = None if visible_BT is None else beside(visible_BT, x_BTD)
        if self.config.order == "post":
            x_BTD = self.norm(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD) if visible_BT is None else block(x_BTD, visible_BT)
        return self.head(x_BTD if self.config.order == "post" else self.norm(x_BTD))

    @property
    def levels(self) -> int:
        """Multiplicative levels from x0 to the output, all plaintext products included; raises ValueError if a part is
        not polynomial. The norm that opens a post-norm stack belongs to the client, who embeds.
        """
        head = int(self.config.head != "none")
        end = head if self.config.order == "post" else _joined(self.norm, 1) if head else self.norm.depth
        return sum(block.depth for block in self.blocks) + end  # type: ignore[misc]

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def stack(config: ModelConfig, layers: list[mixers.Mixer]) -> nn.ModuleList:
    """Return the blocks of a config around their mixers, one a block."""
    n, first = 1 if config.parallel else 2, int(config.order == "post")
    inner = config.norms[first:]
    return nn.ModuleList(Block(config, inner[i * n : (i + 1) * n], mixer) for i, mixer in enumerate(layers))


def lone_norm(config: ModelConfig) -> Norm | BatchNorm:
    """Return the norm outside the blocks: before the head, or (post) behind the embedding."""
    return _norm(config, config.norms[0] if config.order == "post" else config.norms[-1])


def stack_levels(blocks: nn.ModuleList, norm: Norm | BatchNorm | None) -> int:
    """Return the levels of blocks, final norm if there is one, and head."""
    return sum(block.depth for block in blocks) + (1 if norm is None else _joined(norm, 1))  # type: ignore[misc]


def reset_linears(model: nn.Module, blocks: int) -> None:
    """Initialise every linear at 1/sqrt(fan in), outputs into the residual smaller by depth, and the head smaller."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = (2 * blocks) ** -0.5 if name.endswith((".o", ".down")) else 0.25 if name == "head" else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _norm(config: ModelConfig, kind: str) -> Norm | BatchNorm:
    return make_norm(config.width, kind, degree=config.norm_degree, newton=config.norm_newton, eps=config.norm_eps)


def _joined(norm: Norm | BatchNorm, depth: int) -> int:
    """Levels of a norm followed by a part whose first level is a linear: the linear runs beside the norm's
    polynomial.
    """
    return depth + max(norm.depth - 1, 0)
