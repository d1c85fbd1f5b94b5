"""`policy.predict`: the action for one moment of a user's own loop."""

import numpy as np
import pytest
import torch
from official_folder import HEADS, read, write_official
from PIL import Image
from small_policy import small

import reachrl
from reachrl.errors import ConfigError
from reachrl.policies.openvla import storage
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.testing.policies import TablePolicy, TablePolicyConfig

FRAME = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return OpenVLAPolicy(small())


def test_an_official_checkpoint_of_the_hub_moves_the_robot_as_the_official_code(tmp_path, monkeypatch):
    folder = write_official(tmp_path / "downloaded")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    described = storage.official_config

    def with_heads(folder, heads=None, dataset=None, **options):  # which released sizes do not need
        return described(folder, heads or HEADS, dataset, **options)

    monkeypatch.setattr(storage, "official_config", with_heads)
    policy = reachrl.load_policy("owner/tiny", dataset="tiny_b", device="cpu")
    recorded = read("io")
    row = OpenVLAInputs(
        prompt_ids=torch.from_numpy(recorded["input_ids"][:1]),
        prompt_mask=torch.from_numpy(recorded["attention_mask"][:1]) > 0,
        pixel_values=torch.from_numpy(recorded["pixel_values"][:1]),
    )
    monkeypatch.setattr(policy, "encode", lambda observation: row)
    actions = policy.predict(images=FRAME, instruction="as recorded")
    assert actions.dtype == np.float32 and actions.shape == (1, 7)
    np.testing.assert_allclose(actions[0], recorded["actions_noempty_tiny_b"], rtol=0, atol=1e-7)


def test_a_frame_of_another_size_is_resized_as_in_training(policy, monkeypatch):
    seen = []
    act = policy.act
    monkeypatch.setattr(policy, "act", lambda inputs, **options: (seen.append(inputs), act(inputs, **options))[1])
    policy.predict(images={"front": FRAME}, instruction="push")
    policy.predict(
        images=np.asarray(Image.fromarray(FRAME).resize((16, 16), Image.Resampling.BICUBIC)), instruction="push"
    )
    expected = np.asarray(Image.fromarray(FRAME).resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255 * 2 - 1
    for inputs in seen:
        np.testing.assert_allclose(inputs.pixel_values[0].permute(1, 2, 0), expected, atol=1e-6)


def test_sampled_actions_follow_the_temperature():
    table = TablePolicy(TablePolicyConfig(num_action_tokens=1))
    with torch.no_grad():
        table.logits.fill_(-1e9)
        table.logits[:, :, 200], table.logits[:, :, 10] = np.log(3.0), 0.0
    high, low = np.float32(200 / 127.5 - 1), np.float32(10 / 127.5 - 1)
    frame = np.zeros((1, 1, 3), np.uint8)
    assert table.predict(images=frame, instruction="x") == high  # greedy

    def draw(count):
        rng = np.random.default_rng(5)
        options = {"images": frame, "instruction": "x", "temperature": 2.0, "generator": rng}
        return [table.predict(**options).item() for _ in range(count)]

    drawn = draw(2000)
    assert set(drawn) == {high, low}
    expected = 3**0.5 / (1 + 3**0.5)  # softmax of (log 3, 0) / 2
    assert abs(np.mean(np.array(drawn) == high) - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert draw(20) == drawn[:20]


class TwoEyed(TablePolicy):
    num_cameras, state_size = 2, 3

    def encode(self, observation):
        self.seen = observation
        return super().encode(observation)


def test_several_samples_are_averaged(policy):
    asked = {"images": FRAME, "instruction": "push", "temperature": 1.0}
    averaged = policy.predict(**asked, samples=3, generator=np.random.default_rng(5))
    drawn, noise = [], np.random.default_rng(5)
    blocks = [noise.gumbel(size=(3, policy.num_choices)) for _ in range(policy.num_action_tokens)]

    class Row(np.random.Generator):  # gives one sample the noise of its row
        def __init__(self, row):
            super().__init__(np.random.PCG64(0))
            self.values = (block[row : row + 1] for block in blocks)

        def gumbel(self, size):
            return next(self.values)

    for row in range(3):
        drawn.append(policy.predict(**asked, generator=Row(row)))
    np.testing.assert_allclose(averaged, np.mean(drawn, axis=0), rtol=1e-5, atol=1e-6)
    assert np.abs(averaged - drawn[0]).max() > 1e-3


def test_a_policy_with_two_cameras_and_a_state_gets_them_in_order():
    policy, wrist = TwoEyed(TablePolicyConfig(num_contexts=256)), 255 - FRAME[:7]
    policy.predict(images={"front": FRAME, "wrist": wrist}, instruction="x", state=np.array([1, 2, 0.1]))
    assert list(policy.seen.images) == ["front", "wrist"] and policy.seen.state.dtype == np.float32
    np.testing.assert_array_equal(policy.seen.images["wrist"], wrist[None])
    np.testing.assert_array_equal(policy.seen.state, np.array([[1, 2, 0.1]], np.float32))
    for images, state, message in (
        (FRAME, np.zeros(3), r"sees 2 cameras, given are 1 \(a single frame\); give a dict with the 2 frames"),
        ({"front": FRAME}, np.zeros(3), r"sees 2 cameras, given are 1 \(front\)"),
        ({"front": FRAME, "wrist": FRAME}, None, r"state: this policy takes 3 finite numbers.*given is nothing"),
        ({"front": FRAME, "wrist": FRAME}, np.zeros(4), r"f32\[3\]; given is float64\[4\]"),
        ({"front": FRAME, "wrist": FRAME}, np.array([0, np.nan, 0]), r"3 finite numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            policy.predict(images=images, instruction="x", state=state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": FRAME / 255}, r"images: dtype float64, expected uint8.*multiply by 255"),
        ({"images": FRAME.astype(np.int64)}, r"images: dtype int64, expected uint8"),
        ({"images": FRAME[None]}, r"shape \[1, 20, 20, 3\].*take images\[0\]"),
        ({"images": FRAME.transpose(2, 0, 1)}, r"shape \[3, 20, 20\].*channels come last"),
        ({"images": np.zeros((4, 4, 4), np.uint8)}, r"leave the fourth channel out"),
        ({"images": FRAME[:0]}, r"shape \[0, 20, 3\]"),
        ({"images": (FRAME > 127).astype(np.uint8)}, r"no number exceeds 1"),
        ({"images": {"front": FRAME, "wrist": FRAME}}, r"sees one camera, given are 2 \(front, wrist\)"),
        ({"images": {}}, r"given are 0 \(none\)"),
        ({"images": {"front": FRAME[None]}}, r"images\['front'\]: shape"),
        ({"instruction": " "}, r"instruction = ' '"),
        ({"instruction": ""}, r"instruction = ''"),
        ({"state": np.zeros(8)}, r"state: this policy takes frames and an instruction only"),
        ({"temperature": -1.0}, r"temperature = -1.0"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"samples": 4}, r"samples = 4 at temperature 0.0: expected 1"),
        ({"samples": 0, "temperature": 1.0}, r"samples = 0 at temperature 1.0"),
    ],
)
def test_wrong_arguments_are_named(policy, arguments, message):
    with pytest.raises(ConfigError, match=message):
        policy.predict(**({"images": FRAME, "instruction": "push"} | arguments))


