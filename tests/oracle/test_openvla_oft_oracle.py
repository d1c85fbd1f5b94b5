"""OpenVLA-OFT against recorded outputs of three programs (see data/openvla_oft/README.md)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from oft_folder import WHOLE, load, recorded, write_oft

from reachrl.functional.action_stats import ActionStats
from reachrl.policies.decoding.decode import action_logits
from reachrl.policies.llama import last_hidden, position_ids
from reachrl.policies.openvla_oft.inputs import OFTInputs
from reachrl.policies.openvla_oft.policy import OpenVLAOFTPolicy
from reachrl.policies.openvla_oft.proprio import normalise_state
from reachrl.types import Observation

FIRST = 31744


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return recorded()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    place = tmp_path_factory.mktemp("checkpoints")
    return {state: write_oft(place / f"tiny-{state}", state=state) for state in (False, True)}


@pytest.fixture(scope="module")
def policies(folders: dict[bool, Path]) -> dict[str, OpenVLAOFTPolicy]:
    return {
        "tokens": load(folders[False]),
        "tokens2p": load(folders[True], **WHOLE),
        "simple": load(folders[False], dialect="simplevla_rl"),
        "simple2p": load(folders[True], dialect="simplevla_rl", **WHOLE),
        "rlinf": load(folders[False], dialect="rlinf"),
    }


def inputs_of(policy: OpenVLAOFTPolicy, io: dict[str, torch.Tensor]) -> OFTInputs:
    images = ("pixel_values", "wrist_pixel_values")[: policy.config.num_cameras]
    return OFTInputs(
        prompt_ids=io["input_ids"],
        prompt_mask=io["attention_mask"].bool(),
        pixel_values=torch.cat([io[name] for name in images], 1),
        state=io["proprio"].float() if policy.config.state_size else None,
    )


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def one_by_one(policy: OpenVLAOFTPolicy, inputs: OFTInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and logits of the 256, a prompt at a time as the official code computes."""
    head = policy.language_model.lm_head.weight[FIRST : FIRST + 256]
    hidden = [
        policy._chunk(policy.projector, policy.language_model.model, policy._features(row), row)
        for row in (inputs.rows(torch.tensor([i])) for i in range(len(inputs)))
    ]
    return torch.cat(hidden), action_logits(torch.cat(hidden), head, 1.0)


def test_images_and_state_become_the_recorded_tokens(policies, io):
    policy = policies["tokens2p"]
    inputs = inputs_of(policy, io)
    with torch.no_grad():
        patches = policy.projector(policy._features(inputs))
        token = policy.proprio_projector(inputs.state)
    assert gap(patches[:, :16], io["projected"]) <= 1e-6
    assert gap(patches[:, 16:], io["projected_wrist"]) <= 1e-6
    assert gap(token, io["proprio_token"]) <= 1e-6


def test_the_state_is_normalised_as_recorded(policies, io):
    unit = normalise_state(io["proprio_raw"].numpy(), policies["tokens2p"].state_stats)
    np.testing.assert_allclose(unit, io["proprio"].numpy(), rtol=0, atol=1e-15)
    assert (np.abs(unit) == 1).any()  # some are clipped


@pytest.mark.parametrize("name", ["tokens", "tokens2p"])
def test_hidden_states_and_logits_of_the_official_code(policies, io, name):
    policy = policies[name]
    hidden, logits = one_by_one(policy, inputs_of(policy, io))
    assert io[f"{name}_logits"].abs().max() > 20  # the comparison is not between zeros
    assert gap(hidden, io[f"{name}_hidden"]) <= 1e-5
    assert gap(logits, io[f"{name}_logits"]) <= 5e-5


def test_the_language_models_input(policies, io):
    policy = policies["tokens"]
    row = inputs_of(policy, io).rows(torch.tensor([0]))
    with torch.no_grad():
        embeds, valid = policy._embed(policy.projector, policy.language_model.model, policy._features(row), row)
    assert valid.all()
    assert gap(embeds[0], io["tokens_embeds_row0"]) <= 1e-6


