"""OpenVLA-7B at full size on a laptop: random weights on disk, one PPO iteration, killed, resumed, exported, compared.

    python benchmarks/full_size.py FOLDER --size 7b --base nf4
    python benchmarks/full_size.py FOLDER --size 7b --base plain
    python benchmarks/full_size.py FOLDER --size 7b --base nf4 --family openvla_oft --stages train
    python benchmarks/full_size.py FOLDER --size tiny --base plain  # seconds

Each stage is a process of its own and leaves FOLDER/BASE/STAGE.json with its figures (of OpenVLA-OFT:
FOLDER/oft_BASE); finished stages are not done again, so a run that was interrupted goes on where it was. Stages:

* write: random weights in the official shards, with index, configuration, statistics and tokenizer (once for all);
* frames: what one environment of LIBERO shows (`--frames libero`; otherwise noise), once for all;
* info: `reachrl model info`;
* train: load with adapters and a critic's adapters, act on the frames, one PPO iteration over a few decisions with
  gradient checkpointing and the process reward, save; then it is killed;
* resume: load what was saved, compare its log-probs with those before the kill, one more optimiser step;
* export: `reachrl export --merge`;
* reload: the exported checkpoint, loaded as a user would, beside the policy that was trained.

A stage ends itself when the machine has less than `--least` GiB left. Memory is resident memory that no file stands
behind (`RssAnon`), at its peak, less what libraries take; of a command line that a stage starts, with its libraries.
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from reachrl.algorithms.base import Algorithm
from reachrl.backends.group import Group
from reachrl.backends.learner import LocalLearner, new_learner
from reachrl.config.loading import load_config
from reachrl.config.oft import OpenVLAOFTConfig
from reachrl.config.policy import OpenVLAConfig
from reachrl.config.reward import ProcessRewardConfig
from reachrl.config.reward_model import SmallRewardModelConfig
from reachrl.config.train import TrainConfig
from reachrl.plan.device import Device, measure_cpu
from reachrl.plan.memory import plan_memory, trained
from reachrl.plan.outline import outline_of
from reachrl.plan.timing import plan_time
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.policies.openvla.tokenizer import build_tokenizer
from reachrl.registry import build
from reachrl.rewards.process.reward import ProcessReward
from reachrl.rewards.process.small import SmallRewardModel
from reachrl.types import Observation, Rollout, Start

STAGES = ("write", "frames", "info", "train", "resume", "export", "reload")
SHARED = ("write", "frames")  # by all bases and families
SHARD = 2 * 10**9  # bytes; the release has three larger ones, but a shard lies in memory twice while it is written
TASK = "put the black bowl on the plate"
TINY: dict[str, object] = {
    "image_size": 56,
    "towers": (
        {"kind": "vit", "width": 64, "depth": 3, "num_heads": 4, "mlp_width": 128, "class_token": True,
         "num_registers": 4, "layer_scale": True},
        {"kind": "vit", "width": 64, "depth": 3, "num_heads": 4, "mlp_width": 128},
    ),
    "language_model": {"vocab_size": 32064, "hidden_size": 64, "intermediate_size": 128, "num_layers": 3,
                       "num_heads": 4, "pad_token_id": 32000, "empty_token_id": 29871},
    "num_action_tokens": 7,
    "prompt_length": 32,
    "tokenizer": "folder",
    "dtype": "bfloat16",
}  # fmt: skip
TIMM = {
    "7b": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"),
    "tiny": ("vit_tinydino_patch14_reg4_dinov2", "vit_tinyso_patch14_siglip_224"),
}


def sizes(size: str) -> OpenVLAConfig:
    """The policy's sizes."""
    return OpenVLAConfig.openvla_7b() if size == "7b" else OpenVLAConfig.model_validate(TINY)


