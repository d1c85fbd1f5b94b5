"""How many parameters a policy has, by closed formula: nothing is built, so even the 7B size is counted at once."""

from dataclasses import dataclass

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.config.policy import NF4_BLOCK, OpenVLAConfig
from reachrl.config.towers import ConvTowerConfig, TowerConfig, ViTTowerConfig

BYTES = {"float32": 4, "bfloat16": 2}
# 4 bits, one byte of scale for each block, one float32 for 256 of these: 4.127 bits.
# Source: Dettmers et al. 2023, QLoRA, section 3, "Double Quantization".
NF4_BYTES = 0.5 + 1 / NF4_BLOCK + 4 / (256 * NF4_BLOCK)


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear map; adapters sit beside these, and nearly all arithmetic happens in them."""

    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.inputs * self.outputs + self.bias * self.outputs

    def adapter(self, rank: int) -> int:
        """Parameters of the two matrices of an adapter.

        Source: Hu et al. 2021, LoRA, section 4.1: A is [rank, inputs], B is [outputs, rank].
        """
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True, slots=True)
class Layer:
    """The linear maps of one Llama layer; none has a bias."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All seven, in the order in which they are applied."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


def key_width(llm: LanguageModelConfig) -> int:
    """Channels of a token's key, and of its value: fewer than `hidden_size` where heads share them."""
    return llm.hidden_size // llm.num_heads * (llm.num_kv_heads or llm.num_heads)


def layer(llm: LanguageModelConfig) -> Layer:
    """One decoder layer: four maps of grouped-query attention, three of the SwiGLU MLP.

    Source: Touvron et al. 2023, Llama 2, section 2.2; Shazeer 2020, GLU Variants Improve Transformer, equation 6.
    """
    width, keys, hidden = llm.hidden_size, key_width(llm), llm.intermediate_size
    return Layer(
        query=Linear(width, width),
        key=Linear(width, keys),
        value=Linear(width, keys),
        output=Linear(width, width),
        gate=Linear(width, hidden),
        up=Linear(width, hidden),
        down=Linear(hidden, width),
    )


def block_linears(tower: ViTTowerConfig) -> tuple[Linear, ...]:
    """The linear maps of one ViT block: fused query, key and value, their output, two of the MLP."""
    width, hidden = tower.width, tower.mlp_width
    return (
        Linear(width, 3 * width, bias=True),
        Linear(width, width, bias=True),
        Linear(width, hidden, bias=True),
        Linear(hidden, width, bias=True),
    )


def projector_linears(policy: OpenVLAConfig) -> tuple[Linear, ...]:
    """Three maps behind two towers, two behind one."""
    vision, width = policy.vision_width, policy.language_model.hidden_size
    if len(policy.towers) == 1:
        return Linear(vision, width, bias=True), Linear(width, width, bias=True)
    first = policy.projector_expansion * vision
    return Linear(vision, first, bias=True), Linear(first, width, bias=True), Linear(width, width, bias=True)


def tower_parameters(tower: TowerConfig, image_size: int) -> int:
    """Parameters of one vision tower; the last block of a ViT is never built."""
    patches = tower.grid(image_size) ** 2
    if isinstance(tower, ConvTowerConfig):
        channels, total = 3, patches * tower.output_width
        for stage in tower.stages:
            total += stage.kernel**2 * channels * stage.channels + 2 * stage.channels  # GroupNorm has scale and shift
            channels = stage.channels
        return total
    width = tower.width
    norms = 4 * width + 2 * width * tower.layer_scale
    block = sum(linear.parameters for linear in block_linears(tower)) + norms
    embedding = 3 * tower.patch_size**2 * width + width
    tokens = patches + tower.class_token + tower.num_registers
    return embedding + tokens * width + (tower.depth - 1) * block


def vision_parameters(policy: OpenVLAConfig) -> int:
    """Parameters of all towers."""
    return sum(tower_parameters(tower, policy.image_size) for tower in policy.towers)


def projector_parameters(policy: OpenVLAConfig) -> int:
    """Parameters of the projector."""
    return sum(linear.parameters for linear in projector_linears(policy))


