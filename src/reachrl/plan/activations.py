"""Bytes that one row of a training pass keeps for its backward pass, and what a pass needs while it runs.

The count follows PyTorch operation by operation: what autograd saves depends on what is trained, and on the number
format. Fused attention is assumed, which keeps its inputs and output but no scores.
"""

from dataclasses import dataclass

from reachrl.config.policy import OpenVLAConfig
from reachrl.config.towers import ConvTowerConfig, TowerConfig, ViTTowerConfig
from reachrl.plan.parameters import BYTES, block_linears, choices, key_width, projector_linears


@dataclass(frozen=True, slots=True)
class Kept:
    """How tensors of a module are kept: its numbers, and what of it is trained."""

    stored: int  # bytes of a weight, and of the residual stream
    computed: int  # bytes of what a linear map returns
    full: bool  # the weights themselves are trained
    rank: int = 0  # of the adapters; 0 is none

    @property
    def mixed(self) -> bool:
        """Autocast: float32 weights, bfloat16 arithmetic."""
        return self.stored != self.computed

    def inputs(self, width: int, consumers: int = 1, *, fresh: bool = True) -> int:
        """Bytes kept of one token's `width` channels because `consumers` linear maps read them.

        Args:
            width: channels.
            consumers: maps that read the same input; a cast is made for each of them anew.
            fresh: whether nothing else keeps the tensor in the format of the arithmetic already.
        """
        if self.full:
            casts = consumers if self.mixed and fresh else int(fresh)
            return casts * self.computed * width
        if not self.rank:
            return 0
        inner = consumers * self.rank * (self.computed if self.mixed else 4)
        if self.stored == 4 and not self.mixed:
            return int(fresh) * 4 * width + inner
        return consumers * (2 if self.mixed else 4) * width + inner  # peft casts to its own float32 first


def numbers(policy: OpenVLAConfig) -> tuple[int, int]:
    """Bytes of a stored and of a computed number."""
    return BYTES[policy.dtype], BYTES[policy.arithmetic]


def kept(policy: OpenVLAConfig, part: str) -> Kept:
    """How the actor's `part` is kept: `language_model`, `projector` or `vision`."""
    stored, computed = numbers(policy)
    rank = policy.lora.rank if policy.lora is not None and part in policy.lora.parts else 0
    return Kept(stored, computed, full=policy.lora is None, rank=rank)


def prompt_tokens(policy: OpenVLAConfig) -> int:
    """Positions in front of the first action token: BOS, patches and the padded prompt."""
    return policy.num_patches + policy.prompt_length


def training_row(policy: OpenVLAConfig, *, train_vision: bool) -> dict[str, int]:
    """Bytes that one row keeps between its forward and its backward pass, by part."""
    tokens, actions = prompt_tokens(policy), policy.num_action_tokens
    parts = {
        "vision": sum(tower_row(policy, tower) for tower in policy.towers) if train_vision else 0,
        "actor": projector_row(policy, train_vision=train_vision) + trunk_row(policy, tokens + actions - 1, actions),
        "critic": 0,
        "logits": logits_row(policy),
    }
    if policy.critic != "shared":
        parts["critic"] = projector_row(policy, train_vision=False) + trunk_row(policy, tokens, 1)
    return parts


def trunk_row(policy: OpenVLAConfig, tokens: int, queries: int) -> int:
    """Bytes kept by all decoder layers of a row; the last layer computes `queries` positions only."""
    llm, how = policy.language_model, kept(policy, "language_model")
    first_layers = llm.num_layers - 1
    if policy.gradient_checkpointing:  # inputs alone; the last layer is never computed again
        first = first_layers * tokens * how.stored * llm.hidden_size
    else:
        first = first_layers * layer_row(policy, tokens)
    head = queries * norm_token(how, llm.hidden_size)
    return first + final_layer_row(policy, tokens, queries) + head


def norm_token(how: Kept, width: int) -> int:
    """Bytes kept by one RMSNorm of one token: its float32 input, 1 / rms, and what its scale's gradient needs."""
    return 4 * width + 4 + how.stored * width * how.full


def layer_row(policy: OpenVLAConfig, tokens: int) -> int:
    """Bytes kept by one decoder layer of one row of `tokens` positions."""
    llm, how = policy.language_model, kept(policy, "language_model")
    width = llm.hidden_size
    # Queries, repeated keys and values and the output, log-sum-exp, and the mask as numbers.
    attention = 4 * how.computed * width + 4 * llm.num_heads + how.computed * tokens
    token = norm_token(how, width) + how.inputs(width, 3) + attention + how.inputs(width, fresh=False)
    return tokens * (token + mlp_token(policy))


def mlp_token(policy: OpenVLAConfig) -> int:
    """Bytes kept by a layer's second half for one token: normalisation, gate, its SiLU, up, and their product."""
    llm, how = policy.language_model, kept(policy, "language_model")
    hidden = llm.intermediate_size
    gated = 3 * how.computed * hidden + how.inputs(hidden, fresh=True)
    if how.full and how.mixed:  # the product is in the arithmetic's format already
        gated = 4 * how.computed * hidden
    return norm_token(how, llm.hidden_size) + how.inputs(llm.hidden_size, 2) + gated


def final_layer_row(policy: OpenVLAConfig, tokens: int, queries: int) -> int:
    """Bytes kept by the last layer, which has keys and values everywhere and the rest at `queries` positions."""
    llm, how = policy.language_model, kept(policy, "language_model")
    width = llm.hidden_size
    everywhere = norm_token(how, width) + how.inputs(width, 2) + 2 * how.computed * key_width(llm)
    attention = 2 * how.computed * width + 4 * llm.num_heads + how.computed * tokens
    here = how.inputs(width) * how.mixed + attention + how.inputs(width, fresh=False) + mlp_token(policy)
    return tokens * everywhere + queries * here