def run_of(arguments: argparse.Namespace) -> TrainConfig:
    """The run: adapters on the checkpoint, a critic's adapters, a few decisions."""
    overrides = [
        f"policy.checkpoint={arguments.folder / 'official'}",
        f"policy.lora.base={arguments.base}",
        f"rollout.num_steps={arguments.steps}",
        "env.num_envs=1",
        "algorithm.micro_batch_size=1",
        "algorithm.score_batch_size=1",
        f"algorithm.minibatch_size={arguments.steps}",
        "algorithm.warmup_iterations=0",
        "algorithm.epochs=1",
        "device=cpu",
    ]
    config = load_config("libero_spatial", overrides)
    update, policy = {}, config.policy
    if arguments.size == "tiny":
        small = {key: getattr(sizes("tiny"), key) for key in ("towers", "language_model", "image_size")}
        policy = policy.model_copy(update={**small, "projector_expansion": 2, "value_hidden_size": 16})
        update["env"] = config.env.model_copy(update={"image_size": 56})
    if arguments.family == "openvla_oft":
        policy = OpenVLAOFTConfig.model_validate(
            {key: getattr(policy, key) for key in policy.model_fields_set & OpenVLAOFTConfig.model_fields.keys()}
            | {"kind": "openvla_oft", "chunk_size": 8, "dialect": "simplevla_rl"}
        )
    return config.model_copy(update={"policy": policy, **update})


# --- memory and time -------------------------------------------------------------------------------------------------


def anonymous(process: int | str = "self") -> float:
    """GB of a process that no file stands behind; 0 of one that has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 / 1e9 if found else 0.0


class Watch(threading.Thread):
    """The most anonymous memory since `reset`; ends the process when the machine runs out of memory."""

    def __init__(self, least_gib: float) -> None:
        super().__init__(daemon=True)
        self._least, self._base, self.most = least_gib * 2**30, anonymous(), 0.0
        self.child: int | None = None  # whose memory counts too
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous() + (anonymous(self.child) if self.child else 0.0))
            if psutil.virtual_memory().available < self._least:
                print("less memory is left than --least says: this stage ends here", file=sys.stderr, flush=True)
                os._exit(3)
            time.sleep(0.02)

    def held(self) -> float:
        """GB now, libraries left out."""
        return anonymous() - self._base

    @contextmanager
    def measured(self, figures: dict[str, float], name: str) -> Iterator[None]:
        """Note seconds of the clock and of processors, GB at the peak and afterwards."""
        print(f"  {name} ...", file=sys.stderr, flush=True)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        waited = children.ru_utime + children.ru_stime
        self.most, began, busy = 0.0, time.time(), time.process_time()
        yield
        figures[f"{name}, s"] = time.time() - began
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        figures[f"{name}, CPU s"] = time.process_time() - busy + children.ru_utime + children.ru_stime - waited
        figures[f"{name}, peak GB"] = max(self.most, anonymous()) - self._base
        figures[f"{name}, held GB"] = self.held()
        print(
            f"  {name}: {figures[f'{name}, s']:.0f} s, {figures[f'{name}, peak GB']:.2f} GB",
            file=sys.stderr,
            flush=True,
        )


# --- stages ----------------------------------------------------------------------------------------------------------


def write(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """Random weights as the release lays them out, blocks that are never read included."""
    config, figures, folder = sizes(arguments.size), {}, arguments.folder / "official"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in OpenVLAPolicy(config).state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("value_head.")}
    for tower, options in zip(("featurizer", "fused_featurizer"), config.towers, strict=True):
        prefix = f"vision_backbone.{tower}."
        last = options.depth - 1  # pyright: ignore[reportAttributeAccessIssue]
        for name in [name for name in shapes if name.startswith(f"{prefix}blocks.0.")]:
            shapes[name.replace("blocks.0.", f"blocks.{last}.")] = shapes[name]
        shapes |= {f"{prefix}norm.{part}": (options.output_width,) for part in ("weight", "bias")}
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    groups = list(_shards(shapes))
    with watch.measured(figures, "write"):
        for number, names in enumerate(groups, start=1):
            path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            state = {name: _random(name, shapes[name], generator) for name in names}
            save_file(state, path, {"format": "pt"})
            places |= dict.fromkeys(names, path.name)
            total += sum(tensor.nbytes for tensor in state.values())
            del state
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _write_surroundings(config, arguments.size, folder)
    return figures | {"GB": total / 1e9}


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names, size = [], 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * int(np.prod(shape))
        if size >= SHARD:
            yield names
            names, size = [], 0
    if names:
        yield names


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights at which signals neither die nor explode."""
    if len(shape) == 1 and not name.endswith("bias"):
        return torch.full(shape, 0.1 if "scale_factor" in name else 1.0, dtype=torch.bfloat16)
    std = 0.02 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0.5 / np.sqrt(shape[-1])
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std, generator=generator)


