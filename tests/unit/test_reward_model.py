"""The progress model: conditioning, independence of batch mates, files and their faults."""

import json
import logging

import numpy as np
import pytest
import torch
from small_policy import unseal

from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.rewards.process.small import SmallRewardModel

TEXTS = ["open the door", "close the drawer"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallRewardModel(image_size=32, channels=(8, 16, 16, 16), hidden=16, instructions=TEXTS).eval()


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)


def test_default_size_is_small():
    config = SmallRewardModelConfig()
    texts = [f"task number {i} with its own words w{i} v{i}" for i in range(50)]
    model = SmallRewardModel(image_size=96, channels=config.channels, hidden=config.hidden, instructions=texts)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000


def test_scores_are_sigmoids_of_the_logits_whatever_the_batch(model, frames):
    texts = [TEXTS[i % 2] for i in range(11)]
    with torch.no_grad():
        single = [torch.sigmoid(model.logits(frames[i : i + 1, None], [texts[i]])).item() for i in range(11)]
    for batch_size in (1, 4, 11, 64):
        np.testing.assert_allclose(model.score(frames, texts, batch_size=batch_size), single, atol=1e-6)
    order = np.random.default_rng(1).permutation(11)
    shuffled = model.score(frames[order], [texts[i] for i in order], batch_size=8)
    np.testing.assert_array_equal(shuffled, model.score(frames, texts, batch_size=8)[order])
    assert model.score(frames[:0], []).shape == (0,)


def test_instruction_and_frame_both_matter(model, frames):
    a, b = model.score(frames, [TEXTS[0]] * 11), model.score(frames, [TEXTS[1]] * 11)
    assert np.abs(a - b).min() > 1e-5 and len(set(a.tolist())) == 11


def test_case_and_punctuation_do_not_matter_but_are_reported_once(model, frames, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            other = model.score(frames[:2], ["Open the DOOR."] * 2)
    np.testing.assert_array_equal(other, model.score(frames[:2], [TEXTS[0]] * 2))
    assert len(caplog.records) == 1 and "not fitted on 'Open the DOOR.'" in caplog.text


def test_unknown_words_are_ignored_and_an_unknown_instruction_is_refused(model, frames):
    np.testing.assert_array_equal(
        model.score(frames[:2], ["open the purple door"] * 2), model.score(frames[:2], [TEXTS[0]] * 2)
    )
    with pytest.raises(ConfigError, match=r"'pick up mug'.*Fit it on this task"):
        model.score(frames[:2], ["pick up mug"] * 2)


def test_frames_of_another_size_are_resized(model, frames):
    big = frames.repeat(3, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(model.score(big, [TEXTS[0]] * 11), model.score(frames, [TEXTS[0]] * 11), atol=0.02)


def test_saved_model_scores_the_same(model, frames, tmp_path):
    folder = tmp_path / "deep" / "model"
    model.save_pretrained(folder)
    model.save_pretrained(folder)  # over an earlier one
    loaded = SmallRewardModel.from_pretrained(folder)
    np.testing.assert_array_equal(loaded.score(frames, [TEXTS[1]] * 11), model.score(frames, [TEXTS[1]] * 11))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(key, value):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def poison(folder):
    broken = SmallRewardModel.from_pretrained(folder)
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    broken.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "missing"),
        (lambda folder: (folder / "config.json").unlink(), "missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "damaged"),
        (truncate, "damaged or truncated"),
        (edit("format", "something else"), "is no reachrl-progress-model"),
        (edit("kind", None), "names no `kind`"),
        (edit("hidden", 17), "another architecture"),
        (edit("instructions", ["only this"]), "another architecture"),
        (edit("surprise", 1), "another architecture"),
        (poison, "not finite"),
    ],
)
def test_faulty_files_are_checkpoint_errors(model, tmp_path, damage, match):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    damage(unseal(folder))
    with pytest.raises(CheckpointError, match=match):
        SmallRewardModel.from_pretrained(folder)
