"""Model families as data: what a Hugging Face config.json means for the one transformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Json = Mapping[str, object]
RouterScore = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: `dims` leading channels of each head are rotated."""

    theta: float
    dims: int
    scaling: "Llama3Scaling | None" = None


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Slows the low frequencies down by `factor`, smoothly between the two bounds (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The sparse layers: who is chosen, by which score, and how the choices are weighted."""

    num_experts: int
    experts_per_token: int
    expert_hidden: int
    num_shared_experts: int
    score: RouterScore
    num_groups: int
    groups_per_token: int
    normalise_weights: bool
    weight_scale: float
    sparse_layers: tuple[int, ...]

    @property
    def shared_hidden(self) -> int:
        return self.num_shared_experts * self.expert_hidden


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that decides the shapes and the arithmetic of a `Transformer`."""

    family: str
    vocabulary_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dense_hidden: int
    max_positions: int
    norm_eps: float
    rope: Rope
    moe: MoeConfig | None
    qk_norm: bool
    attention_bias: bool
    output_bias: bool
    tied_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_hugging_face(cls, config: Json) -> "ModelConfig":
        """Read the dictionary of a config.json; refuses what the transformer would compute differently."""
        family = family_of(config)
        fields = _Fields(config)
        fields.refuse_unknown(family)
        fields.refuse_unsupported()
        width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        head_size = fields.integer("head_dim", family.head_size or width // num_heads)
        model = cls(
            family=family.model_type,
            vocabulary_size=fields.integer("vocab_size"),
            width=width,
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_size=head_size,
            dense_hidden=fields.integer("intermediate_size"),
            max_positions=fields.integer("max_position_embeddings"),
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            rope=_read_rope(fields, family, head_size),
            moe=_read_moe(fields, family) if family.router else None,
            qk_norm=family.qk_norm if family.qk_norm is not None else fields.flag("use_qk_norm"),
            attention_bias=fields.flag("attention_bias"),
            output_bias=family.output_bias and fields.flag("attention_bias"),
            tied_embeddings=fields.flag("tie_word_embeddings"),
            initializer_range=fields.number("initializer_range", 0.02),
            bos_token_id=fields.optional_integer("bos_token_id"),
            eos_token_ids=fields.integers("eos_token_id"),
            pad_token_id=fields.optional_integer("pad_token_id"),
        )
        _check(model)
        return model

    def to_hugging_face(self) -> dict[str, object]:
        """The config.json that transformers, vLLM and `from_hugging_face` read back as the same model."""
        family = FAMILIES[self.family]
        config: dict[str, object] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.dense_hidden,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tied_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": _one_or_many(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            **_write_rope(self, family),
        }
        if family.qk_norm is None:
            config["use_qk_norm"] = self.qk_norm
        if self.moe is not None:
            config |= _write_moe(self.moe, family, self.num_layers)
        return config


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one model type apart. None for `qk_norm` means that the config says it (`use_qk_norm`)."""

    model_type: str
    architecture: str
    qk_norm: bool | None
    output_bias: bool
    norm_eps: float
    head_size: int | None = None
    partial_rotary: float | None = None
    router: RouterScore | None = None
    own_fields: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            qk_norm=None,
            output_bias=False,
            norm_eps=1e-5,
            partial_rotary=0.5,
            router="sigmoid",
            own_fields=_names(
                "use_qk_norm partial_rotary_factor moe_intermediate_size num_experts_per_tok n_shared_experts "
                "n_routed_experts routed_scaling_factor n_group topk_group first_k_dense_replace norm_topk_prob "
                "num_nextn_predict_layers num_mtp_layers"
            ),
        ),
        Family("qwen3", "Qwen3ForCausalLM", qk_norm=True, output_bias=True, norm_eps=1e-6, head_size=128),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            qk_norm=True,
            output_bias=True,
            norm_eps=1e-6,
            router="softmax",
            own_fields=_names(
                "moe_intermediate_size num_experts_per_tok num_experts num_local_experts norm_topk_prob "
                "decoder_sparse_step mlp_only_layers router_aux_loss_coef"
            ),
        ),
        Family("llama", "LlamaForCausalLM", qk_norm=False, output_bias=True, norm_eps=1e-6),
    )
}

COMMON_FIELDS = _names(
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
    "attention_bias attention_dropout tie_word_embeddings initializer_range bos_token_id eos_token_id "
    "pad_token_id mlp_bias use_sliding_window sliding_window max_window_layers layer_types "
    "quantization_config pretraining_tp"
)
# Written by transformers and other tools, without any effect on the logits of a causal decoder.
INERT_FIELDS = _names(
    "architectures auto_map bad_words_ids chunk_size_feed_forward dtype id2label is_encoder_decoder label2id "
    "name_or_path output_attentions output_hidden_states output_router_logits problem_type return_dict "
    "torch_dtype transformers_version unsloth_version unsloth_fixed use_cache"
)
SUPPORTED_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
}


def family_of(config: Json) -> Family:
    """The family that `model_type` names."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


class _Fields:
    """Typed access to a config.json whose complaints name the field."""

    def __init__(self, config: Json) -> None:
        self.config = config

    def refuse_unknown(self, family: Family) -> None:
        known = COMMON_FIELDS | INERT_FIELDS | family.own_fields
        unknown = sorted(
            name
            for name, value in self.config.items()
            if name not in known and not name.startswith("_") and value is not None
        )
        if unknown:
            raise ValueError(f"config fields {', '.join(unknown)} are not known to family {family.model_type}")

    def refuse_unsupported(self) -> None:
        for name, supported in SUPPORTED_VALUES.items():
            value = self.config.get(name, supported[0])
            if value not in supported:
                raise ValueError(f"config field {name} = {value!r} is not supported; it must be {supported[0]!r}")
        for kind in self.strings("layer_types"):
            if kind != "full_attention":
                raise ValueError(f"config field layer_types holds {kind!r}; only 'full_attention' is supported")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"config field {name} = {value!r} must be a whole number of at least 0")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.integer(name)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.config.get(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise ValueError(f"config field {name} = {value!r} must hold whole numbers")
        return tuple(values)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.config.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"config field {name} = {value!r} must be a list of strings")
        return tuple(value)

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"config field {name} = {value!r} must be a number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ValueError(f"config field {name} = {value!r} must be true or false")
        return value

    def table(self, name: str) -> dict[str, object]:
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError(f"config field {name} = {value!r} must be a table")
        return dict(value)