def projector_row(policy: OpenVLAConfig, *, train_vision: bool) -> int:
    """Bytes kept by the projector: what its maps read, and the inputs of the GELUs between them."""
    how = kept(policy, "projector")
    if not (how.full or how.rank or train_vision):
        return 0
    *hidden, _ = (linear.outputs for linear in projector_linears(policy))
    gelus = how.computed * sum(hidden)
    return policy.num_patches * (gelus + sum(how.inputs(linear.inputs) for linear in projector_linears(policy)))


def tower_row(policy: OpenVLAConfig, tower: TowerConfig) -> int:
    """Bytes kept by a vision tower in training."""
    how = kept(policy, "vision")
    if not (how.full or how.rank):
        return 0
    if isinstance(tower, ConvTowerConfig):
        return _conv_row(tower, policy.image_size, how) if how.full else 0
    return _vit_row(tower, policy.image_size, how)


def _conv_row(tower: ConvTowerConfig, image_size: int, how: Kept) -> int:
    side, total = image_size, 3 * image_size**2
    for index, stage in enumerate(tower.stages):
        side //= stage.stride
        # The convolution's output, which GroupNorm keeps; the norm's, which GELU keeps; GELU's, the next one's input.
        tensors = 1 if index + 1 == len(tower.stages) else 3
        total += tensors * stage.channels * side**2
    return how.computed * total


def _vit_row(tower: ViTTowerConfig, image_size: int, how: Kept) -> int:
    tokens = tower.grid(image_size) ** 2 + tower.class_token + tower.num_registers
    qkv, out, fc1, fc2 = block_linears(tower)
    norms = 2 * (how.computed * tower.width + 8)
    attention = how.computed * (qkv.outputs + out.inputs) + 4 * tower.num_heads
    scales = 2 * how.computed * tower.width * (tower.layer_scale and how.full)
    linears = how.inputs(qkv.inputs) + how.inputs(out.inputs, fresh=False) + how.inputs(fc1.inputs)
    mlp = how.computed * fc1.outputs + how.inputs(fc2.inputs)
    block = norms + attention + scales + linears + mlp
    return how.computed * 3 * image_size**2 + (tower.depth - 1) * tokens * block


def logits_row(policy: OpenVLAConfig) -> int:
    """Bytes of a row's logits, log-probabilities, probabilities and their product, all float32."""
    return policy.num_action_tokens * 4 * (4 * choices(policy) + policy.language_model.hidden_size)


def head_copy(policy: OpenVLAConfig) -> int:
    """Bytes of the float32 copy of the head's rows that every pass makes of stored bfloat16."""
    return 4 * choices(policy) * policy.language_model.hidden_size * (numbers(policy)[0] != 4)


def working_row(policy: OpenVLAConfig, tokens: int, *, decoding: bool) -> int:
    """Bytes of a row while one decoder layer runs without keeping anything: the widest moment is in its MLP.

    Args:
        policy: the section.
        tokens: positions of a row.
        decoding: whether the layer fills a cache; its attention's tensors then stay at hand for longer.
    """
    llm, how = policy.language_model, kept(policy, "language_model")
    width, hidden, computed = llm.hidden_size, llm.intermediate_size, how.computed
    # The trunk's input, the layer's, the residual and its normalisation; SiLU of the gate, up, and their product.
    stream = 3 * how.stored * width + computed * width + 3 * decoding * computed * width
    copied = decoding and policy.rollout_copy  # no adapters; gate and up come out of one product and stay together
    if copied or not how.rank:
        # Rounding to 8 bits passes through float32, unless compiled code does it in one go.
        rounding = 4 * (copied and policy.rollout_precision == "float8" and not policy.compile_prefill)
        return tokens * (stream + max((3 + copied) * computed, 3 * computed + rounding) * hidden)
    adapter = computed if how.mixed else 4  # float32 adapters compute in their own format
    cast = adapter * width if adapter != computed else 0
    return tokens * (stream + cast + 2 * computed * hidden + 2 * adapter * hidden)


def vision_working_row(policy: OpenVLAConfig) -> int:
    """Bytes of a row while a tower runs without keeping anything: the widest stage of the widest tower."""
    _, computed = numbers(policy)
    widest = 0
    for tower in policy.towers:
        side, now = policy.image_size, 3 * policy.image_size**2
        if isinstance(tower, ViTTowerConfig):
            tokens = tower.grid(side) ** 2 + tower.class_token + tower.num_registers
            widest = max(widest, now + tokens * (3 * tower.width + 2 * tower.mlp_width))
            continue
        for stage in tower.stages:
            side //= stage.stride
            out = stage.channels * side**2
            widest, now = max(widest, now + 2 * out), out
    return computed * widest


def cache_row(policy: OpenVLAConfig) -> int:
    """Bytes of the keys and values of all layers and positions of one decoded row."""
    llm, (stored, _) = policy.language_model, numbers(policy)
    length = prompt_tokens(policy) + policy.num_action_tokens - 1
    return 2 * llm.num_layers * key_width(llm) * length * stored


def features_row(policy: OpenVLAConfig) -> int:
    """Bytes of the towers' output for one frame."""
    return policy.num_patches * policy.vision_width * numbers(policy)[0]


def pixels_row(policy: OpenVLAConfig) -> int:
    """Bytes of one frame as float32 pixels, once for each tower."""
    return 4 * 3 * len(policy.towers) * policy.image_size**2