@pytest.mark.parametrize("name", ["tokens", "tokens2p"])
def test_greedy_tokens_and_actions_of_the_official_code(policies, io, name):
    policy = policies[name]
    sample = policy.act(inputs_of(policy, io))
    assert torch.equal(sample.token_ids, io[f"{name}_tokens_full"])
    actions = policy.decode_actions(sample.token_ids, sample.token_mask)
    assert actions.shape == (3, 8, 7)
    np.testing.assert_allclose(actions, io[f"{name}_actions"].numpy(), rtol=0, atol=1e-6)
    unit = policy.unit_actions(sample.token_ids)
    np.testing.assert_allclose(policy.action_stats.unnormalise(unit), io[f"{name}_actions"].numpy(), rtol=0, atol=1e-15)


def test_the_official_code_chooses_from_the_whole_vocabulary(policies, io):
    differing = io["tokens_tokens_full"] != io["tokens_tokens"]
    assert differing.sum() == 2 and (io["tokens_tokens_full"][differing] < FIRST).all()
    assert torch.equal(policies["simple"].act(inputs_of(policies["simple"], io)).token_ids, io["tokens_tokens"])


@pytest.mark.parametrize("name", ["simple", "simple2p"])
def test_simplevla_rl_in_a_padded_batch(policies, io, name):
    policy = policies[name]
    inputs = inputs_of(policy, io)
    sample = policy.act(inputs)
    assert torch.equal(sample.token_ids, io[f"{name}_tokens"])
    actions = policy.decode_actions(sample.token_ids, sample.token_mask)
    np.testing.assert_allclose(actions, io[f"{name}_actions"].numpy(), rtol=0, atol=1e-6)
    recorded_logits = io[f"{name}_train_logits"]
    assert gap(one_by_one(policy, inputs)[1], recorded_logits) <= 5e-5
    assert gap(policy.action_logits(inputs, sample.token_ids)[0], recorded_logits) <= 5e-5


def test_rows_of_a_padded_batch_are_the_rows_alone(policies, io):
    """Bit for bit: padding stands where no sum over real positions changes its order, in both passes."""
    policy = policies["simple"]
    inputs, ids = inputs_of(policy, io), io["simple_tokens"]
    rows = [torch.tensor([row]) for row in range(3)]
    together = policy.action_logits(inputs, ids)[0]
    assert torch.equal(together, torch.cat([policy.action_logits(inputs.rows(row), ids[row])[0] for row in rows]))
    sample = policy.act(inputs)
    assert torch.equal(sample.logprobs, torch.cat([policy.act(inputs.rows(row)).logprobs for row in rows]))


def test_rlinf_has_no_stop_token(policies, io):
    policy = policies["rlinf"]
    inputs = OFTInputs(
        prompt_ids=io["rlinf_input_ids"],
        prompt_mask=io["rlinf_attention_mask"].bool(),
        pixel_values=io["pixel_values"],
    )
    sample = policy.act(inputs)
    assert torch.equal(sample.token_ids, io["rlinf_tokens"])
    actions = policy.decode_actions(sample.token_ids, sample.token_mask)
    np.testing.assert_allclose(actions, io["rlinf_actions"].numpy(), rtol=0, atol=1e-6)
    assert gap(one_by_one(policy, inputs)[1], io["rlinf_logits"]) <= 5e-5
    assert gap(sample.logprobs, io["rlinf_logprobs"]) <= 5e-5
    with torch.no_grad():
        _, valid = policy._embed(policy.projector, policy.language_model.model, policy._features(inputs), inputs)
    ours = [position_ids(valid[None, row])[0][valid[row]] for row in range(3)]
    mask = io["rlinf_attention_mask"].bool()
    for row in range(3):
        real = torch.cat([mask[row, :1], torch.ones(16, dtype=torch.bool), mask[row, 1:], torch.ones(56) > 0])
        assert torch.equal(ours[row], io["rlinf_positions"][row][real])


def test_what_must_not_come_out_does_not(policies, io):
    policy = policies["tokens"]
    row = inputs_of(policy, io).rows(torch.tensor([0]))
    model, head = policy.language_model.model, policy.language_model.lm_head.weight[FIRST : FIRST + 256]
    ours = one_by_one(policy, row)[1][0]
    causal, without = (io[f"tokens_row0_{name}_logits"] for name in ("if_causal", "without_stop"))
    assert gap(ours, causal) > 10
    assert gap(ours, without) > 10
    with torch.no_grad():
        embeds, valid = policy._embed(policy.projector, model, policy._features(row), row)
        hidden = last_hidden(model, embeds, valid, 58, causal=True)[:, :56]
    # These recordings are of the very function with one thing wrong: the differences above are those things.
    assert gap(action_logits(hidden, head, 1.0)[0], causal) <= 1.5e-4
    rlinf = policies["rlinf"]
    assert gap(one_by_one(rlinf, inputs_of(rlinf, io).rows(torch.tensor([0])))[1][0], without) <= 1.5e-4