def _read_rope(fields: _Fields, family: Family, head_size: int) -> Rope:
    # transformers 5 writes rope_parameters; older files have rope_theta, rope_scaling and the factor apart.
    table = fields.table("rope_parameters") | fields.table("rope_scaling")
    rope = _Fields({**{key: fields.config.get(key) for key in ("rope_theta", "partial_rotary_factor")}, **table})
    factor = rope.number("partial_rotary_factor", family.partial_rotary or 1.0)
    if family.partial_rotary is None and factor != 1.0:
        raise ValueError(f"config field partial_rotary_factor = {factor} must be 1 for {family.model_type}")
    dims = int(head_size * factor)
    if dims % 2 or not dims:
        raise ValueError(f"partial_rotary_factor {factor} of head_dim {head_size} gives {dims} rotary channels; "
                         "their number must be even and above 0")  # fmt: skip
    return Rope(rope.number("rope_theta", 10_000.0), dims, _read_rope_scaling(rope, table, fields))


def _read_rope_scaling(rope: _Fields, table: Json, fields: _Fields) -> Llama3Scaling | None:
    rope_type = table.get("rope_type") or table.get("type") or "default"
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ValueError(f"config field rope_type = {rope_type!r} is not supported; use 'default' or 'llama3'")
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name not in table:
            raise ValueError(f"config field rope_parameters has rope_type llama3 and no {name}")
    return Llama3Scaling(
        factor=rope.number("factor", 1.0),
        low_frequency_factor=rope.number("low_freq_factor", 1.0),
        high_frequency_factor=rope.number("high_freq_factor", 1.0),
        original_max_positions=rope.integer(
            "original_max_position_embeddings", fields.integer("max_position_embeddings")
        ),
    )