def _write_surroundings(config: OpenVLAConfig, size: str, folder: Path) -> None:
    llm, dims = config.language_model, config.num_action_tokens
    action = {"q01": [-1.0] * dims, "q99": [1.0] * dims, "mask": [True] * (dims - 1) + [False]}
    stats = {"libero_spatial": {"action": action, "num_transitions": 0, "num_trajectories": 0}}
    text = {"model_type": "llama", "vocab_size": llm.vocab_size, "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size, "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads, "bos_token_id": llm.bos_token_id,
            "pad_token_id": llm.pad_token_id}  # fmt: skip
    raw = {"model_type": "openvla", "norm_stats": stats, "n_action_bins": 256, "image_sizes": [config.image_size] * 2,
           "arch_specifier": "no-align+fused-gelu-mlp", "use_fused_vision_backbone": True,
           "timm_model_ids": list(TIMM[size]), "timm_override_act_layers": [None, None],
           "image_resize_strategy": "resize-naive", "llm_backbone_id": "llama2-7b-pure",
           "pad_token_id": llm.pad_token_id, "pad_to_multiple_of": llm.pad_to_multiple_of, "text_config": text,
           "torch_dtype": "bfloat16"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "dataset_statistics.json").write_text(json.dumps(stats), encoding="utf-8")
    ours = llm.model_copy(update={"empty_token_id": 2})  # the built-in words, with Llama's token that ends a prompt
    vocabulary = json.loads(build_tokenizer(ours).to_str())
    pieces = vocabulary["model"]["vocab"]
    if llm.empty_token_id != 2:
        pieces[2], pieces[llm.empty_token_id] = pieces[llm.empty_token_id], pieces[2]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")


