"""The client of a vLLM engine, against the real server with a stand-in for vLLM: what goes out, what comes back."""

import copy
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_policy
import torch
from pydantic import ValidationError

from reachrl.backends.learner import LocalLearner
from reachrl.backends.weights import actor_gap
from reachrl.config.loading import load_config
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.ppo import PPOConfig
from reachrl.config.vllm import VllmConfig
from reachrl.errors import ConfigError, MissingExtra, StorageError, WorkerError
from reachrl.plan.device import find_device
from reachrl.plan.memory import plan_memory
from reachrl.policies.openvla import vllm_decoder, vllm_process, vllm_server, vllm_weights
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.preprocess import normalise_pixels
from reachrl.policies.openvla.vllm_decoder import check, frames_of, prompts, row_seeds
from reachrl.policies.openvla.vllm_process import EngineProcess
from reachrl.types import Observation

FAKE = Path(__file__).parent / "fake_vllm"
Calls = Callable[[str], list[dict[str, Any]]]


# --- which policies vLLM can decode -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vllm": {}}, "policy.vllm.python"),
        ({"vocabulary": "full"}, "policy.vocabulary='full'"),
        ({"rollout_copy": True}, "policy.rollout_copy"),
        ({"image_mean": ((0.485, 0.456, 0.406), (0.5,) * 3)}, "policy.image_mean"),
        ({"image_std": ((0.229, 0.224, 0.225), (0.5,) * 3)}, "policy.image_std"),
        ({"image_size": 336}, "policy.image_size"),
        ({"projector_expansion": 2}, "policy.projector_expansion"),
    ],
)
def test_what_vllm_cannot_decode_is_refused_before_anything_is_built(changes, words):
    options = {"decoder": "vllm", "vllm": {"python": "/opt/vllm/bin/python"}}
    good = OpenVLAConfig.openvla_7b(**options)
    with pytest.raises(ValidationError, match=words):
        OpenVLAConfig.openvla_7b(**options | changes)
    with pytest.raises(ConfigError, match=words):  # also where the configuration was changed after its validation
        check(good.model_copy(update={k: v if k != "vllm" else VllmConfig() for k, v in changes.items()}))
    OpenVLAConfig.openvla_7b(**changes)  # nobody minds without vLLM


def test_small_towers_are_refused():
    with pytest.raises(ValidationError, match="released vision towers at 224 px only"):
        OpenVLAConfig(decoder="vllm", vllm=VllmConfig(python=Path("python")))


def test_a_plan_that_knows_nothing_of_the_engine_says_so():
    changes = ["policy.decoder=vllm", "policy.vllm.python=/opt/vllm/bin/python"]
    with pytest.raises(ConfigError, match="a plan knows the own decoder only"):
        plan_memory(load_config("libero_spatial", changes), find_device("h200"))
    assert plan_memory(load_config("libero_spatial"), find_device("h200")).peak > 2**34


# --- inputs -------------------------------------------------------------------------------------------


def test_frames_come_back_from_pixels_exactly():
    config = OpenVLAConfig.openvla_7b()
    levels = np.arange(256, dtype=np.uint8)
    frames = np.stack([levels, levels[::-1], np.roll(levels, 77)], -1).reshape(1, 16, 16, 3).repeat(14, 1)
    frames = np.concatenate([frames.repeat(14, 2), np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3))])
    frames = frames.astype(np.uint8)
    pixels = normalise_pixels(frames, config.image_mean, config.image_std)
    assert np.array_equal(frames_of(with_pixels(pixels), config), frames)


def with_pixels(pixels: torch.Tensor | None, features: torch.Tensor | None = None) -> OpenVLAInputs:
    ids = torch.ones((2, 3), dtype=torch.int64)
    return OpenVLAInputs(prompt_ids=ids, prompt_mask=ids.bool(), pixel_values=pixels, vision_features=features)


def test_what_are_no_frames_is_refused():
    config = OpenVLAConfig.openvla_7b()
    with pytest.raises(ValueError, match="8-bit frames"):
        frames_of(with_pixels(torch.randn(2, 6, 28, 28)), config)
    with pytest.raises(ValueError, match="vision_features cannot be handed over"):
        frames_of(with_pixels(None, torch.zeros(2, 4, 8)), config)


