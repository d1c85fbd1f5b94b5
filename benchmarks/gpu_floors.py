"""What a perfect program must do: products and bytes of the towers, the projector and the language model."""

from reachrl.config.language_model import NUM_ACTION_BINS, LanguageModelConfig
from reachrl.config.policy import PrismaticConfig
from reachrl.config.towers import ViTTowerConfig
from reachrl.policies.openvla.policy import OpenVLAPolicy


def layer_weights(llm: LanguageModelConfig) -> tuple[int, int]:
    """Numbers in one layer's key and value maps, and in its other linear maps."""
    width = llm.hidden_size
    keys = width * (llm.num_kv_heads or llm.num_heads) // llm.num_heads
    return 2 * width * keys, 2 * width * width + 3 * width * llm.intermediate_size


def trunk_flops(llm: LanguageModelConfig, tokens: int, queries: int) -> float:
    """FLOPs of a forward pass of one row, whose last layer is read at `queries` positions only."""
    keys_values, others = layer_weights(llm)
    attention = 4 * llm.hidden_size * tokens * (tokens + 1) / 2
    full_layer = 2 * tokens * (keys_values + others) + attention
    last_layer = 2 * tokens * keys_values + 2 * queries * others + 4 * llm.hidden_size * tokens * queries
    return (llm.num_layers - 1) * full_layer + last_layer + 2 * queries * NUM_ACTION_BINS * llm.hidden_size


def vision_flops(config: PrismaticConfig) -> float:
    """FLOPs of the towers for one frame."""
    total = 0.0
    for tower in config.towers:
        side, channels = config.image_size, 3
        if isinstance(tower, ViTTowerConfig):
            tokens = config.num_patches + tower.num_registers + tower.class_token
            weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
            total += (tower.depth - 1) * (2 * tokens * weights + 4 * tower.width * tokens**2)
            total += 2 * config.num_patches * 3 * tower.patch_size**2 * tower.width
            continue
        for stage in tower.stages:
            side //= stage.stride
            total += 2 * side**2 * stage.kernel**2 * channels * stage.channels
            channels = stage.channels
    return total


def projector_flops(policy: OpenVLAPolicy) -> float:
    """FLOPs of the projector for one frame."""
    weights = sum(parameter.numel() for parameter in policy.projector.parameters() if parameter.ndim == 2)
    return 2 * policy.config.num_patches * weights


def prompt_tokens(config: PrismaticConfig) -> int:
    """Positions before the first action token."""
    return config.num_patches + config.prompt_length


def decode_floor(policy: OpenVLAPolicy, batch: int, flops: float, bandwidth: float) -> tuple[float, float]:
    """Least seconds of towers and prefill, and of the single-token steps behind it.

    In 8 bits the layers' products take half the time and their weights half the bytes.
    """
    config = policy.config
    llm, width = config.language_model, policy.language_model.lm_head.weight.element_size()
    float8 = config.rollout_copy and config.rollout_precision == "float8"
    weight_width, trunk_rate = (1, 2 * flops) if float8 else (width, flops)
    keys_values, others = layer_weights(llm)
    weights = llm.num_layers * (keys_values + others)
    prefill = (vision_flops(config) + projector_flops(policy)) / flops
    prefill += trunk_flops(llm, prompt_tokens(config), 1) / trunk_rate
    steps = 0.0
    for step in range(1, config.num_action_tokens):
        length = prompt_tokens(config) + step
        cache = llm.num_layers * length * keys_values // llm.hidden_size
        attention = 4 * llm.num_layers * llm.hidden_size * length
        reads = (weight_width * weights + batch * width * cache) / bandwidth
        steps += max(reads, batch * (2 * weights + attention) / trunk_rate)
    return max(batch * prefill, weight_width * weights / bandwidth), steps


def training_flops(policy: OpenVLAPolicy) -> float:
    """Useful FLOPs of one row's training step: forward, and the gradients of the inputs; the projector is frozen."""
    config, prompt = policy.config, prompt_tokens(policy.config)
    actions = config.num_action_tokens
    passes = trunk_flops(config.language_model, prompt + actions - 1, actions)
    projections = 1
    if config.critic == "adapter":
        passes += trunk_flops(config.language_model, prompt, 1)
        projections = 2
    return 2 * passes + projections * projector_flops(policy)
