"""What the 7B policy costs on an accelerator: decoding, training adapters, the critic, one whole PPO iteration.

    python benchmarks/gpu_openvla.py --size 7b > docs/benchmarks/gpu_openvla.md
    python benchmarks/gpu_openvla.py --size 7b --skip decode train critic rollout ppo --out coarse.md
    python benchmarks/gpu_openvla.py --size tiny --device cpu

Each row goes to stderr as soon as it is measured, the whole table to stdout at the end and to `--out` after each row.
`coarse` compiles, so it is best measured in a call of its own.

The weights are random and made on the device: in float32 first, then cast one tensor at a time, so building 7.5 G
parameters takes 30 GB for a moment and 15 GB from then on. Prompts and pixels are random too: no tokenizer, no
simulator, no files. Sections, each of which `--skip` leaves out:

* decode: `act` on pixels, as trained and with a copy whose steps are recorded, against the same towers and projector
  with `LlamaForCausalLM.generate` over the 256 action tokens, all greedy. In bfloat16 some tokens differ by rounding
  (`generate` rounds its logits, too), and one that does changes those behind it. `generate` is as the library has it:
  not compiled, a cache that grows, logits of the full vocabulary;
* train: forward, backward and AdamW of rank-32 adapters on the language model, from cached vision features;
* critic: values, and the training step, with the critic's own adapters;
* rollout: `act` with the actor's adapters as they are, and with the folded copy;
* ppo: collect, score, advantages and update as one process does them, with random frames and rewards;
* coarse: the folded copy with compiled prefill, in 8 bits, and both: speed, and how far log-probs part.

The floor counts what a perfect program must do: the products of the towers, the projector and the layers (the last
layer only where it is read, attention only backwards) at `--tflops`, and in each decoding step all weights of the
layers and the cache at `--gbps`. MFU counts the forward pass and the gradients of the inputs; adapters and what
checkpointing computes again are no useful work. Peak memory is PyTorch's, everything included that lies there by then.
"""

import argparse
import statistics
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from decoder import OnlyActions
from gpu_bench import HEADER, Bench, Result
from gpu_floors import decode_floor
from gpu_iteration import SCORE_ROWS, Iteration, make_inputs
from reachrl.config.language_model import NUM_ACTION_BINS
from reachrl.policies.openvla.inputs import OpenVLAInputs
from reachrl.policies.openvla.policy import OpenVLAPolicy
from reachrl.testing.policies import given_noise

