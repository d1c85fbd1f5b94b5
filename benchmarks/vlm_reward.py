"""How fast a vision-language reward model scores and learns, against generating the answer and reading its text.

    python benchmarks/vlm_reward.py              # the shape of Qwen2-VL-2B in bfloat16, on a GPU
    python benchmarks/vlm_reward.py --size tiny  # anywhere

The weights are random. Ways to a score, in turns in one process on the same frames:

- ours: pixels on the model's device, one position, the two answers' rows of the output layer;
- generate: the same inputs, `generate(max_new_tokens=2)`, and the text is parsed;
- published: the same with the image processor that `transformers` brings.

Ways to learn: ours, and the usual fine-tuning, whose loss takes the whole vocabulary at every position.

On a CPU seconds are those of the processor, which other programs on the machine do not add to.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reachrl.config.reward_model import VLMRewardModelConfig
from reachrl.rewards.process.vlm import VLMRewardModel

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TASKS = ["open the drawer", "push the button", "close the window and then open the door", "reach"]
SIZES = {
    "tiny": {
        "text": {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "mrope": [2, 3, 3]},
        "vision": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4},
        "image_size": 84,
    },
    "2b": {
        "text": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12, "num_key_value_heads": 2, "mrope": [16, 24, 24]},
        "vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        "image_size": 224,
    },
}  # fmt: skip


def write_checkpoint(folder: Path, size: str, device: torch.device) -> None:
    """Random weights; a tokenizer that has learnt these few sentences, so that prompts are as long as real ones."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, special_tokens=MARKS)
    sentences = [f"The task is {task}, is it completed?" for task in TASKS]
    raw.train_from_iterator([*sentences, "system\nYou are a helpful assistant.", "user\n", "assistant\n"], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=MARKS[0], eos_token="<|im_end|>")
    words.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    text = dict(SIZES[size]["text"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope")}
    ids = {name: words.vocab[f"<|{name}|>"] for name in ("im_end", "image_pad", "vision_start")}
    text |= {"bos_token_id": None, "eos_token_id": ids["im_end"]}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=dict(SIZES[size]["vision"]),
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def generated(model: VLMRewardModel, clips: np.ndarray, texts: list[str], *, published: bool) -> list[bool]:
    """Whether the answer, written out and read again, is yes."""
    inputs = model.prompts.batch(texts)
    inputs.pop("position_ids")  # generate counts them itself
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.vlm.config.image_token_id).int()
    if published:
        side = model.family.side
        area = {"shortest_edge": (side - 5) ** 2, "longest_edge": (side + 5) ** 2}
        images = [Image.fromarray(clip[0]) for clip in clips]
        inputs |= dict(model.base.processor(images, size=area, return_tensors="pt"))
    else:
        inputs |= model.family.frames(clips, model.vlm.device)
    inputs = {key: value.to(model.vlm.device) for key, value in inputs.items()}
    ids = model.vlm.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    answers = model.base.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() == model.prompts.answers[0] for answer in answers]


def whole_vocabulary_loss(model: VLMRewardModel, clips: np.ndarray, texts: list[str], target: torch.Tensor):
    """Fine-tuning as it is usually done: the answer is appended and predicted among all tokens."""
    inputs = model.prompts.batch(texts)
    yes, no = model.prompts.answer_ids
    answer = torch.where(target > 0.5, yes, no)[:, None]
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    shown = {
        "input_ids": ids,
        "attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1),
        "mm_token_type_ids": (ids == model.vlm.config.image_token_id).int(),
        "labels": torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100),
    }
    shown = {key: value.to(model.vlm.device) for key, value in shown.items()}
    return model.vlm(**shown, **model.family.frames(clips, model.vlm.device)).loss


def measure(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Median seconds and peak MiB of each way, in turns; the first turn warms up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0.0)
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() / 2**20)
            if turn:
                seconds[name].append(clock() - start)
    return {name: (statistics.median(taken), peaks[name]) for name, taken in seconds.items()}


def row(label: str, batch: int, found: dict[str, tuple[float, float]], device: torch.device) -> str:
    """One line: samples a second of each way, how many times as fast ours is, and peak memory on a GPU."""
    ours = found["ours"][0]
    rates = ", ".join(f"{name} {batch / taken:.1f}/s" for name, (taken, _) in found.items())
    ratios = ", ".join(f"{taken / ours:.2f}x {name}" for name, (taken, _) in found.items() if name != "ours")
    memory = ", ".join(f"{name} {peak:.0f}" for name, (_, peak) in found.items())
    return f"{label}, batch {batch}: {rates}; ours is {ratios}" + (
        f"; peak MiB {memory}" if device.type == "cuda" else ""
    )


def score(model: VLMRewardModel, batch: int, rounds: int) -> str:
    """Scoring."""
    clips, texts = frames(batch)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: model.logits(clips, texts).cpu(),
        "generate": lambda: generated(model, clips, texts, published=False),
        "published": lambda: generated(model, clips, texts, published=True),
    }
    with torch.no_grad():
        return row("score", batch, measure(ways, rounds, model.vlm.device), model.vlm.device)


def learn(model: VLMRewardModel, batch: int, rounds: int) -> str:
    """LoRA training, the optimiser's step included."""
    clips, texts = frames(batch)
    target = (torch.arange(batch) % 2).float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ours() -> None:
        logits = model.logits(clips, texts)
        step(F.binary_cross_entropy_with_logits(logits, target.to(logits.device)))

    ways: dict[str, Callable[[], object]] = {
        "ours": ours,
        "whole vocabulary": lambda: step(whole_vocabulary_loss(model, clips, texts, target)),
    }
    return row("learn", batch, measure(ways, rounds, model.vlm.device), model.vlm.device)


def frames(batch: int) -> tuple[np.ndarray, list[str]]:
    """Clips of one frame of 128 pixels, and instructions of different lengths."""
    clips = np.random.default_rng(0).integers(0, 256, (batch, 1, 128, 128, 3), dtype=np.uint8)
    return clips, [TASKS[i % len(TASKS)] for i in range(batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, options.size, device)
        config = VLMRewardModelConfig(checkpoint=folder, image_size=SIZES[options.size]["image_size"])
        model = VLMRewardModel.for_fit(config, TASKS).to(device).eval()
    prompt = model.prompts.batch(TASKS)["input_ids"].shape[1]
    weights = sum(parameter.numel() for parameter in model.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.size}: {weights / 1e6:.1f} M weights in {model.vlm.dtype}, prompts to {prompt} tokens, {where}")
    for batch in options.batches:
        print(score(model, batch, options.rounds))
    model.train()
    for batch in options.batches:
        print(learn(model, batch, options.rounds))
    if device.type == "cpu":
        print(f"peak of the whole process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