def test_what_a_policy_was_never_trained_on_is_warned_of_once_and_remembered(tmp_path, caplog):
    trained = OpenVLAPolicy(small())
    trained.predict(images=FRAME[:7], instruction="anything")  # unknown: nothing to say
    trained.note_training(["Open the drawer", "close the drawer"], {"camera": FRAME[None]})
    trained.save_pretrained(tmp_path / "policy")
    policy = reachrl.load_policy(tmp_path / "policy", device="cpu")
    policy.predict(images=FRAME, instruction="open the drawer")  # asked in the same words: prompts are lower case
    assert caplog.messages == []
    for _ in range(2):
        policy.predict(images=FRAME, instruction="open the drawers")
        policy.predict(images=FRAME[:7], instruction="close the drawer")
    words, frame = caplog.messages
    assert "never trained on the instruction 'open the drawers'; the nearest it knows is 'Open the drawer'" in words
    assert "frames of 7 x 20 pixels, the policy was trained on 20 x 20" in frame


@pytest.mark.parametrize(
    ("looked_at", "cameras", "exchanged"),
    [
        (1, "scene wrist", False),
        (1, "scene", False),
        (1, "other", False),  # it may be the scene by another name
        (1, "wrist scene", True),
        (1, "wrist", True),
        (2, "scene wrist", False),
        (2, "scene other", False),
        (2, "other scene", True),
        (2, "wrist scene", True),
    ],
)
def test_cameras_in_another_order_than_in_training_are_warned_of_once(tmp_path, caplog, looked_at, cameras, exchanged):
    trained = OpenVLAPolicy(small())
    trained.note_training(["push"], {"scene": FRAME[None], "wrist": FRAME[None]})
    trained.note_training(["push"], {"wrist": FRAME[None], "scene": FRAME[None]})  # the first order stays
    trained.save_pretrained(tmp_path / "policy")
    policy = reachrl.load_policy(tmp_path / "policy", device="cpu")
    policy.num_cameras = looked_at
    for _ in range(2):
        policy.warn_of_unfamiliar(["push"], dict.fromkeys(cameras.split(), FRAME[None]))
    assert len(caplog.messages) == exchanged
    if exchanged:
        names = [", ".join(names.split()[:looked_at]) for names in (cameras, "scene wrist")]
        assert "looks at the cameras {} in this order, it was trained on {}:".format(*names) in caplog.messages[0]


def test_a_policy_that_pushes_at_its_limits_is_warned_of_after_30_decisions(monkeypatch, caplog):
    policy = OpenVLAPolicy(small())
    policy.set_action_stats(
        np.array([-2.0, -1, 0.5, 0]), np.array([4.0, 1, 0.5, 1]), np.array([True, True, True, False])
    )
    # Dimension 0 almost at its upper end, 1 in the middle, 2 cannot vary, 3 has no statistics.
    monkeypatch.setattr(policy, "decode_actions", lambda ids, mask: np.array([[[3.9, 0.0, 0.5, 1.0]]], np.float32))
    for count in range(40):
        policy.predict(images=FRAME, instruction="push")
        assert len(caplog.messages) == (count >= 29), count
    assert (
        "over 30 decisions the mean action lies at its limit in dimension 0 (mean 3.9, limits -2 and 4)"
        in (caplog.messages[0])
    )
    assert caplog.messages[0].endswith("A policy that has hardly been trained does so too.")
    monkeypatch.setattr(policy, "decode_actions", lambda ids, mask: np.array([[[3.8, 0.0, 0.5, 1.0]]], np.float32))
    for _ in range(40):  # 3.3 % from the end
        policy.predict(images=FRAME, instruction="push")
    assert len(caplog.messages) == 1
