"""Arithmetic of a pass over one row: two FLOPs for each weight and position, forward and backward, by part.

Products are counted and nothing else; attention is counted in full, as a kernel with a mask computes it, and its
backward pass as four products (a fused kernel computes a fifth, the scores, again).

Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1 (2 N a token forward, 4 N backward).
"""

from dataclasses import dataclass

from reachrl.config.policy import OpenVLAConfig
from reachrl.config.towers import ConvTowerConfig, TowerConfig, ViTTowerConfig
from reachrl.plan.activations import prompt_tokens
from reachrl.plan.parameters import Layer, Linear, block_linears, choices, layer, projector_linears


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of one row."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Gradients:
    """Which gradients a linear map has: of its weight, of adapters of `rank` beside it, of its input."""

    weight: bool = False
    rank: int = 0
    input: bool = False

    @property
    def any(self) -> bool:
        """Whether the backward pass comes here at all."""
        return self.weight or self.rank > 0 or self.input

    def downstream(self) -> "Gradients":
        """Those of the maps that follow: their input depends on what is trained here."""
        return Gradients(self.weight, self.rank, self.any)


def linear(shape: Linear, tokens: int, gradients: Gradients) -> Flops:
    """One linear map at `tokens` positions, adapters included."""
    product = 2 * tokens * shape.inputs * shape.outputs
    inner, outer = 2 * tokens * gradients.rank * shape.inputs, 2 * tokens * gradients.rank * shape.outputs
    backward = product * (gradients.input + gradients.weight) + inner * (gradients.input + 1) + 2 * outer
    return Flops(product + inner + outer, backward if gradients.any else 0)


def attention(width: int, queries: int, keys: int, gradients: Gradients) -> Flops:
    """Scores and weighted values of all heads together; heads that share keys compute no less."""
    forward = 4 * queries * keys * width
    return Flops(forward, 2 * forward * gradients.any)


def decoder_layer(shape: Layer, tokens: int, queries: int, keys: int, gradients: Gradients) -> Flops:
    """One Llama layer: keys and values at `tokens` positions, everything else at the last `queries` of them."""
    later = gradients.downstream()
    total = linear(shape.key, tokens, gradients) + linear(shape.value, tokens, gradients)
    total += linear(shape.query, queries, gradients)
    total += attention(shape.query.outputs, queries, keys, gradients)
    for rest in (shape.output, shape.gate, shape.up, shape.down):
        total += linear(rest, queries, later)
    return total


def trunk(policy: OpenVLAConfig, tokens: int, queries: int, gradients: Gradients) -> Flops:
    """All decoder layers of a row; the last one computes `queries` positions only.

    With gradient checkpointing the backward pass repeats each of the others, up to the last product that it needs:
    PyTorch stops in front of the MLP's last map, or of its adapter's last matrix.
    """
    shape, layers = layer(policy.language_model), policy.language_model.num_layers
    first = decoder_layer(shape, tokens, tokens, tokens, gradients) if layers > 1 else Flops()
    later = gradients.downstream()
    middle = decoder_layer(shape, tokens, tokens, tokens, later) * max(layers - 2, 0)
    final = decoder_layer(shape, tokens, queries, tokens, later if layers > 1 else gradients)
    again = 0
    if policy.gradient_checkpointing and gradients.any:
        spared = gradients.rank or shape.down.inputs
        again = (first + middle).forward - (layers - 1) * 2 * tokens * spared * shape.down.outputs
    return first + middle + final + Flops(0, again)


def tower(config: TowerConfig, image_size: int, gradients: Gradients) -> Flops:
    """One vision tower over one frame."""
    if isinstance(config, ConvTowerConfig):
        return _conv_tower(config, image_size, gradients)
    return _vit_tower(config, image_size, gradients)


def _conv_tower(config: ConvTowerConfig, image_size: int, gradients: Gradients) -> Flops:
    total, channels, side = Flops(), 3, image_size
    now = Gradients(weight=gradients.weight)  # pixels have no gradient
    for stage in config.stages:
        side //= stage.stride
        total += linear(Linear(stage.kernel**2 * channels, stage.channels), side**2, now)
        channels, now = stage.channels, now.downstream()
    return total


