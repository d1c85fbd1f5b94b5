"""Two policies that decode with compiled layers: how many programs that takes. Run by test_frozen_linear.py."""

import sys
from functools import partial

import torch
from small_policy import inputs, small

from reachrl.policies.decoding import rollout_copy
from reachrl.policies.llama import PLAIN, LayerPass
from reachrl.policies.openvla.policy import OpenVLAPolicy


def main() -> None:
    """Fails if they decode otherwise than without."""
    programs: list[torch.fx.GraphModule] = []

    def count(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        programs.append(module)
        return module

    compile_ = partial(torch.compile, backend=count, fullgraph=True)
    layer_pass = LayerPass(*(compile_(half) for half in PLAIN))
    rollout_copy.compiled = lambda: layer_pass
    for seed, batches in ((1, [3]), (2, [3]), (1, [4, 5, 8, 3])):
        torch.manual_seed(seed)
        plain = OpenVLAPolicy(small(rollout_copy=True))
        compiled = OpenVLAPolicy(small(rollout_copy=True, compile_prefill=True))
        compiled.load_state_dict(plain.state_dict())
        for batch in batches:
            rows = torch.arange(batch) % 3
            ours, theirs = (policy.act(inputs(policy).rows(rows)) for policy in (compiled, plain))
            assert torch.equal(ours.token_ids, theirs.token_ids)
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
        sys.stdout.write(f"{len(programs)}\n")


if __name__ == "__main__":
    main()
