"""Reward models that `transformers` brings: log-odds from any logits, with or without a text, files, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_policy import unseal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import ModelOutput

from reachrl.config.reward_model import TransformersRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError, MissingExtra
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.fit import fit_reward_model, new_reward_model
from reachrl.rewards.process.transformers_model import TransformersRewardModel
from reachrl.testing.conformance_reward_model import check_reward_model
from reachrl.types import Start, Trajectory

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "open", "the", "door", "reach", "is", "done"]


class Headless(ViTForImageClassification):
    """Gives what it saw, but no logits."""

    def forward(self, **inputs):
        return self.vit(**inputs)


class NeedsMore(ViTImageProcessorPil):
    """Needs a package."""

    @classmethod
    def from_pretrained(cls, folder, **options):
        raise ImportError("NeedsMore requires the Torchvision library")


class EveryPatch(ViTForImageClassification):
    """Gives each patch a logit."""

    def forward(self, **inputs):
        return ModelOutput(logits=torch.zeros(len(inputs["pixel_values"]), 4, 2))


class OneLogit(ViTForImageClassification):
    """Gives logits without a dimension for classes."""

    def forward(self, **inputs):
        return ModelOutput(logits=super().forward(**inputs).logits[:, 0])


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """An image classifier of three classes."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3))
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vilt(tmp_path_factory):
    """A model of frames and text with one logit."""
    folder = tmp_path_factory.mktemp("vilt")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    config = ViltConfig(**SMALL, vocab_size=len(WORDS), image_size=32, patch_size=8, num_labels=1)
    ViltForQuestionAnswering(config).save_pretrained(folder)
    frames = ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    frames.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
    return folder


def build(folder, **changes):
    options = {"checkpoint": folder, "prompt": ""} | changes
    return new_reward_model(TransformersRewardModelConfig(**options), ["reach"], seed=0).eval()


def build_vilt(folder, **changes):
    return build(
        folder,
        model_class="transformers:ViltForQuestionAnswering",
        processor_class="transformers:ViltProcessor",
        prompt="is the {instruction} done",
        **changes,
    )


def frames(num, size=32):
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


# --- scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", [0, 1, 2])
def test_one_class_against_all_others(vit, positive):
    model = build(vit, positive=positive)
    pixels = ViTImageProcessorPil.from_pretrained(vit)([Image.fromarray(f) for f in frames(5)], return_tensors="pt")
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(vit)(**pixels).logits.softmax(-1)[:, positive]
    found = model.score(frames(5), ["whatever"] * 5, batch_size=2)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert np.ptp(found) > 1e-4


def test_a_single_logit_is_the_log_odds(vit):
    model = build(vit, model_class="test_reward_transformers:OneLogit")
    three = build(vit)
    with torch.no_grad():
        found = model.logits(frames(3)[:, None], [""] * 3)
        pixels = three.processor([Image.fromarray(f) for f in frames(3)], return_tensors="pt")
        torch.testing.assert_close(found, three.model(**pixels).logits[:, 0])


def test_text_and_frames_together_whatever_the_batch(vilt):
    model = build_vilt(vilt)
    texts = ["open the door", "reach", "open", "reach"]
    with torch.no_grad():
        found = model.logits(frames(4)[:, None], texts)
        plain, processor = ViltForQuestionAnswering.from_pretrained(vilt).eval(), ViltProcessor.from_pretrained(vilt)
        expected = [
            plain(**processor(Image.fromarray(frame), f"is the {text} done", return_tensors="pt")).logits.item()
            for frame, text in zip(frames(4), texts, strict=True)
        ]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    same = np.repeat(frames(1), 2, axis=0)
    a, b = model.score(same, ["reach", "open"], batch_size=2)
    assert abs(a - b) > 1e-6


def test_truncation_and_padding_kept_in_the_tokenizers_file_change_nothing(vilt, tmp_path):
    """A processor takes `max_length` and the like for defaults when it finds them in a tokenizer's files."""
    folder = shutil.copytree(vilt, tmp_path / "vilt")
    words = AutoTokenizer.from_pretrained(folder)
    words._tokenizer.enable_truncation(3)
    words._tokenizer.enable_padding(length=9)
    words.init_kwargs |= {"truncation": True, "max_length": 3, "padding": "max_length"}
    words.save_pretrained(folder)
    texts = ["open the door", "reach", "open", "reach"]
    plain, model = build_vilt(vilt), build_vilt(folder)
    found, expected = model._inputs(frames(4), texts), plain._inputs(frames(4), texts)
    assert found.keys() == expected.keys() and found["input_ids"].shape == (4, 8)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    with torch.no_grad():  # the model shuffles its patches, so that sums differ by rounding
        logits = [each.logits(frames(4)[:, None], texts) for each in (model, plain)]
    torch.testing.assert_close(*logits)


def test_the_contract_of_reward_models_is_kept(vilt, tmp_path):
    check_reward_model(build_vilt(vilt), ["open the door", "reach"], tmp_path / "model")


# --- fits and files ---------------------------------------------------------------------------------------


def trajectory(index, *, success):
    images = np.full((6, 32, 32, 3), 250 if success else 5, np.uint8)
    return Trajectory(
        start=Start("reach", "train", index),
        instruction="reach",
        images={"camera": images + np.uint8(index % 5)},
        actions=np.zeros((5, 4), np.float32),
        ee_state=np.random.default_rng(index).random((6, 4)).astype(np.float32),
        success=success,
        source="policy",
    )