def info(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """What `reachrl model info` says of it."""
    figures: dict[str, float] = {}
    with watch.measured(figures, "model info"):
        print(_reachrl(watch, "model", "info", str(arguments.folder / "official")), file=sys.stderr)
    return figures


def train(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """One iteration, saved."""
    config, figures = run_of(arguments), {}
    policy = _load(config, watch, figures)
    observations = _frames(arguments)
    with watch.measured(figures, "act"):
        samples = [policy.act(policy.encode(each), with_values=False) for each in observations[:-1]]
    actions = [policy.decode_actions(each.token_ids, each.token_mask) for each in samples]
    assert all(np.isfinite(each).all() for each in actions)
    rollout = _rollout(observations, samples, actions[0].shape[1])
    instructions = sorted({text for each in observations for text in each.instructions})
    model = SmallRewardModel.for_fit(SmallRewardModelConfig(), instructions)
    reward = ProcessReward(ProcessRewardConfig(), gamma=config.algorithm.discount, model=model)
    with watch.measured(figures, "process reward"):
        rewards = reward(rollout)
    learner = new_learner(config, policy, Group())
    with watch.measured(figures, "score"):
        scored = learner.score_now(rollout)
    with watch.measured(figures, "update"):
        stats = learner.update(rollout, rewards, scored, iteration=0)
    figures |= {name: float(stats[name]) for name in ("loss/policy", "loss/value", "grad_norm", "kl", "engine_kl")}
    with watch.measured(figures, "save"):
        learner.save(arguments.own / "saved")
    with watch.measured(figures, "log-probs after the update"):
        logprobs = _logprobs(policy, observations[0], samples[0].token_ids)
    np.savez(arguments.own / "before.npz", logprobs=logprobs, ids=samples[0].token_ids.numpy())
    return figures | _planned(config, policy)


def resume(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """What was saved, in a new process, and a step more."""
    config, figures = run_of(arguments), {}
    policy = _load(config, watch, figures)
    learner: LocalLearner = new_learner(config, policy, Group())
    with watch.measured(figures, "restore"):
        learner.load(arguments.own / "saved", version=1)
    before = np.load(arguments.own / "before.npz")
    observations = _frames(arguments)
    with watch.measured(figures, "log-probs"):
        logprobs = _logprobs(policy, observations[0], torch.from_numpy(before["ids"]))
    figures["largest difference of log-probs"] = float(np.abs(logprobs - before["logprobs"]).max())
    algorithm: Algorithm = learner.algorithm
    figures["optimiser steps restored"] = float(max(s["step"] for s in algorithm.optimizer.state.values()))
    return figures


def export(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """The merged checkpoint."""
    figures: dict[str, float] = {}
    with watch.measured(figures, "export"):
        out = arguments.own / "merged"
        said = _reachrl(watch, "export", str(arguments.own / "saved" / "policy"), "--merge", "--out", str(out))
    print(said, file=sys.stderr)
    return figures


def reload(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """The merged checkpoint as a policy beside the one that was trained."""
    config, figures = run_of(arguments), {}
    before = np.load(arguments.own / "before.npz")
    section = config.policy.model_copy(
        update={
            "checkpoint": arguments.own / "merged",
            "lora": None,
            "critic": "shared",
            "gradient_checkpointing": False,
        }
    )
    with watch.measured(figures, "load"), torch.device("cpu"):
        policy = build("policies", section)
    observation = _frames(arguments)[0]
    with watch.measured(figures, "log-probs"):
        logprobs = _logprobs(policy, observation, torch.from_numpy(before["ids"]))
    figures["mean difference of log-probs"] = float(np.abs(logprobs - before["logprobs"]).mean())
    return figures


def _load(config: TrainConfig, watch: Watch, figures: dict[str, float]) -> OpenVLAPolicy:
    torch.manual_seed(config.seed)
    with watch.measured(figures, "load"), torch.device("cpu"):
        return build("policies", config.policy)


def _planned(config: TrainConfig, policy: OpenVLAPolicy) -> dict[str, float]:
    """The plan of the same stages: peaks beside nothing else, and seconds on this processor."""
    machine: Device = measure_cpu()
    outline, plan = outline_of(config, accelerator=False), plan_memory(config, machine)
    held = sum(part.bytes for part in outline.weights)
    gradients, states = trained(outline), 2 * trained(outline)
    seconds = {part.name: part.seconds for part in plan_time(config, machine).stretches}
    rows = config.rollout.num_steps
    return {
        "planned load, held GB": held / 1e9,
        "planned act, peak GB": (held + outline.acting.peak(1)) / 1e9,
        "planned score, peak GB": (held + plan.of("scoring") + rows * outline.features) / 1e9,
        "planned update, peak GB": (held + gradients + states + plan.of("update") + rows * outline.features) / 1e9,
        "planned act, s": seconds["acting"],
        "planned score, s": seconds["scoring"],
        "planned update, s": seconds["PPO, 1 epochs"] + seconds["KL of the update"],
    }


@torch.no_grad()
def _logprobs(policy: OpenVLAPolicy, observation: Observation, ids: torch.Tensor) -> np.ndarray:
    inputs = policy.cache(policy.encode(observation))
    return policy.evaluate(inputs, ids, with_values=False).logprobs.float().numpy()


def frames(arguments: argparse.Namespace, watch: Watch) -> dict[str, float]:
    """What one environment shows over a few decisions: one frame more than there are actions."""
    figures: dict[str, float] = {}
    size = 56 if arguments.size == "tiny" else 256
    with watch.measured(figures, "frames"):
        seen, text = np.random.default_rng(0).integers(0, 256, (arguments.steps + 1, size, size, 3), np.uint8), TASK
        if arguments.frames == "libero":
            seen, text = _libero(arguments)
    np.savez(arguments.folder / f"frames_{arguments.frames}.npz", frames=seen, text=np.array(text))
    return figures


def _frames(arguments: argparse.Namespace) -> list[Observation]:
    stored = np.load(arguments.folder / f"frames_{arguments.frames}.npz")
    text = str(stored["text"])
    return [Observation(images={"agentview": frame[None]}, instructions=(text,)) for frame in stored["frames"]]


def _libero(arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Frames of the first training start of a task, its arm moved at random."""
    config, rng = run_of(arguments).env, np.random.default_rng(0)
    env = build("envs", config)
    observed, _ = env.reset(options={"start": Start(task=config.tasks[0], split="train", index=0)})
    seen = [observed["images"]["agentview"]]
    for _ in range(arguments.steps):
        observed, *_ = env.step(rng.uniform(-1, 1, 7).astype(np.float32))
        seen.append(observed["images"]["agentview"])
    text = env.instruction(config.tasks[0])
    env.close()
    return np.stack(seen), text


def _rollout(observations: list[Observation], samples: list, executed: int) -> Rollout:
    """The decisions as the collector would have kept them; the last one ends the episode in success."""
    steps = len(samples)
    never = np.zeros((steps, 1), bool)
    success = never.copy()
    success[-1] = True
    gone = observations[-1]
    return Rollout(
        images={"agentview": np.stack([each.images["agentview"] for each in observations[:-1]])},
        instructions=tuple(each.instructions for each in observations[:-1]),
        last_observation=gone,
        final_observation=gone,
        final_rows=np.array([[steps - 1, 0]]),
        token_ids=np.stack([each.token_ids.numpy() for each in samples]),
        token_mask=np.stack([each.token_mask.numpy() for each in samples]),
        behaviour_logprobs=np.stack([each.logprobs.float().numpy() for each in samples]),
        executed=np.full((steps, 1), executed, np.int32),
        malformed=never,
        success=success,
        terminated=success,
        truncated=never,
        valid=~never,
        ee_state=np.zeros((steps, 1, 4), np.float32),
        progress=np.full((steps, 1, 2), np.nan, np.float32),
        episodes=(),
        policy_version=0,
    )


def _reachrl(watch: Watch, *words: str) -> str:
    pipe, command = subprocess.PIPE, [sys.executable, "-m", "reachrl", *words]
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, encoding="utf-8") as child:
        watch.child = child.pid
        said = child.communicate()[0]
    watch.child = None
    if child.returncode:
        raise SystemExit(f"reachrl {' '.join(words)} ended with {child.returncode}:\n{said}")
    return said


# --- one after the other ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--base", choices=["nf4", "plain"], default="nf4")
    parser.add_argument("--family", choices=["openvla", "openvla_oft"], default="openvla")
    parser.add_argument("--frames", choices=["libero", "noise"], default="noise")
    parser.add_argument("--steps", type=int, default=2, help="decisions of the iteration")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's default")
    parser.add_argument("--least", type=float, default=2.0, help="GiB that must stay free")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.own = arguments.folder / f"{'' if arguments.family == 'openvla' else 'oft_'}{arguments.base}"
    arguments.own.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.stage:
        _one(arguments)
        return
    for stage in arguments.stages:
        place = (arguments.folder if stage in SHARED else arguments.own) / f"{stage}.json"
        if not place.exists():
            print(stage, file=sys.stderr, flush=True)
            code = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", stage]).returncode
            if code not in (0, -signal.SIGKILL if stage == "train" else 0) or not place.exists():
                raise SystemExit(f"{stage} ended with {code}")
        print(f"\n{stage}\n")
        for name, value in json.loads(place.read_text(encoding="utf-8")).items():
            print(f"| {name} | {value:,.3g} |")


def _one(arguments: argparse.Namespace) -> None:
    stage: Callable[[argparse.Namespace, Watch], dict[str, float]] = globals()[arguments.stage]
    place = (arguments.folder if arguments.stage in SHARED else arguments.own) / f"{arguments.stage}.json"
    figures = stage(arguments, Watch(arguments.least))
    place.write_text(json.dumps(figures), encoding="utf-8")
    if arguments.stage == "train":  # nothing is closed, nothing is said
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
