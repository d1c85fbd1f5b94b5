"""The policy against transformers' own forward pass, brute force, and sampling frequencies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from reachrl.config.policy import OpenVLAConfig
from reachrl.errors import ConfigError
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.testing.policies import given_noise
from reachrl.types import Observation

INSTRUCTIONS = ("push the puck", "reach around the wall and close the drawer")
FIRST_ACTION = 768


def micro(**changes: object) -> OpenVLAConfig:
    """A policy of 80 k parameters, 16 px, with a ViT and a convolutional tower."""
    sizes: dict[str, object] = {
        "image_size": 16,
        "towers": (
            {"kind": "vit", "width": 16, "depth": 3, "num_heads": 2, "mlp_width": 24, "patch_size": 8},
            {"kind": "conv", "stages": [{"channels": 8, "kernel": 5, "stride": 4}, {"channels": 16}]},
        ),
        "language_model": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "value_hidden_size": 16,
    }
    return OpenVLAConfig.model_validate({**sizes, **changes})


def build(**changes: object) -> OpenVLAPolicy:
    """Random weights, sharp enough that probabilities differ and values are not zero."""
    torch.manual_seed(3)
    policy = OpenVLAPolicy(micro(**changes))
    with torch.no_grad():
        policy.language_model.lm_head.weight.normal_(std=0.5)
        policy.language_model.model.embed_tokens.weight.normal_(std=0.02)
        policy.value_head.fc2.weight.normal_()
        for layer in policy.language_model.model.layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.12)
    if policy.critic is not None:
        policy.critic.copy_from(policy.projector, policy.language_model.model)
    return policy


def observe(batch: int, size: int = 16) -> Observation:
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    return Observation(images={"camera": images}, instructions=tuple(INSTRUCTIONS[i % 2] for i in range(batch)))


def gumbel_noise(batch: int, num_tokens: int = 4, seed: int = 0) -> torch.Tensor:
    uniform = np.random.default_rng(seed).random((batch, num_tokens, 256))
    return torch.from_numpy(-np.log(-np.log(uniform))).float()


def reference_logits(policy: OpenVLAPolicy, inputs: OpenVLAInputs, token_ids: torch.Tensor) -> torch.Tensor:
    """Full-vocabulary logits of transformers' own forward pass, one unpadded row at a time."""
    llama: LlamaForCausalLM = policy.language_model
    rows = []
    for i in range(len(token_ids)):
        ids = torch.cat([inputs.prompt_ids[i][inputs.prompt_mask[i]], token_ids[i, :-1]])[None]
        patches = policy.projector(policy.vision_features(inputs.pixel_values[i : i + 1]))
        text = llama.get_input_embeddings()(ids)
        embeds = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
        rows.append(llama(inputs_embeds=embeds, use_cache=False).logits[0, -token_ids.shape[1] :])
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_evaluate_equals_transformers_forward(temperature: float) -> None:
    policy = build()
    inputs = policy.encode(observe(4))
    token_ids = torch.randint(FIRST_ACTION, FIRST_ACTION + 256, (4, 4), generator=torch.Generator().manual_seed(0))
    scored = policy.evaluate(inputs, token_ids, temperature=temperature)
    logits = reference_logits(policy, inputs, token_ids)[..., FIRST_ACTION : FIRST_ACTION + 256].double() / temperature
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    chosen = torch.stack(
        [torch.stack([probs[b, a, token_ids[b, a] - FIRST_ACTION] for a in range(4)]) for b in range(4)]
    )
    assert probs.max() > 0.1  # not the uniform distribution
    torch.testing.assert_close(scored.logprobs.double(), chosen.log(), rtol=0, atol=2e-5)
    torch.testing.assert_close(scored.entropy.double(), -(probs * probs.log()).sum(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("sampled", [True, False])
def test_decoding_equals_teacher_forcing(critic: str, sampled: bool) -> None:
    policy = build(critic=critic)
    if policy.critic is not None:
        with torch.no_grad():
            policy.critic.model.norm.weight.mul_(0.5)  # another trunk than the actor's
    inputs = policy.encode(observe(6))
    noise = gumbel_noise(6) if sampled else None
    sample = policy.act(inputs, temperature=1.4, noise=None if noise is None else given_noise(noise))
    scored = policy.evaluate(inputs, sample.token_ids, temperature=1.4)
    torch.testing.assert_close(sample.logprobs, scored.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample.values, scored.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(sample.values, policy.values(inputs), rtol=0, atol=1e-5)
    assert sample.values.std() > 1e-3
    logits = reference_logits(policy, inputs, sample.token_ids)[..., FIRST_ACTION : FIRST_ACTION + 256]
    scores = logits / 1.4 + (0 if noise is None else noise)
    assert torch.equal(scores.argmax(-1) + FIRST_ACTION, sample.token_ids)


def test_rows_do_not_depend_on_their_batch() -> None:
    policy = build()
    observation, noise = observe(5), gumbel_noise(5)
    together = policy.act(policy.encode(observation), noise=given_noise(noise))
    for i in range(5):
        alone = Observation(
            images={"camera": observation.frames[i : i + 1]}, instructions=observation.instructions[i : i + 1]
        )
        sample = policy.act(policy.encode(alone), noise=given_noise(noise[i : i + 1]))
        assert torch.equal(sample.token_ids[0], together.token_ids[i])
        torch.testing.assert_close(sample.logprobs[0], together.logprobs[i], rtol=0, atol=1e-5)


def test_sampling_frequencies_follow_the_softmax() -> None:
    policy = build(num_action_tokens=1)
    inputs = policy.encode(observe(1))
    num_draws, temperature = 6000, 1.5
    many = OpenVLAInputs(
        prompt_ids=inputs.prompt_ids.expand(num_draws, -1),
        prompt_mask=inputs.prompt_mask.expand(num_draws, -1),
        vision_features=policy.vision_features(inputs.pixel_values).detach().expand(num_draws, -1, -1),
    )
    sample = policy.act(many, temperature=temperature, noise=given_noise(gumbel_noise(num_draws, 1)))
    logits = reference_logits(policy, inputs, sample.token_ids[:1])[0, 0, FIRST_ACTION : FIRST_ACTION + 256].double()
    expected = (logits / temperature).softmax(-1) * num_draws
    counts = torch.bincount(sample.token_ids[:, 0] - FIRST_ACTION, minlength=256).double()
    rare = expected < 5
    groups = [(counts[i], expected[i]) for i in torch.nonzero(~rare).flatten()]
    groups.append((counts[rare].sum(), expected[rare].sum()))
    assert len(groups) > 20
    chi2 = sum((count - mean) ** 2 / mean for count, mean in groups)
    degrees = len(groups) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5
    # the same draws are improbable under another temperature: the test can tell
    wrong = logits.softmax(-1) * num_draws
    assert sum((counts[i] - wrong[i]) ** 2 / wrong[i] for i in torch.nonzero(wrong >= 5).flatten()) > 3 * chi2


def test_cached_vision_features_give_the_same() -> None:
    policy = build()
    inputs = policy.encode(observe(3))
    cached = replace(inputs, pixel_values=None, vision_features=policy.vision_features(inputs.pixel_values).detach())
    token_ids = policy.act(inputs).token_ids
    assert torch.equal(policy.act(cached).token_ids, token_ids)
    assert torch.equal(policy.evaluate(cached, token_ids).logprobs, policy.evaluate(inputs, token_ids).logprobs)
    with pytest.raises(ValueError, match="pixel_values or vision_features"):
        policy.act(replace(inputs, pixel_values=None))


def test_every_pixel_and_word_reaches_the_action() -> None:
    policy = build()
    inputs = policy.encode(observe(1))
    pixels = inputs.pixel_values.clone().requires_grad_()
    token_ids = torch.full((1, 4), FIRST_ACTION)
    policy.evaluate(replace(inputs, pixel_values=pixels), token_ids).logprobs[0, 0].backward()
    assert (pixels.grad.abs().amax(1) > 0).all()
    used = policy.language_model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten()
    assert set(inputs.prompt_ids[inputs.prompt_mask].tolist()) == set(used.tolist())


def gradients(policy: OpenVLAPolicy) -> dict[str, set[str]]:
    """Names of the parameters with a non-zero gradient, by role."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    moved = {
        role: {names[id(p)] for p in group if p.grad is not None and p.grad.abs().sum() > 0}
        for role, group in policy.parameter_groups().items()
    }
    policy.zero_grad(set_to_none=True)
    return moved


@pytest.mark.parametrize(
    ("critic", "to_trunk", "roles"),
    [
        ("shared", True, {"vision", "trunk", "value"}),
        ("shared", False, {"value"}),
        ("separate", True, {"value"}),
    ],
)
def test_value_loss_moves_only_what_it_should(critic: str, to_trunk: bool, roles: set[str]) -> None:
    policy = build(critic=critic, value_gradient_to_trunk=to_trunk)
    inputs = policy.encode(observe(2))
    token_ids = policy.act(inputs).token_ids
    for values in (policy.values(inputs), policy.evaluate(inputs, token_ids).values):
        values.square().sum().backward()
        moved = gradients(policy)
        assert {role for role, names in moved.items() if names} == roles
        assert ("critic.model.layers.0.mlp.up_proj.weight" in moved["value"]) == (critic == "separate")


def test_policy_loss_moves_the_actor_and_only_the_action_rows() -> None:
    policy = build(critic="separate")
    inputs = policy.encode(observe(2))
    policy.evaluate(inputs, policy.act(inputs, noise=given_noise(gumbel_noise(2))).token_ids).logprobs.sum().backward()
    head = policy.language_model.lm_head.weight.grad
    rows = head.abs().sum(1).nonzero().flatten()
    assert (rows.min(), rows.max(), len(rows)) == (FIRST_ACTION, FIRST_ACTION + 255, 256)
    moved = gradients(policy)
    everything = {name for name, _ in policy.named_parameters() if not name.startswith(("critic.", "value_head."))}
    assert moved["vision"] | moved["trunk"] == everything  # nothing is dead weight
    assert not moved["value"]


def test_separate_critic_leaves_the_actor_unchanged() -> None:
    policy = build(critic="separate")
    inputs = policy.encode(observe(3))
    before = policy.act(inputs)
    optimiser = torch.optim.SGD(policy.parameter_groups()["value"], lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        (policy.values(inputs) - 1).square().mean().backward()
        optimiser.step()
    after = policy.act(inputs)
    assert torch.equal(before.logprobs, after.logprobs)
    assert (before.values - after.values).abs().max() > 1e-3
    assert policy.critic is not None
    policy.reset_critic()
    for name, value in policy.language_model.model.named_parameters():
        assert torch.equal(dict(policy.critic.model.named_parameters())[name], value)


def test_untrained_values_are_zero_and_groups_hold_each_parameter_once() -> None:
    for critic in ("shared", "separate"):
        policy = OpenVLAPolicy(micro(critic=critic))
        assert torch.equal(policy.values(policy.encode(observe(2))), torch.zeros(2))
        groups = policy.parameter_groups()
        held = [id(parameter) for group in groups.values() for parameter in group]
        assert sorted(held) == sorted(id(parameter) for parameter in policy.parameters())


def test_neighbouring_bins_start_alike() -> None:
    torch.manual_seed(0)
    policy = OpenVLAPolicy(OpenVLAConfig())
    for table in (policy.language_model.lm_head, policy.language_model.model.embed_tokens):
        rows = torch.nn.functional.normalize(table.weight[FIRST_ACTION : FIRST_ACTION + 256], dim=1)
        similarity = rows @ rows.T
        assert similarity.diagonal(1).min() > 0.95
        assert similarity[0, 255] < 0 and similarity[0, 128] < similarity[0, 32] < similarity[0, 8]
        norms = table.weight[FIRST_ACTION : FIRST_ACTION + 256].norm(dim=1)
        others = table.weight[3:500].norm(dim=1)
        torch.testing.assert_close(norms.square().mean().sqrt(), others.square().mean().sqrt(), rtol=0.05, atol=0)
    scored = policy.evaluate(policy.encode(observe(2, size=96)), torch.full((2, 4), FIRST_ACTION))
    assert scored.entropy.min() > 5.4  # of ln 256 = 5.545: no action is ruled out at the start


def test_bfloat16_trunk_agrees_roughly_and_keeps_its_value_head() -> None:
    full, half = OpenVLAPolicy(micro()), OpenVLAPolicy(micro(dtype="bfloat16"))
    half.load_state_dict(full.state_dict())
    assert half.value_head.fc1.weight.dtype == torch.float32
    assert half.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    inputs = full.encode(observe(2))
    token_ids = full.act(inputs).token_ids
    torch.testing.assert_close(
        half.evaluate(inputs, token_ids).logprobs, full.evaluate(inputs, token_ids).logprobs, rtol=0, atol=0.05
    )


def test_actions_round_trip_in_the_environments_units() -> None:
    policy = build()
    q01, q99 = np.array([-0.2, -1.0, 0.0, -1.0]), np.array([0.3, 1.0, 0.5, 1.0])
    policy.set_action_stats(q01, q99, np.array([True, True, True, False]))
    actions = np.random.default_rng(0).uniform(q01, q99, (50, 4)).astype(np.float32)
    ids, _ = policy.encode_actions(actions[:, None])
    assert ids.min() >= FIRST_ACTION and ids.max() < FIRST_ACTION + 256
    decoded = policy.decode_actions(ids)[:, 0]
    assert decoded.dtype == np.float32
    half_bin = np.where([True, True, True, False], (q99 - q01) / 255 / 2, 1 / 255)
    assert (np.abs(decoded - actions) <= half_bin * 1.001).all()
    assert policy.encode_actions(q99[None, None])[0][0, 0] == FIRST_ACTION  # the largest action has the smallest id
    with pytest.raises(ConfigError, match="num_action_tokens = 4, but actions have 3 dimensions"):
        policy.set_action_stats(q01[:3], q99[:3], np.ones(3, bool))


def test_frames_of_another_size_are_resized() -> None:
    policy = build()
    flat = Observation(images={"camera": np.full((1, 40, 30, 3), 128, np.uint8)}, instructions=("reach the goal",))
    pixels = policy.encode(flat).pixel_values
    assert pixels.shape == (1, 6, 16, 16)
    expected = [
        (128 / 255 - m) / s
        for m, s in zip((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375), strict=True)
    ]
    for channel, value in enumerate([*expected, *[(128 / 255 - 0.5) / 0.5] * 3]):
        torch.testing.assert_close(pixels[0, channel], torch.full((16, 16), value), rtol=0, atol=1e-6)


def test_a_policy_turns_off_the_attention_whose_gradients_are_not_numbers() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    build()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [64, 320])
def test_gradients_under_a_mask_are_numbers(length: int) -> None:
    """The case of pytorch/pytorch#196678: every logit near -120, a length of 64 modulo 128."""
    build()
    query, key, value = torch.randn(3, 1, 1, length, 64, device="cuda", dtype=torch.bfloat16).mul(0.1).unbind()
    query[..., 0], key[..., 0] = 1.0, -960.0
    query.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()