def test_prompts_lose_their_padding_and_must_begin_with_bos():
    config = OpenVLAConfig.openvla_7b(vllm={"max_prompt": 3})
    ids = torch.tensor([[1, 7, 8, 0], [0, 1, 9, 0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    assert prompts(OpenVLAInputs(prompt_ids=ids, prompt_mask=mask), config) == [[1, 7, 8], [1, 9]]
    with pytest.raises(ValueError, match="begin with BOS"):
        prompts(OpenVLAInputs(prompt_ids=ids + 1, prompt_mask=mask), config)
    with pytest.raises(ConfigError, match="policy.vllm.max_prompt=3; set it to 4"):
        prompts(OpenVLAInputs(prompt_ids=ids[:1], prompt_mask=mask[:1] | True), config)


def test_seeds_belong_to_rows():
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(50, 7, 256)).astype(np.float32))
    seeds = row_seeds(noise)
    assert len(set(seeds)) == 50 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seeds(noise[[3, 11]]) == [seeds[3], seeds[11]] and row_seeds(noise.double()) == seeds
    noise[3, 6, 255] += 1e-6
    changed = row_seeds(noise)
    assert [i for i in range(50) if changed[i] != seeds[i]] == [3]


# --- with an engine -----------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that finds the stand-in for vLLM; small policies pass for large ones."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(vllm_decoder, "check", lambda config: None)
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "calls.jsonl"))
    return python


@pytest.fixture
def calls(fake: Path) -> Calls:
    def read(kind: str) -> list[dict[str, Any]]:
        lines = (fake.parent / "calls.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["call"] == kind]

    return read


def decoded_by(python: Path, base: Path, **changes: Any) -> OpenVLAPolicy:
    """Adapters on a small policy whose decoder is vLLM."""
    plain = small_policy.small(checkpoint=base, critic="adapter", lora={"rank": 3, "alpha": 6.0})
    options = VllmConfig(python=python, **{"deadline_s": 60.0, **changes})
    policy = OpenVLAPolicy(plain.model_copy(update={"decoder": "vllm", "vllm": options}))
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


def rows_of(policy: OpenVLAPolicy, count: int = 3) -> OpenVLAInputs:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    words = ("pick up the red block", "open the drawer", "push")
    return policy.encode(Observation(images=images, instructions=tuple(words[i % 3] for i in range(count))))


def noise(seed: int, rows: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).gumbel(size=(rows, 4, 256)).astype(np.float32))


def test_rows_come_back_in_their_order_whatever_their_batch(fake, base, calls):
    policy = decoded_by(fake, base)
    inputs, gumbel = rows_of(policy), noise(0)
    first = policy.act(inputs, temperature=1.3, gumbel=gumbel, with_values=False)
    assert first.values is None and first.action_ids.dtype == torch.int64
    assert first.action_ids.min() >= policy.first_action_id
    again = policy.act(inputs, temperature=1.3, gumbel=gumbel)
    assert torch.equal(first.action_ids, again.action_ids)
    assert torch.equal(again.values, policy.values(inputs))
    order = torch.tensor([2, 0])
    part = policy.act(inputs.rows(order), temperature=1.3, gumbel=gumbel[order], with_values=False)
    assert torch.equal(part.action_ids, first.action_ids[order]) and torch.equal(part.logprobs, first.logprobs[order])
    other = policy.act(inputs, temperature=1.3, gumbel=noise(1), with_values=False)
    assert not torch.equal(other.action_ids, first.action_ids)
    params = calls("generate")[0]["params"]
    assert [one["seed"] for one in params] == row_seeds(gumbel)
    told = {"temperature": 1.3, "top_p": 1.0, "top_k": -1, "min_tokens": 4, "max_tokens": 4, "logprobs": 0}
    assert params[0].items() >= (told | {"ignore_eos": True, "detokenize": False}).items()
    policy.close()


def test_log_probs_are_those_of_the_sampling_distribution(fake, base):
    """Two ways that share no code in the stand-in: the chosen tokens' own, and one position after another."""
    policy = decoded_by(fake, base)
    inputs = rows_of(policy)
    for temperature, gumbel in ((1.0, None), (1.7, None), (1.0, noise(0)), (1.7, noise(0))):
        sample = policy.act(inputs, temperature=temperature, gumbel=gumbel, with_values=False)
        scored = policy.acting_logprobs(inputs, sample.action_ids, temperature=temperature)
        assert torch.allclose(sample.logprobs, scored, atol=1e-5)
    policy.close()