def test_used_as_it_is_and_fitted(vit, tmp_path):
    data = [trajectory(i, success=i % 2 == 0) for i in range(12)]
    as_it_is = TransformersRewardModelConfig(checkpoint=vit, prompt="", positive=1)
    result = fit_reward_model(data, as_it_is, seed=0, folder=tmp_path / "as_it_is")
    np.testing.assert_array_equal(
        result.model.score(frames(3), [""] * 3, batch_size=3),
        build(vit, positive=1).score(frames(3), [""] * 3, batch_size=3),
    )
    reports = []
    options = {"steps": 30, "lr": 3e-3, "batch_size": 8, "log_every": 10, "shift_pixels": 0, "label": "keyframe"}
    fitted = fit_reward_model(
        data,
        as_it_is.model_copy(update=options),
        seed=0,
        folder=tmp_path / "fitted",
        on_step=lambda *r: reports.append(r),
    )
    assert fitted.quality["heldout"]["auc"] == 1.0
    assert reports[-1][1]["heldout_loss"] < reports[0][1]["heldout_loss"]
    again = load_reward_model(tmp_path / "fitted" / "model")
    np.testing.assert_array_equal(
        again.score(frames(3), [""] * 3, batch_size=3), fitted.model.score(frames(3), [""] * 3, batch_size=3)
    )


def test_a_saved_model_scores_the_same_and_reads_the_same_text(vilt, tmp_path):
    model = build_vilt(vilt)
    model.shift_logits(0.25)
    model.save_pretrained(tmp_path / "model")
    again = load_reward_model(tmp_path / "model")
    with torch.no_grad():
        found, expected = (m.logits(frames(2)[:, None], ["reach", "open the door"]) for m in (again, model))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert again.shift == 0.25 and again.prompt == "is the {instruction} done"


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder):
    model = TransformersRewardModel.from_pretrained(folder)
    next(model.model.parameters()).data.fill_(float("inf"))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "checkpoint" / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: cut(folder / "checkpoint" / "model.safetensors"), "cannot be read"),
        (lambda folder: (folder / "checkpoint" / "preprocessor_config.json").unlink(), "cannot be read"),
        (lambda folder: shutil.rmtree(folder / "checkpoint"), "cannot be read"),
        (lambda folder: rewrite(folder / "config.json", format="x"), "is no reachrl-transformers-reward-1"),
        (lambda folder: rewrite(folder / "config.json", positive="one"), "damaged"),
        (poison, "not finite"),
    ],
)
def test_faulty_files_are_checkpoint_errors(vit, tmp_path, damage, match):
    build(vit).save_pretrained(tmp_path / "model")
    damage(unseal(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=match):
        load_reward_model(tmp_path / "model")


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"checkpoint": None}, ConfigError, r"`reward_model.checkpoint` is not set"),
        ({"model_class": "ViTModel"}, ConfigError, r"model_class is 'ViTModel', expected an import string"),
        ({"model_class": "transformerz:ViTModel"}, ConfigError, "no module 'transformerz'"),
        ({"model_class": "transformers.nothing:ViTModel"}, ConfigError, "no module 'transformers.nothing'"),
        ({"model_class": "transformers:ViTModle"}, ConfigError, "has no 'ViTModle'"),
        ({"processor_class": "json:dumps"}, ConfigError, "processor_class is 'json:dumps', which has no"),
        ({"model_class": "test_reward_transformers:Headless"}, ConfigError, "last_hidden_state.*but no `logits`"),
        ({"model_class": "test_reward_transformers:EveryPatch"}, ConfigError, r"shape \[1, 4, 2\] for 1 frames"),
        ({"processor_class": "test_reward_transformers:NeedsMore"}, MissingExtra, "requires the Torchvision library"),
        ({"positive": 3}, ConfigError, "positive is 3, but the model has 3 logits"),
        ({"num_frames": 2}, ConfigError, "num_frames is 2.*one frame at a time"),
        ({"prompt": "{instruction}"}, ConfigError, "does not take frames and text.*Set `reward_model.prompt` to ''"),
        ({"processor_class": "transformers:AutoTokenizer"}, CheckpointError, "cannot be read"),
    ],
)
def test_a_mistake_is_told_before_the_fit(vit, changes, error, match):
    with pytest.raises(error, match=match):
        build(vit, **changes)


def test_a_model_that_reads_needs_a_text(vilt):
    with pytest.raises(
        ConfigError,
        match="ViltForQuestionAnswering does not take what ViltProcessor.*frames without a text.*reward_model.prompt",
    ):
        build(vilt, model_class="transformers:ViltForQuestionAnswering", processor_class="transformers:ViltProcessor")


def test_a_head_that_is_not_in_the_checkpoint_may_be_fitted_but_not_used(vit, tmp_path, caplog):
    folder = tmp_path / "headless"
    shutil.copytree(vit, folder)
    ViTModel.from_pretrained(vit, add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"lacks 2 weights, such as classifier.bias"):
        build(folder)
    assert build(folder, steps=1).score(frames(1), [""], batch_size=1).shape == (1,)
    assert "begin as random numbers" in caplog.text