def trunk_parameters(llm: LanguageModelConfig) -> int:
    """Parameters of the language model without its head: embedding, layers, final normalisation."""
    one_layer = sum(linear.parameters for linear in layer(llm).linears) + 2 * llm.hidden_size
    return llm.vocab_size * llm.hidden_size + llm.num_layers * one_layer + llm.hidden_size


def head_parameters(llm: LanguageModelConfig) -> int:
    """Parameters of the language model's head: all rows, though only 256 are read."""
    return llm.vocab_size * llm.hidden_size


def choices(policy: OpenVLAConfig) -> int:
    """Rows of the head that are read: the tokens that may be chosen."""
    return policy.language_model.vocab_size if policy.vocabulary == "full" else NUM_ACTION_BINS


def value_head_parameters(policy: OpenVLAConfig) -> int:
    """Parameters of the value head's two linear maps."""
    width, hidden = policy.language_model.hidden_size, policy.value_hidden_size
    return Linear(width, hidden, bias=True).parameters + Linear(hidden, 1, bias=True).parameters


def adapter_parameters(policy: OpenVLAConfig, part: str) -> int:
    """Parameters of one set of adapters on `part`; 0 where `policy.lora` does not name it."""
    if policy.lora is None or part not in policy.lora.parts:
        return 0
    llm, rank = policy.language_model, policy.lora.rank
    if part == "language_model":
        return llm.num_layers * sum(linear.adapter(rank) for linear in layer(llm).linears)
    if part == "projector":
        return sum(linear.adapter(rank) for linear in projector_linears(policy))
    towers = [tower for tower in policy.towers if isinstance(tower, ViTTowerConfig)]
    return sum((tower.depth - 1) * linear.adapter(rank) for tower in towers for linear in block_linears(tower))


def layer_parameters(policy: OpenVLAConfig) -> int:
    """Parameters of the linear maps of all decoder layers: what may be held in 4 bits."""
    return policy.language_model.num_layers * sum(map_.parameters for map_ in layer(policy.language_model).linears)


def linear_parameters(policy: OpenVLAConfig) -> int:
    """Parameters of the projector and of the decoder layers' linear maps: what a copy for the rollout holds."""
    return projector_parameters(policy) + layer_parameters(policy)


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one kind: how many, in how many bytes each, and who trains them."""

    name: str
    count: int
    width: float
    """Bytes of one parameter, of its gradient and of each of its two Adam states."""
    trained_by: str | None
    """`policy` or `value`, the optimiser's two groups; none is frozen."""

    @property
    def bytes(self) -> int:
        """Memory of the parameters themselves."""
        return round(self.count * self.width)


def weights(policy: OpenVLAConfig, algorithm: PolicyGradientSection) -> tuple[Weights, ...]:
    """Everything the policy holds, in the order in which it is used; adapters and value head are float32."""
    full, stored = policy.lora is None, BYTES[policy.dtype]
    vision = "policy" if algorithm.train_vision else None
    actor = "policy" if full else None
    llm = policy.language_model
    trunk = projector_parameters(policy) + trunk_parameters(llm)
    separate = trunk if policy.critic == "separate" else 0
    adapters = sum(adapter_parameters(policy, part) for part in ("language_model", "projector"))
    packed = layer_parameters(policy) * policy.four_bit
    found = (
        Weights("vision towers", vision_parameters(policy), stored, vision if full else None),
        Weights("projector and language model", trunk + head_parameters(llm) - packed, stored, actor),
        Weights("decoder layers' maps in 4 bits", packed, NF4_BYTES, None),
        Weights("separate critic", separate, stored, "value"),
        Weights("vision adapters", adapter_parameters(policy, "vision"), 4, vision),
        Weights("adapters", adapters, 4, "policy"),
        Weights("critic's adapters", adapters if policy.critic == "adapter" else 0, 4, "value"),
        Weights("value head", value_head_parameters(policy), 4, "value"),
    )
    return tuple(part for part in found if part.count)


def total_parameters(policy: OpenVLAConfig) -> int:
    """Every parameter of the policy."""
    return sum(part.count for part in weights(policy, PolicyGradientSection()))