def test_weights_go_whole_and_merged_and_only_when_they_changed(fake, base, calls, tmp_path):
    policy = decoded_by(fake, base)
    inputs = rows_of(policy, 1)
    before = policy.act(inputs, with_values=False)
    sent = calls("weights")[0]["shapes"]
    plain = OpenVLAPolicy(small_policy.small(checkpoint=base))
    names = {n: list(p.shape) for n, p in plain.named_parameters() if not n.startswith(("value_head.", "critic."))}
    assert sent == names
    policy.act(inputs, gumbel=noise(0, 1), with_values=False)
    with torch.no_grad():  # the critic's adapters do not act
        for name, p in policy.named_parameters():
            if ".lora_B.critic" in name:
                p.add_(0.1)
    policy.act(inputs, with_values=False)
    assert len(calls("weights")) == 1
    with torch.no_grad():
        policy.parameter_groups()["trunk"][0].add_(0.1)
    after = policy.act(inputs, with_values=False)
    assert not torch.equal(before.logprobs, after.logprobs)
    policy.to("cpu")  # leaves no trace in the counts
    policy.act(inputs, with_values=False)
    trunk = {name for name in sent if name.startswith("language_model.")}
    assert [set(one["shapes"]) for one in calls("weights")] == [set(sent), trunk, set(sent)]
    policy.close()
    policy.config = policy.config.model_copy(update={"decoder": "own"})
    policy.save_pretrained(tmp_path / "adapted")
    merged = dict(OpenVLAPolicy(small_policy.small(checkpoint=tmp_path / "adapted")).named_parameters())
    for part in vllm_weights.PARTS:
        for name, tensor in vllm_weights.tensors(getattr(policy, part), f"{part}."):
            assert torch.equal(tensor, merged[name]), name


def test_weights_travel_in_files_of_limited_size_that_do_not_pile_up(base, tmp_path):
    policy, files = OpenVLAPolicy(small_policy.small(checkpoint=base)), []

    def sent(path: Path) -> None:
        assert [path] == list(tmp_path.iterdir())
        files.append(path.stat().st_size)
        path.unlink()

    size = vllm_weights.write_weights(policy, vllm_weights.PARTS, tmp_path, sent, file_bytes=20_000)
    tensors = [p for part in vllm_weights.PARTS for p in getattr(policy, part).parameters()]
    assert size == sum(p.nbytes for p in tensors)
    assert len(files) > 5 and sum(size > 24_000 for size in files) == 2, "the embedding and the head, alone"
    assert max(files) < max(p.nbytes for p in tensors) + 2000


def test_the_engine_is_made_as_large_as_the_options_say(fake, base, calls):
    policy = decoded_by(fake, base, max_batch=5, max_prompt=20, eager=True)
    policy.act(rows_of(policy, 1), with_values=False)
    start = calls("start")[0]
    options = start["options"]
    llm = policy.config.language_model
    assert options["max_num_seqs"] == 5 and options["enforce_eager"] and options["dtype"] == "float32"
    assert options["max_model_len"] == policy.config.num_patches + 20 + 4
    assert options["kv_cache_memory_bytes"] == 6 * 128 * 2 * llm.num_layers * llm.hidden_size * 4
    assert start["config"]["text_config"]["vocab_size"] == llm.vocab_size
    assert Path(options["model"]).stat().st_mode & 0o077 == 0, "for this user's eyes only"
    policy.close()
    assert not Path(options["model"]).exists()


