"""The vision-language reward model: one position, two answers, rows apart, adapters alone, and its files."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from small_policy import unseal
from tiny_vlm import KINDS, tokenizer, write_checkpoint
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from reachrl.config.loading import load_config
from reachrl.config.reward_model import VLMRewardModelConfig
from reachrl.errors import CheckpointError, ConfigError
from reachrl.pipeline.rl_stages import run_reward
from reachrl.rewards.process.base import load_reward_model
from reachrl.rewards.process.fit import fit_reward_model, new_reward_model
from reachrl.rewards.process.optimise import optimise
from reachrl.rewards.process.vlm import VLMRewardModel
from reachrl.testing.conformance_reward_model import check_reward_model
from reachrl.types import Start, Trajectory

TEXTS = ["reach", "open the drawer and close it again", "", "push the button"]
SIDE = 56
AREA = {"shortest_edge": (SIDE - 5) ** 2, "longest_edge": (SIDE + 5) ** 2}  # a square of pixels comes out as SIDE


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One checkpoint of each kind; never written to."""
    return {kind: write_checkpoint(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def configuration(folder, **changes):
    options = {"image_size": SIDE, "lora_rank": 4, "lora_alpha": 8.0} | changes
    return VLMRewardModelConfig(checkpoint=folder, **options)


def build(folder, **changes) -> VLMRewardModel:
    return new_reward_model(configuration(folder, **changes), TEXTS, seed=0).eval()


def stir(model):
    """Give the adapters a say; new ones change nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def clips(num, frames=1, size=40):
    return np.random.default_rng(0).integers(0, 256, (num, frames, size, size, 3), dtype=np.uint8)


# --- what is computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_and_padding_kept_in_the_tokenizers_file_change_nothing(folders, kind, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.enable_truncation(20)
    words.enable_padding(length=500)
    words.save(str(folder / "tokenizer.json"))
    with torch.no_grad():
        expected, found = (build(place).logits(clips(len(TEXTS)), TEXTS) for place in (folders[kind], folder))
    assert torch.equal(found, expected)


def chat(kind, text, answer, num_frames=1):
    """The published formats, spelt out."""
    question = f"The task is {text}, is it completed?"
    if kind.startswith("qwen"):
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{'<|vision_start|><|image_pad|><|vision_end|>' * num_frames}{question}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}"
        )
    return f"<|im_start|>User:{'<image>' * num_frames}{question}<end_of_utterance>\nAssistant: {answer}"


def plain_log_odds(kind, folder, clip, text, answers=("1", "0"), vlm=None, chat_of=chat):
    """Log-odds of the two answers by the plain model alone: whole vocabulary, no padding, its own image processor."""
    vlm = vlm or AutoModelForImageTextToText.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    images = [Image.fromarray(frame) for frame in clip]
    ids = words(chat_of(kind, text, answers[0], len(images)), add_special_tokens=False)["input_ids"]
    other = words(chat_of(kind, text, answers[1], len(images)), add_special_tokens=False)["input_ids"]
    assert ids[:-1] == other[:-1] and ids[-1] != other[-1]
    mark = vlm.config.image_token_id
    if kind.startswith("qwen"):
        shown = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(images, size=AREA, return_tensors="pt"))
        frame = [mark] * (SIDE // 28) ** 2
    else:
        size = {"longest_edge": 48}
        options = {"size": size, "max_image_size": size, "do_image_splitting": False, "return_tensors": "pt"}
        shown = dict(SmolVLMImageProcessorPil.from_pretrained(folder)([images], **options))
        around, whole = (words.convert_tokens_to_ids(m) for m in ("<fake_token_around_image>", "<global-img>"))
        frame = [around, whole, *[mark] * 4, around]
    prompt = [token for each in ids[:-1] for token in (frame if each == mark else [each])]
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
    if kind.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == mark).int()
    with torch.no_grad():
        logits = vlm(**inputs, **shown).logits[0, -1]
    return (logits[ids[-1]] - logits[other[-1]]).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_has_the_logits_of_the_plain_model_one_by_one(folders, kind):
    model, images = build(folders[kind]), clips(4)
    with torch.no_grad():
        found = model.logits(images, TEXTS)
    expected = [plain_log_odds(kind, folders[kind], *row) for row in zip(images, TEXTS, strict=True)]
    assert found.dtype == torch.float32 and np.ptp(expected) > 0.05
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_influence_one_another(folders, kind):
    model, images = stir(build(folders[kind])), clips(4)
    with torch.no_grad():
        alone = [model.logits(images[i : i + 1], TEXTS[i : i + 1]).item() for i in range(4)]
        together = model.logits(images, TEXTS)
        swapped = model.logits(images[::-1], TEXTS[::-1])
    np.testing.assert_allclose(together.numpy(), alone, atol=2e-5)
    np.testing.assert_allclose(swapped.numpy()[::-1], alone, atol=2e-5)
    scores = model.score(images[:, 0], TEXTS, batch_size=3)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-np.array(alone))), atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl", "smolvlm"])
def test_clips_are_shown_frame_by_frame_in_their_order(folders, kind):
    model, images = build(folders[kind], num_frames=3), clips(2, frames=3)
    with torch.no_grad():
        found = model.logits(images, TEXTS[:2])
        backwards = model.logits(images[:, ::-1], TEXTS[:2])
    expected = [plain_log_odds(kind, folders[kind], *row) for row in zip(images, TEXTS[:2], strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert (found - backwards).abs().min() > 1e-4


@pytest.mark.parametrize("size", [SIDE, 40, 75])
@pytest.mark.parametrize("kind", ["qwen2_vl", "smolvlm"])
def test_pixels_are_those_of_the_published_processor(folders, kind, size):
    model, images = build(folders[kind]), clips(3, frames=2, size=size)
    found = model.family.frames(images, torch.device("cpu"))
    pictures = [[Image.fromarray(frame) for frame in clip] for clip in images]
    if kind == "qwen2_vl":
        expected = Qwen2VLImageProcessorPil()([p for row in pictures for p in row], size=AREA, return_tensors="pt")
        torch.testing.assert_close(found["image_grid_thw"], expected["image_grid_thw"])
    else:
        size = {"longest_edge": 48}
        options = {"size": size, "max_image_size": size, "do_image_splitting": False}
        expected = SmolVLMImageProcessorPil()(pictures, return_tensors="pt", **options)
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"].float(), atol=2e-6, rtol=0)


def test_the_side_is_whole_tokens(folders):
    for size, side in {28: 28, 41: 28, 43: 56, 69: 56, 71: 84}.items():
        model = build(folders["qwen2_vl"], image_size=size)
        assert model.family.side == side and model.logits(clips(1), ["reach"]).shape == (1,)


def test_the_loss_of_a_fit_is_the_cross_entropy_over_the_two_answers(folders):
    model, images = stir(build(folders["qwen2_vl"])), clips(4)
    target = torch.tensor([1.0, 0.0, 0.25, 1.0])
    logits = model.logits(images, TEXTS)
    pair = torch.tensor(
        [
            [plain_log_odds("qwen2_vl", folders["qwen2_vl"], *row, vlm=model.vlm), 0.0]
            for row in zip(images, TEXTS, strict=True)
        ]
    )
    expected = F.cross_entropy(pair, torch.stack([target, 1 - target], dim=1))
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(logits, target), expected, atol=2e-5, rtol=0)


# --- the chat -------------------------------------------------------------------------------------------


def test_an_answer_takes_the_space_that_the_chat_puts_before_it(folders):
    # After "Assistant:" comes " yes", one token; of " 1" the space is a token of its own, and the digit is scored.
    ends = {}
    for answers in (("yes", "no"), ("1", "0")):
        model = build(folders["smolvlm"], answers=answers)
        words = model.base.tokenizer
        last = model.prompts.batch(["reach"])["input_ids"][0, -1].item()
        ends[answers] = (
            words.convert_ids_to_tokens(last),
            *words.convert_ids_to_tokens(list(model.prompts.answer_ids)),
        )
        with torch.no_grad():
            found = model.logits(clips(1), ["reach"]).item()
        assert found == pytest.approx(
            plain_log_odds("smolvlm", folders["smolvlm"], clips(1)[0], "reach", answers), abs=2e-5
        )
    assert ends == {("yes", "no"): (":", "Ġyes", "Ġno"), ("1", "0"): ("Ġ", "1", "0")}


def curt(kind, text, answer, num_frames):
    return f"{'<|image_pad|>' * num_frames}The task is {text}, is it completed?>{answer}"


CURT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% if m['role'] == 'user' and not loop.last %}>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_the_folders_own_chat_template_goes_first(folders, tmp_path, file):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "own")
    (folder / file).write_text(CURT if file.endswith("jinja") else json.dumps({"chat_template": CURT}))
    model, images = build(folder), clips(1)
    expected = plain_log_odds("qwen2_vl", folder, images[0], "reach", chat_of=curt)
    with torch.no_grad():
        assert model.logits(images, ["reach"]).item() == pytest.approx(expected, abs=2e-5)
        model.save_pretrained(tmp_path / "saved")
        assert load_reward_model(tmp_path / "saved").logits(images, ["reach"]).item() == pytest.approx(
            expected, abs=2e-5
        )


@pytest.mark.parametrize(
    ("template", "match"),
    [("{{ messages[0]['content'][1]['text'] }}", r"writes 0 frames"), ("{{ raise_exception('no!') }}", "no!")],
)
def test_a_chat_template_that_cannot_show_frames_is_told(folders, tmp_path, template, match):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "other")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=match):
        build(folder)


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        (("done", "0"), r"'done' is 4 tokens .*\['d', 'o', 'n', 'e'\]"),
        (("1", "10"), r"'10' is 2 tokens"),
        (("1", ""), r"'' is 0 tokens"),
        (("yes", "yes"), r"cannot be told apart"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2_vl", "smolvlm"])
def test_answers_must_be_two_tokens(folders, kind, answers, match):
    with pytest.raises(ConfigError, match=match):
        build(folders[kind], answers=answers)


def test_an_instruction_may_be_new_but_not_hold_a_frame(folders):
    model = build(folders["qwen2_vl"])
    assert 0 < model.score(clips(1)[:, 0], ["an instruction of which no fit has heard: \u00fc"], batch_size=1)[0] < 1
    with pytest.raises(ConfigError, match=r"'go <\|image_pad\|>' holds"):
        model.score(clips(1)[:, 0], ["go <|image_pad|>"], batch_size=1)


# --- fitting --------------------------------------------------------------------------------------------


def trajectory(index, *, success=True, shade=0):
    """Six frames that get brighter towards the end of a success and stay dark in a failure."""
    levels = np.linspace(0, 255, 6) if success else np.zeros(6)
    images = np.broadcast_to(np.clip(levels + shade, 0, 255)[:, None, None, None], (6, 32, 32, 3)).astype(np.uint8)
    return Trajectory(
        start=Start("reach", "train", index),
        instruction="reach the goal",
        images={"camera": images},
        actions=np.full((5, 4), index, np.float32),
        ee_state=np.random.default_rng(index).random((6, 4)).astype(np.float32),
        success=success,
        source="expert" if success else "policy",
    )


def black_and_white():
    data = [trajectory(i) for i in range(4)]
    labels = [np.array([0, np.nan, np.nan, np.nan, np.nan, 1], np.float32)] * 4
    return data, labels


@pytest.mark.parametrize("kind", ["qwen2_vl", "smolvlm"])
def test_adapters_learn_black_from_white_and_nothing_else_changes(folders, kind):
    data, labels = black_and_white()
    model = build(folders[kind], lr=1e-2, batch_size=4, log_every=10, shift_pixels=0)
    before = {name: tensor.clone() for name, tensor in model.vlm.state_dict().items()}
    losses = []
    optimise(
        model, data, labels, fit_rows=[0, 1, 2], test_rows=[3], seed=0, steps=30,
        config=configuration(folders[kind], lr=1e-2, batch_size=4, log_every=10, shift_pixels=0),
        on_step=lambda step, metrics: losses.append(metrics["train_loss"]),
    )  # fmt: skip
    dark, bright = model.score(data[3].frames[[0, -1]], ["reach the goal"] * 2, batch_size=2)
    assert losses[-1] < 0.5 * losses[0] and dark < 0.2 and bright > 0.8
    changed = {name for name, tensor in model.vlm.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    parts = {name.split(".layers.")[0] for name in before if ".lora_" in name}
    assert parts == {model.family.language_model}
    # all seven maps of both layers, two matrices each; none in the tower, whose maps may bear the same names
    assert sum(".lora_" in name for name in before) == 2 * 7 * 2


def test_rank_0_trains_the_language_model_and_leaves_the_tower(folders):
    model = build(folders["qwen2_5_vl"], lora_rank=0)
    trained = {name for name, parameter in model.vlm.named_parameters() if parameter.requires_grad}
    assert "lm_head.weight" in trained and "model.language_model.layers.0.mlp.up_proj.weight" in trained
    assert not any("visual" in name for name in trained)
    model.logits(clips(2), TEXTS[:2]).sum().backward()
    assert model.vlm.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_dozen_trajectories_are_fitted_measured_and_read_back(folders, tmp_path):
    data = [trajectory(i) for i in range(8)] + [trajectory(i, success=False, shade=i) for i in range(8, 12)]
    config = configuration(folders["qwen2_vl"], steps=8, batch_size=4, log_every=4, lr=5e-3, num_frames=2)
    reports = []
    result = fit_reward_model(data, config, seed=0, folder=tmp_path, on_step=lambda *args: reports.append(args))
    assert [step for step, _ in reports] == [4, 8] and np.isfinite(result.quality["heldout"]["loss"])
    again = fit_reward_model(data, config, seed=0, folder=tmp_path)
    assert again.skipped
    images = np.stack([data[0].frames[:2], data[9].frames[:2]])
    texts = ["reach the goal", "reach"]
    np.testing.assert_array_equal(
        again.model.score(images, texts, batch_size=2), result.model.score(images, texts, batch_size=2)
    )
    refit = config.model_copy(update={"refit_steps": 4})
    fitted = again.model.score(images, texts, batch_size=2)
    later = fit_reward_model(data, refit, seed=1, folder=tmp_path / "refit", start_from=copy.deepcopy(again.model))
    np.testing.assert_array_equal(again.model.score(images, texts, batch_size=2), fitted)  # it is still in use
    assert not np.array_equal(
        later.model.score(images, texts, batch_size=2), result.model.score(images, texts, batch_size=2)
    )


def test_half_precision_below_single_precision_adapters(tmp_path):
    model = stir(build(write_checkpoint(tmp_path / "half", "qwen2_vl", dtype=torch.bfloat16)))
    kinds = {parameter.dtype for parameter in model._adapter_tensors().values()}
    assert kinds == {torch.float32} and model.vlm.dtype == torch.bfloat16
    logits = model.logits(clips(2), TEXTS[:2])
    logits.sum().backward()
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert build(tmp_path / "half", lora_rank=0).vlm.dtype == torch.float32


# --- files ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(folders, tmp_path):
    """A saved model on a base of its own, both free to be damaged."""
    base = shutil.copytree(folders["smolvlm"], tmp_path / "base")
    model = stir(build(base, num_frames=2, frame_stride=3, answers=("yes", "no")))
    model.shift_logits(0.5)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = model.logits(clips(2, 2), TEXTS[:2])
    return SimpleNamespace(base=base, folder=tmp_path / "model", vlm=tmp_path / "model" / "vlm", logits=logits)


def test_a_saved_model_scores_the_same(saved):
    again = load_reward_model(saved.folder)
    assert (again.num_frames, again.frame_stride, again.shift) == (2, 3, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(again.logits(clips(2, 2), TEXTS[:2]), saved.logits, atol=0, rtol=0)
    assert all(p.requires_grad for n, p in again.named_parameters() if ".lora_" in n)
    names = sorted(path.name for path in saved.vlm.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
                     "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


def test_the_adapters_are_peft_files_that_others_can_read(saved):
    vlm = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(saved.base), saved.vlm).eval()
    for clip, text, logit in zip(clips(2, 2), TEXTS, saved.logits.tolist(), strict=False):
        expected = plain_log_odds("smolvlm", saved.base, clip, text, ("yes", "no"), vlm=vlm)
        assert logit == pytest.approx(expected + 0.5, abs=2e-5)


def test_a_model_trained_as_a_whole_is_saved_as_a_whole(folders, tmp_path):
    model = build(folders["qwen2_vl"], lora_rank=0)
    with torch.no_grad():
        model.vlm.model.language_model.norm.weight.mul_(1.5)
        expected = model.logits(clips(2), TEXTS[:2])
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    with torch.no_grad():
        torch.testing.assert_close(load_reward_model(tmp_path / "moved").logits(clips(2), TEXTS[:2]), expected)
    plain = plain_log_odds("qwen2_vl", tmp_path / "moved" / "vlm", clips(2)[0], TEXTS[0])
    assert plain == pytest.approx(expected[0].item(), abs=2e-5)


def test_shifts_add_up(folders):
    model = build(folders["qwen2_vl"])
    with torch.no_grad():
        before = model.logits(clips(1), ["reach"])
        model.shift_logits(0.75)
        model.shift_logits(-0.25)
        torch.testing.assert_close(model.logits(clips(1), ["reach"]), before + 0.5)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_base(saved):
    write_checkpoint(saved.base, "smolvlm", seed=7)


def other_words(saved):
    path = saved.vlm / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġyes"], vocabulary["Ġno"] = vocabulary["Ġno"], vocabulary["Ġyes"]
    path.write_text(json.dumps(content))


def no_words(saved):
    tokenizer(["<|im_start|>", "<end_of_utterance>"]).save_pretrained(saved.vlm)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(saved):
    model = load_reward_model(saved.folder)
    next(iter(model._adapter_tensors().values())).data.fill_(float("nan"))
    model.save_pretrained(saved.folder)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (other_base, "other weights than"),
        (lambda saved: shutil.rmtree(saved.base), "base, below the adapters.*is not there.*base_model_name_or_path"),
        (other_words, r"'yes' was fitted as token \d+, but the tokenizer.*holds it as token"),
        (no_words, "does not read <image> as token"),
        (lambda saved: rewrite(saved.folder / "config.json", answers=["done", "no"]), "'done' is 4 tokens"),
        (lambda saved: rewrite(saved.folder / "config.json", answers=["1", "0"]), "'1' was fitted as token"),
        (lambda saved: rewrite(saved.folder / "config.json", shift="much"), "damaged"),
        (lambda saved: rewrite(saved.folder / "config.json", format="other"), "is no reachrl-vlm-reward-1"),
        (lambda saved: rewrite(saved.vlm / "adapter_config.json", r=5), "another architecture than their base"),
        (lambda saved: rewrite(saved.vlm / "adapter_config.json", base_model_name_or_path=None), "no adapters on a"),
        (lambda saved: (saved.vlm / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda saved: (saved.vlm / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda saved: cut(saved.vlm / "adapter_model.safetensors"), "damaged or truncated"),
        (lambda saved: (saved.vlm / "tokenizer.json").unlink(), "cannot be read"),
        (lambda saved: (saved.vlm / "preprocessor_config.json").unlink(), "cannot be read"),
        (poison, "not finite"),
    ],
)
def test_faulty_files_are_checkpoint_errors(saved, damage, match):
    unseal(saved.folder)
    damage(saved)
    with pytest.raises(CheckpointError, match=match):
        load_reward_model(saved.folder)


# --- checkpoints that cannot be fitted --------------------------------------------------------------------


def test_a_checkpoint_must_be_named_and_be_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"`reward_model.checkpoint` is not set.*Qwen2-VL.*hf download"):
        build(None)
    with pytest.raises(CheckpointError, match=r"nowhere does not exist.*Qwen2-VL"):
        build(tmp_path / "nowhere")


def test_another_family_is_told_which_are_supported(folders, tmp_path):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "llava")
    rewrite(folder / "config.json", model_type="llava")
    with pytest.raises(ConfigError, match=r"'llava'.*qwen2_vl.*qwen2_5_vl.*smolvlm.*kind 'transformers'"):
        build(folder)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def without_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing or damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is missing or damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be read"),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be read"),
        (pickled, "weights are pickles"),
        (without_a_layer, r"lacks \d+ weights"),
    ],
)
def test_faulty_checkpoints_are_told(folders, tmp_path, damage, match):
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "faulty")
    damage(folder)
    with pytest.raises(CheckpointError, match=match):
        build(folder)


def test_the_reward_stage_asks_for_the_checkpoint_before_it_plays_anything(tmp_path):
    config = load_config("toy", ["reward_model.kind=vlm"])
    nothing = SimpleNamespace()  # neither a run folder nor a display is asked for anything
    with pytest.raises(ConfigError, match=r"`reward_model\.checkpoint` is not set"):
        run_reward(config, nothing, nothing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_keeps_the_contract_of_a_reward_model(folders, tmp_path, kind):
    config = VLMRewardModelConfig(checkpoint=folders[kind], image_size=28)
    model = VLMRewardModel.for_fit(config, ["open it"]).eval()
    check_reward_model(model, ["open it", "close the top drawer slowly"], tmp_path / "model", image_size=28)