def _write_rope(config: ModelConfig, family: Family) -> dict[str, object]:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if family.partial_rotary is not None:
        parameters["partial_rotary_factor"] = config.rope.dims / config.head_size
    written: dict[str, object] = dict(parameters)
    del written["rope_type"]
    if (scaling := config.rope.scaling) is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
        written["rope_scaling"] = parameters
    return written | {"rope_parameters": parameters}


def _read_moe(fields: _Fields, family: Family) -> MoeConfig:
    num_layers = fields.integer("num_hidden_layers")
    if family.router == "sigmoid":
        return MoeConfig(
            num_experts=fields.integer("n_routed_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            expert_hidden=fields.integer("moe_intermediate_size"),
            num_shared_experts=fields.integer("n_shared_experts", 1),
            score="sigmoid",
            num_groups=fields.integer("n_group", 1),
            groups_per_token=fields.integer("topk_group", 1),
            normalise_weights=fields.flag("norm_topk_prob", True),
            weight_scale=fields.number("routed_scaling_factor", 1.0),
            sparse_layers=tuple(range(fields.integer("first_k_dense_replace", 1), num_layers)),
        )
    step, dense = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    return MoeConfig(
        num_experts=fields.integer("num_experts", fields.optional_integer("num_local_experts")),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_hidden=fields.integer("moe_intermediate_size"),
        num_shared_experts=0,
        score="softmax",
        num_groups=1,
        groups_per_token=1,
        normalise_weights=fields.flag("norm_topk_prob"),
        weight_scale=1.0,
        sparse_layers=tuple(i for i in range(num_layers) if i not in dense and step and (i + 1) % step == 0),
    )


def _write_moe(moe: MoeConfig, family: Family, num_layers: int) -> dict[str, object]:
    shared: dict[str, object] = {
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_hidden,
        "norm_topk_prob": moe.normalise_weights,
    }
    if family.router == "sigmoid":
        return shared | {
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "n_group": moe.num_groups,
            "topk_group": moe.groups_per_token,
            "routed_scaling_factor": moe.weight_scale,
            "first_k_dense_replace": num_layers - len(moe.sparse_layers),
            "num_nextn_predict_layers": 0,
        }
    return shared | {
        "num_experts": moe.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(num_layers) if layer not in moe.sparse_layers],
        "router_aux_loss_coef": 0.0,
    }


def _check(config: ModelConfig) -> None:
    for name in ("vocabulary_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_size", "dense_hidden"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)} of the model must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if (moe := config.moe) is not None:
        _check_moe(moe)


def _check_moe(moe: MoeConfig) -> None:
    if not 1 <= moe.experts_per_token <= moe.num_experts:
        raise ValueError(
            f"num_experts_per_tok {moe.experts_per_token} must lie between 1 and the {moe.num_experts} experts"
        )
    if not 1 <= moe.groups_per_token <= moe.num_groups or moe.num_experts % max(moe.num_groups, 1):
        raise ValueError(
            f"n_group {moe.num_groups} must divide the {moe.num_experts} experts, "
            f"and topk_group {moe.groups_per_token} must lie between 1 and n_group"
        )
    if moe.num_groups > 1 and moe.num_experts // moe.num_groups < 2:
        raise ValueError(f"n_group {moe.num_groups} leaves one expert per group; groups need at least 2 experts")
    reachable = moe.groups_per_token * moe.num_experts // moe.num_groups
    if moe.experts_per_token > reachable:
        raise ValueError(
            f"num_experts_per_tok {moe.experts_per_token} exceeds the {reachable} experts of "
            f"topk_group {moe.groups_per_token} groups"
        )


def _one_or_many(token_ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not token_ids else token_ids[0] if len(token_ids) == 1 else list(token_ids)