SECTIONS = ("decode", "train", "critic", "rollout", "ppo", "coarse")
# batches to decode, micro-batches to train on, environments, steps of each, rows per optimiser step
SIZES: dict[str, dict[str, list[int] | int]] = {
    "7b": {"batches": [1, 16, 64, 128], "micro": [8, 32], "envs": 64, "steps": 8, "minibatch": 128},
    "tiny": {"batches": [1, 8], "micro": [4, 8], "envs": 4, "steps": 8, "minibatch": 16},
}


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(policy: OpenVLAPolicy, inputs: OpenVLAInputs) -> Tensor:
    """Action tokens by the library's own loop."""
    assert inputs.pixel_values is not None
    llama, tokens = policy.language_model, policy.num_action_tokens
    patches = policy.projector(policy.vision_features(inputs.pixel_values))
    text = llama.model.embed_tokens(inputs.prompt_ids)
    embeds = torch.cat([text[:, :1], patches, text[:, 1:]], 1)
    return llama.generate(  # pyright: ignore[reportAttributeAccessIssue]
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        logits_processor=LogitsProcessorList([OnlyActions(policy.first_action_id)]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
    )


def decode_ours(bench: Bench, inputs: OpenVLAInputs) -> Result:
    """`act`, and where its time goes."""
    policy, batch = bench.policy, len(inputs.prompt_ids)
    assert inputs.pixel_values is not None
    pixels, tokens = inputs.pixel_values, policy.num_action_tokens
    with torch.no_grad():
        vision = bench.median(lambda: policy.vision_features(pixels))
        features = policy.vision_features(pixels)
    cached = OpenVLAInputs(prompt_ids=inputs.prompt_ids, prompt_mask=inputs.prompt_mask, vision_features=features)
    policy.num_action_tokens = 1
    try:
        prefill = bench.median(lambda: policy.act(cached))
    finally:
        policy.num_action_tokens = tokens
    whole = bench.median(lambda: policy.act(inputs))
    note = f"towers {1e3 * vision:.1f}, prefill {1e3 * prefill:.1f}, "
    note += f"{tokens - 1} steps {1e3 * (whole - vision - prefill):.1f} ms"
    if bench.flops and bench.bandwidth:
        first, steps = decode_floor(policy, batch, bench.flops, bench.bandwidth)
        note += f"; floor {1e3 * first:.1f} + {1e3 * steps:.1f} ms, {(first + steps) / whole:.0%} of it reached"
    return Result(whole, batch, note)


def run_decode(bench: Bench) -> None:
    """`act` against `generate` at each batch size."""
    policy = bench.policy
    policy.language_model.generation_config.pad_token_id = policy.config.language_model.pad_token_id  # pyright: ignore
    for batch in bench.arguments.batches:
        inputs = make_inputs(policy, batch, cached=False)
        bench.configure(rollout_copy=False)
        bench.case("decode", f"act, weights as they are, batch {batch}", lambda i=inputs: decode_ours(bench, i))
        bench.configure(rollout_copy=True)
        ours = bench.case("decode", f"act, batch {batch}", lambda i=inputs: decode_ours(bench, i))

        def library(inputs: OpenVLAInputs = inputs, ours: Result | None = ours) -> Result:
            equal = (generate(policy, inputs) == policy.act(inputs).token_ids).float().mean(0)
            seconds = bench.median(lambda: generate(policy, inputs))
            shares = f"{equal.mean():.0%} of the tokens are equal, {equal[0]:.0%} of the first ones"
            faster = f"act is {seconds / ours.seconds:.2f}x as fast; " if ours else ""
            return Result(seconds, len(inputs.prompt_ids), f"{faster}{shares}")

        bench.case("decode", f"generate, batch {batch}", library)
    bench.configure(rollout_copy=False)


# --- training --------------------------------------------------------------------------------------------------------


def train_case(bench: Bench, batch: int) -> Result:
    """Forward, backward and AdamW of everything that `evaluate` trains."""
    policy = bench.policy
    inputs = make_inputs(policy, batch, cached=True)
    first = policy.first_action_id
    ids = torch.randint(first, first + NUM_ACTION_BINS, (batch, policy.num_action_tokens), device=policy.device)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = policy.evaluate(inputs, ids)
        assert out.values is not None
        (out.values.square().mean() - out.logprobs.sum(-1).mean()).backward()
        optimizer.step()

    try:
        seconds = bench.median(step)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return Result(seconds, batch, bench.useful(batch, seconds))


def run_train(bench: Bench) -> None:
    """The actor's adapters alone: the value head reads the actor's trunk."""
    bench.adapt()
    bench.configure(critic="shared")
    for checkpointing in (False, True):
        bench.configure(gradient_checkpointing=checkpointing)
        for micro in bench.arguments.micro_batches:
            name = f"adapters, micro-batch {micro}" + ", checkpointing" * checkpointing
            bench.case("train", name, lambda m=micro: train_case(bench, m))
    bench.configure(gradient_checkpointing=False, critic="adapter")
    if not bench.cuda:
        return
    before = torch.get_float32_matmul_precision()  # of float32: the adapters, the action rows, the value head
    torch.set_float32_matmul_precision("high")
    bench.configure(critic="shared")
    micro = bench.arguments.micro_batches[0]
    bench.case("train", f"adapters in TF32, micro-batch {micro}", lambda: train_case(bench, micro))
    torch.set_float32_matmul_precision(before)
    # What adapters whose float32 weights are multiplied in bfloat16 would gain; the policy does not offer that yet.
    with torch.autocast("cuda", torch.bfloat16):
        bench.case("train", f"adapters under autocast, micro-batch {micro}", lambda: train_case(bench, micro))
    bench.configure(critic="adapter")


def run_critic(bench: Bench) -> None:
    """Values from the actor's trunk and from the critic's adapters, and a training step of both sets."""
    bench.adapt()
    policy, batch = bench.policy, min(64, max(bench.arguments.batches))
    inputs = make_inputs(policy, batch, cached=True)

    def values() -> Result:
        with torch.no_grad():
            return Result(bench.median(lambda: policy.values(inputs)), batch)

    for critic in ("shared", "adapter"):
        bench.configure(critic=critic)
        bench.case("critic", f"values, {critic}, batch {batch}", values)
    own = [p for name, p in policy.named_parameters() if ".critic." in name]
    size = sum(p.numel() * p.element_size() for p in own)
    trained = f"{4 * size / 2**30:.3f} GiB with gradients and AdamW's states"
    bench.add("critic", f"{sum(p.numel() for p in own) / 1e6:.1f} M parameters", f"{size / 2**30:.3f} GiB, {trained}")
    for checkpointing in (False, True):
        bench.configure(gradient_checkpointing=checkpointing)
        micro = bench.arguments.micro_batches[0]
        name = f"actor and critic, micro-batch {micro}" + ", checkpointing" * checkpointing
        bench.case("critic", name, lambda m=micro: train_case(bench, m))
    bench.configure(gradient_checkpointing=False)


# --- rollout and PPO -------------------------------------------------------------------------------------------------


def run_rollout(bench: Bench) -> None:
    """What adapters cost while decoding, and what folding them in saves."""
    bench.adapt()
    policy, batch = bench.policy, bench.arguments.envs
    inputs = make_inputs(policy, batch, cached=False)

    def act() -> Result:
        return Result(bench.median(lambda: policy.act(inputs)), batch)

    def refresh() -> Result:
        """Decoding right after an optimiser step, less decoding."""
        changed = next(p for name, p in policy.named_parameters() if ".lora_B.default." in name)
        plain, times = bench.median(lambda: policy.act(inputs)), []
        for _ in range(bench.arguments.rounds):
            with torch.no_grad():
                changed.add_(0)  # counts as written to
            times.append(bench.once(lambda: policy.act(inputs)))
        return Result(max(statistics.median(times) - plain, 0.0), 0)

    bench.configure(critic="shared", rollout_copy=False)
    bench.case("rollout", f"act, adapters beside the weights, batch {batch}", act)
    bench.configure(rollout_copy=True)
    bench.case("rollout", f"act, adapters folded into a copy, batch {batch}", act)
    bench.case("rollout", "bringing the copy up to date", refresh)
    bench.configure(critic="adapter")
    bench.case("rollout", f"act, copy, critic's adapters too, batch {batch}", act)


def run_ppo(bench: Bench) -> None:
    """One iteration, stage by stage; the copy for decoding is brought up to date within `collect`."""
    bench.adapt()
    bench.configure(rollout_copy=True)
    iteration = Iteration(bench.policy, bench.arguments)
    decisions = iteration.steps * iteration.envs
    bench.policy.act(iteration.pixels(iteration.images[0]))  # warm up
    with torch.no_grad():
        next(p for name, p in bench.policy.named_parameters() if ".lora_B.default." in name).add_(0)
    noted: list[str] = []
    size = f"{iteration.envs} envs x {iteration.steps} steps"
    epochs = f"{iteration.config.epochs} x {decisions} rows, micro-batch {iteration.config.micro_batch_size}"

    def score() -> Result:
        seconds = bench.once(iteration.score)
        ratio = f"largest first ratio {iteration.first_ratio():.4f}"
        return Result(seconds, decisions + iteration.envs, ratio)

    def update() -> Result:
        seconds = bench.once(lambda: noted.append(iteration.update()))
        rows = decisions * iteration.config.epochs
        return Result(seconds, rows, f"{noted[0]}; {bench.useful(rows, seconds)}")

    stages = {
        f"collect, {size}": lambda: Result(bench.once(iteration.collect), decisions),
        f"score, {SCORE_ROWS} rows at a time": score,
        "advantages": lambda: Result(bench.once(iteration.advantages), decisions),
        f"update, {epochs}": update,
    }
    results = [bench.case("ppo", name, run) for name, run in stages.items()]
    if all(results):
        total = sum(result.seconds for result in results if result)
        bench.add("ppo", "whole iteration", Result(total, decisions))


# --- compiled and in 8 bits ------------------------------------------------------------------------------------------


def run_coarse(bench: Bench) -> None:
    """The copy with options that cost compile time or exactness, on the same frames and noise as without."""
    policy = bench.policy
    bench.configure(rollout_copy=True, critic="shared")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # what is called compiled is compiled
    for batch in sorted({min(64, max(bench.arguments.batches)), max(bench.arguments.batches)}):
        inputs = make_inputs(policy, batch, cached=False)
        first = policy.act(inputs)
        # noise that outweighs every logit: all variants choose the same tokens
        noise = torch.zeros((*first.token_ids.shape, NUM_ACTION_BINS), device=policy.device)
        noise.scatter_(-1, (first.token_ids - policy.first_action_id).unsqueeze(-1), 1e6)
        exact = policy.act(inputs, noise=given_noise(noise)).logprobs.float()
        variants: dict[str, dict[str, object]] = {
            "as trained": {},
            "compiled": {"compile_prefill": True},
            "float8": {"rollout_precision": "float8"},
            "float8, compiled": {"compile_prefill": True, "rollout_precision": "float8"},
        }
        for name, changes in variants.items():
            bench.configure(**{"compile_prefill": False, "rollout_precision": "as_trained", **changes})
            torch.compiler.reset()  # each variant begins with no program

            def run(inputs: OpenVLAInputs = inputs, exact: Tensor = exact, noise: Tensor = noise) -> Result:
                begun = bench.once(lambda: policy.act(inputs, noise=given_noise(noise)))
                result = decode_ours(bench, inputs)
                gap = (exact - policy.act(inputs, noise=given_noise(noise)).logprobs.float()).sum(-1)
                note = f"{result.note}; log-probs of an action {gap.abs().mean():.4f} apart; first call {begun:.0f} s"
                return Result(result.seconds, result.rows, note)

            bench.case("coarse", f"act, {name}, batch {batch}", run)
    bench.configure(compile_prefill=False, rollout_precision="as_trained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", nargs="+", choices=SECTIONS, default=[])
    parser.add_argument("--out", type=Path, help="file for the table, written after each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins later than this")
    parser.add_argument("--batches", type=int, nargs="+", help="rows to decode at once")
    parser.add_argument("--micro-batches", type=int, nargs="+", help="rows to train on at once; PPO uses the first")
    parser.add_argument("--envs", type=int)
    parser.add_argument("--steps", type=int, help="decisions of each environment")
    parser.add_argument("--minibatch", type=int, help="rows per optimiser step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tflops", type=float, help="reachable TFLOP/s (790 on an H200); none: no floor on a CPU")
    parser.add_argument("--gbps", type=float, help="reachable GB/s (4300 on an H200)")
    parser.add_argument("--nominal-tflops", type=float, default=989.0, help="of the data sheet")
    arguments = parser.parse_args()
    sizes = SIZES[arguments.size]
    for name, key in (("batches", "batches"), ("micro_batches", "micro"), ("envs", "envs"), ("steps", "steps")):
        setattr(arguments, name, getattr(arguments, name) or sizes[key])
    arguments.minibatch = arguments.minibatch or sizes["minibatch"]
    if arguments.device != "cpu":
        arguments.tflops, arguments.gbps = arguments.tflops or 790.0, arguments.gbps or 4300.0
    print(HEADER, file=sys.stderr)
    bench = Bench(arguments)
    runs = {"decode": run_decode, "train": run_train, "critic": run_critic, "rollout": run_rollout, "ppo": run_ppo}
    runs["coarse"] = run_coarse
    for section in SECTIONS:
        if section in arguments.skip:
            continue
        try:
            runs[section](bench)
        except Exception as error:  # outside the cases: preparing them
            traceback.print_exc()
            bench.add(section, "preparation", f"failed: {type(error).__name__}")
    print(bench.table())


if __name__ == "__main__":
    main()
