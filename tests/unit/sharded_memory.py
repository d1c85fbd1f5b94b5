"""Bytes that the first of several learners with a policy in pieces holds, and allocates in a pass.

Run by test_plan_devices.py: python sharded_memory.py LEARNERS [KEY=VALUE...]
Communication is only pretended: every buffer is made as in earnest, by one process.
"""

import json
import sys
from collections.abc import Callable

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy_policy import toy_config, toy_policy

from reachrl.backends import sharding
from reachrl.backends.group import Group
from reachrl.plan.memory import micro_rows
from reachrl.policies.openvla.inputs import OpenVLAInputs


def allocated(run: Callable[[], object]) -> int:
    """Bytes at the most of what was allocated since `run` began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        most = max(most, now)
    return most


def main(learners: int, overrides: list[str]) -> None:
    """Print the figures."""
    config = toy_config(*overrides)
    distributed.init_process_group("fake", rank=0, world_size=learners, store=FakeStore())
    policy = toy_policy(config)
    policy.freeze(["vision"])
    sharding.shard(policy, Group(0, learners, sharded=True))
    optimizer = torch.optim.AdamW(parameter for parameter in policy.parameters() if parameter.requires_grad)
    options, rows = policy.config, micro_rows(config)
    mask = torch.ones(rows, options.prompt_length, dtype=torch.bool)
    mask[0, -2:] = False
    pixels = torch.randn(rows, 3 * len(options.towers), options.image_size, options.image_size)
    seen = OpenVLAInputs(prompt_ids=torch.randint(3, 100, mask.shape), prompt_mask=mask, pixel_values=pixels)
    actions = torch.full((rows, options.num_action_tokens), policy.first_action_id)

    @torch.no_grad()
    def score() -> OpenVLAInputs:
        cached = policy.cache(seen)
        policy.evaluate(cached, actions)
        return cached

    cached = score()

    def train() -> None:
        out = policy.evaluate(cached, actions)
        (out.logprobs.sum() + out.entropy.sum() + out.values.square().sum()).backward()

    train()
    optimizer.step()
    parts = [parameter.to_local() for parameter in policy.parameters()]
    gradients = [parameter.grad.to_local() for parameter in policy.parameters() if parameter.grad is not None]
    states = [value.to_local() for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    held = {"weights": parts, "gradients": gradients, "Adam states": states}
    figures = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in held.items()}
    figures |= {"scoring": allocated(score), "update": allocated(train)}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