@pytest.mark.parametrize("name", ["simple", "simple2p", "rlinf"])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_acting_scoring_and_values_are_one_pass(policies, io, name, temperature):
    policy = policies[name]
    inputs = inputs_of(policy, io)
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(3, 56, 256)).astype(np.float32))
    sample = policy.act(inputs, temperature=temperature, noise=lambda position: noise[:, position])
    scored = policy.evaluate(inputs, sample.token_ids, sample.token_mask, temperature=temperature)
    assert gap(sample.logprobs, scored.logprobs) <= 1e-5
    key = {"rlinf": "rlinf_logits"}.get(name, f"{name}_train_logits")
    expected = (io[key] / temperature).log_softmax(-1)
    assert gap(sample.logprobs, expected.gather(-1, (sample.token_ids - FIRST)[..., None])[..., 0]) <= 2e-4
    assert gap(scored.entropy, -(expected.exp() * expected).sum(-1)) <= 2e-4


def test_the_value_is_read_at_the_first_action_position(policies, io):
    policy = policies["simple2p"]
    with torch.no_grad():
        for parameter in policy.value_head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        expected = policy.value_head(io["tokens2p_hidden"][:, 0])
        inputs = inputs_of(policy, io)
        assert gap(policy.values(inputs), expected) <= 1e-4
        assert gap(policy.act(inputs).values, expected) <= 1e-4
        token_ids = io["tokens2p_tokens"]
        assert gap(policy.evaluate(inputs, token_ids, torch.ones_like(token_ids) > 0).values, expected) <= 1e-4


@pytest.mark.parametrize("width", [17, 24])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(policies, io, width, left):
    policy = policies["simple2p"]
    rows = [ids[:n].tolist() for ids, n in zip(io["input_ids"], io["prompt_len"], strict=True)]
    filled = [[32000] * (width - len(r)) + r if left else r + [32000] * (width - len(r)) for r in rows]
    inputs = inputs_of(policy, io)
    moved = OFTInputs(
        prompt_ids=torch.tensor(filled),
        prompt_mask=torch.tensor(filled) != 32000,
        pixel_values=inputs.pixel_values,
        state=inputs.state,
    )
    assert torch.equal(policy.act(moved).token_ids, io["simple2p_tokens"])
    ids = io["simple2p_tokens"]
    assert torch.equal(policy.action_logits(moved, ids)[0], policy.action_logits(inputs, ids)[0])


def test_actions_by_minimum_and_maximum(folders, io):
    """ALOHA's rule: 0.5 (a + 1) (max - min + 1e-8) + min."""
    policy = load(folders[False], statistics="bounds")
    stats = policy.action_stats
    assert isinstance(stats, ActionStats)
    low, high = np.array(stats.q01), np.array(stats.q99)
    assert low[0] == -0.8095693498571636 and high[0] == 0.8835972487871987  # of the file
    unit = policy.unit_actions(io["tokens_tokens"])
    expected = 0.5 * (unit + 1) * (high - low + 1e-8) + low
    expected[..., 6] = unit[..., 6]  # unmasked: the gripper
    np.testing.assert_allclose(policy.action_stats.unnormalise(unit), expected, rtol=0, atol=1e-15)


def test_frames_of_two_cameras_go_the_way_of_the_towers(policies):
    policy = policies["simple2p"]
    rng = np.random.default_rng(0)
    scene, wrist = (rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8) for _ in range(2))
    policy.encode_prompts = lambda instructions: (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3) > 0)
    try:
        inputs = policy.encode(
            Observation(
                images={"agentview": scene, "wrist": wrist}, instructions=("a", "b"), state=np.zeros((2, 8), np.float32)
            )
        )
    finally:
        del policy.encode_prompts
    with torch.no_grad():
        both = policy._features(inputs)
        alone = [policy.vision_features(each) for each in inputs.pixel_values.split(6, 1)]
    assert both.shape[1] == 32
    assert gap(both, torch.cat(alone, 1)) <= 1e-6
    assert not torch.equal(both[:, :16], both[:, 16:])