def test_the_engine_sees_the_policys_gpu(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert vllm_process._environment(1)["CUDA_VISIBLE_DEVICES"] == "6"
    assert vllm_process._environment(None)["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert "PYTHONPATH" not in vllm_process._environment(None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert vllm_process._environment(1)["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_fixed_batch_asks_the_engine(fake, base):
    """The stand-in knows nothing of the weights, so the probe of what acts must say so."""
    policy = decoded_by(fake, base)
    packed = LocalLearner(policy, PPOConfig(), seed=3, temperature=1.2).pack_weights(image_size=16)
    with pytest.raises(WorkerError, match="does not act with the weights"):
        actor_gap(policy, packed, seed=3, image_size=16, temperature=1.2)
    policy.close()


# --- when it goes wrong -------------------------------------------------------------------------------


def gone(pid: int, within_s: float = 8.0) -> bool:
    """Whether a process has ended, also if nobody has taken note yet."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_an_interpreter_that_is_missing_or_lacks_vllm_is_named(fake, base, tmp_path):
    with pytest.raises(ConfigError, match="policy.vllm.python=.*nowhere cannot be run"):
        policy = decoded_by(tmp_path / "nowhere", base)
        policy.act(rows_of(policy))
    with pytest.raises(MissingExtra, match="No module named 'vllm'"):
        policy = decoded_by(Path(sys.executable), base)
        policy.act(rows_of(policy))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("slow start", r"no answer to 'start' within 2 s .* policy\.vllm\.start_s"),
        ("hang", r"no answer to 'decode' within 0\.5 s .* policy\.vllm\.deadline_s"),
        ("die", r"died at 'decode' with exit code 3(?s:.*)the fake ran out of memory"),
        ("fail", r"vLLM failed at 'decode': ValueError: the fake refuses"),
        ("stray", r"this version of vLLM cannot be used"),
    ],
)
def test_what_happened_to_the_engine_is_said_and_the_next_batch_gets_a_new_one(fake, base, mode, words):
    policy, misbehaviour = decoded_by(fake, base, start_s=2.0 if mode == "slow start" else 60.0), fake.parent / "mode"
    inputs = rows_of(policy)
    if mode != "slow start":
        policy.act(inputs, with_values=False)
        policy._vllm._engine._config = VllmConfig(deadline_s=0.5 if mode == "hang" else 60.0)
    misbehaviour.write_text(mode)
    with pytest.raises(WorkerError, match=words):
        policy.act(inputs, with_values=False)
    assert policy._vllm.pid is None
    if mode == "die":
        misbehaviour.unlink()
        policy.act(inputs, with_values=False)
    policy.close()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_engine_that_waits_for_weights_in_vain_is_ended(fake, base, monkeypatch, error):
    policy = decoded_by(fake, base)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(vllm_weights, "save_file", fails)
        with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
            policy.act(rows_of(policy), with_values=False)
    assert policy._vllm.pid is None


def test_a_killed_engine_is_told_from_one_that_gave_up(fake, base):
    policy = decoded_by(fake, base)
    policy.act(rows_of(policy), with_values=False)
    os.kill(policy._vllm.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="by signal SIGKILL; a lack of memory"):
        policy.act(rows_of(policy), with_values=False)


def test_ctrl_c_leaves_no_engine_with_an_answer_that_nobody_took(fake, base, monkeypatch):
    policy = decoded_by(fake, base)
    policy.act(rows_of(policy), with_values=False)
    pid = policy._vllm.pid
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(vllm_server, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.act(rows_of(policy), with_values=False)
    assert policy._vllm.pid is None and gone(pid)


def test_the_engine_ends_with_the_policy_and_copies_have_their_own(fake, base):
    policy = decoded_by(fake, base)
    policy.act(rows_of(policy), with_values=False)
    pid = policy._vllm.pid
    for copied in (copy.deepcopy(policy._vllm), pickle.loads(pickle.dumps(policy._vllm))):
        assert copied.pid is None
    del policy
    gc.collect()
    assert gone(pid)


ABANDONED = """
import os, signal, subprocess, sys
from pathlib import Path
from reachrl.config.vllm import VllmConfig
from reachrl.policies.openvla.vllm_process import EngineProcess
engine = EngineProcess(VllmConfig(python=Path(sys.argv[1])))
# another child holds this end of the connection open, so that it does not tell
subprocess.Popen(["sleep", "12"], pass_fds=[engine._connection.fileno()], stdout=subprocess.DEVNULL)
print(engine.pid, engine.folder, engine.weights_folder, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_the_engine_does_not_outlive_its_parent(fake, how):
    done = subprocess.run([sys.executable, "-c", ABANDONED, fake, how], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == (0 if how == "ended" else -signal.SIGKILL)
    pid, *folders = done.stdout.split()
    assert gone(int(pid)) and not any(Path(folder).exists() for folder in folders)


def test_a_fork_does_not_end_the_engine(fake):
    engine = EngineProcess(VllmConfig(python=fake))
    child = os.fork()
    if child == 0:
        engine.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert not gone(engine.pid, within_s=0.3)
    engine.close()
    assert gone(engine.pid)


def test_the_own_decoder_is_not_touched(base):
    policy = OpenVLAPolicy(small_policy.small(checkpoint=base))
    assert policy._vllm is None
    inputs = rows_of(policy)
    sample = policy.act(inputs, temperature=1.2)
    assert torch.allclose(
        policy.acting_logprobs(inputs, sample.action_ids, temperature=1.2), sample.logprobs, atol=1e-5
    )
    features = replace(inputs, pixel_values=None, vision_features=policy.vision_features(inputs.pixel_values))
    assert torch.equal(policy.act(features).action_ids, policy.act(inputs).action_ids)
    policy.close()