def _vit_tower(config: ViTTowerConfig, image_size: int, gradients: Gradients) -> Flops:
    patches = config.grid(image_size) ** 2
    tokens = patches + config.class_token + config.num_registers
    embedding = Gradients(weight=gradients.weight)
    total = linear(Linear(3 * config.patch_size**2, config.width), patches, embedding)
    now = Gradients(gradients.weight, gradients.rank, embedding.any)
    for _ in range(config.depth - 1):
        qkv, *others = block_linears(config)
        total += linear(qkv, tokens, now) + attention(config.width, tokens, tokens, now)
        now = now.downstream()
        for rest in others:
            total += linear(rest, tokens, now)
    return total


def vision(policy: OpenVLAConfig) -> Flops:
    """All towers over one frame, trained."""
    parts = (tower(config, policy.image_size, _gradients(policy, "vision")) for config in policy.towers)
    return sum(parts, start=Flops())


def _gradients(policy: OpenVLAConfig, part: str, *, input: bool = False) -> Gradients:
    if policy.lora is None:
        return Gradients(weight=True, input=input)
    return Gradients(rank=policy.lora.rank if part in policy.lora.parts else 0, input=input)


def _prefill(policy: OpenVLAConfig, tokens: int, queries: int, *, vision_trained: bool) -> Flops:
    """Projector and trunk of one set of weights."""
    seen = _gradients(policy, "vision").any and vision_trained
    now, total = _gradients(policy, "projector", input=seen), Flops()
    for shape in projector_linears(policy):
        total += linear(shape, policy.num_patches, now)
        now = now.downstream()
    # Text embeddings are trained with the weights, so the trunk's input has a gradient then in any case.
    embedded = now.any or policy.lora is None
    return total + trunk(policy, tokens, queries, _gradients(policy, "language_model", input=embedded))


def _decoding(policy: OpenVLAConfig) -> OpenVLAConfig:
    """The projector and trunk that decode: a copy for the rollout has its adapters folded in."""
    return policy.model_copy(update={"lora": None}) if policy.rollout_copy else policy


def heads(policy: OpenVLAConfig, positions: int) -> Flops:
    """The rows of the head that are read at `positions` positions, and the value head once."""
    width, llm_trained = policy.language_model.hidden_size, policy.lora is None
    now = Gradients(weight=llm_trained, input=True)
    rows = linear(Linear(width, choices(policy)), positions, now)
    to_trunk = policy.critic != "shared" or policy.value_gradient_to_trunk
    value = linear(Linear(width, policy.value_hidden_size), 1, Gradients(weight=True, input=to_trunk))
    return rows + value + linear(Linear(policy.value_hidden_size, 1), 1, Gradients(weight=True, input=True))


def critic(policy: OpenVLAConfig) -> Flops:
    """The pass of a critic that does not share the actor's trunk; it ends at the first action position."""
    if policy.critic == "shared":
        return Flops()
    return _prefill(policy, prompt_tokens(policy), 1, vision_trained=False)


def evaluation(policy: OpenVLAConfig, *, train_vision: bool) -> Flops:
    """Scoring given actions from vision features: forward, and backward as in an update."""
    actions = policy.num_action_tokens
    actor = _prefill(policy, prompt_tokens(policy) + actions - 1, actions, vision_trained=train_vision)
    return actor + critic(policy) + heads(policy, actions)


def prefill(policy: OpenVLAConfig) -> int:
    """Forward FLOPs of decoding the first action token and the value, frame included."""
    actor = _prefill(_decoding(policy), prompt_tokens(policy), 1, vision_trained=False)
    return (vision(policy) + actor + critic(policy) + heads(policy, 1)).forward


def values(policy: OpenVLAConfig) -> int:
    """Forward FLOPs of one state value, frame included."""
    shared = policy.critic == "shared"
    trunk_pass = _prefill(policy, prompt_tokens(policy), 1, vision_trained=False) if shared else critic(policy)
    return (vision(policy) + trunk_pass + heads(policy, 0)).forward


def decode_steps(policy: OpenVLAConfig) -> int:
    """Forward FLOPs of the single-token steps that follow the prefill."""
    llm, total = policy.language_model, Flops()
    gradients = _gradients(_decoding(policy), "language_model")
    head = 2 * llm.hidden_size * choices(policy)
    for step in range(policy.num_action_tokens - 1):
        keys = prompt_tokens(policy) + step + 1
        total += decoder_layer(layer(llm), 1, 1, keys, gradients) * llm.num_layers
    return total.forward + head * (policy.num_action_tokens - 1)
