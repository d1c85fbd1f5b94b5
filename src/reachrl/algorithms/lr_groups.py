"""Parameters of a policy that have learning rates of their own."""

import itertools

from torch import nn

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.errors import ConfigError
from reachrl.policies.base import Policy


def lr_groups(
    config: PolicyGradientSection, policy: Policy, parameters: list[nn.Parameter]
) -> tuple[list[str], list[list[nn.Parameter]]]:
    """The policy's parameters in groups with a learning rate of their own, in the order they were in.

    Returns:
        the part that each group belongs to (`projector`, `head`, or `trunk` for what is in neither), and the groups.

    Raises:
        ConfigError: a learning rate of a part that the policy does not have.
    """
    if config.projector_lr is None and config.head_lr is None:
        return ["trunk"], [parameters]
    found = policy.trunk_parts()
    for part, lr in (("projector", config.projector_lr), ("head", config.head_lr)):
        if lr is not None and not found.get(part):
            raise ConfigError(
                f"algorithm.{part}_lr={lr:g}, but {type(policy).__name__} names no trained weights of a {part} "
                f"(`trunk_parts`): leave algorithm.{part}_lr out"
            )
    part_of = {id(parameter): part for part, members in found.items() for parameter in members}
    runs = [
        (part, list(members))
        for part, members in itertools.groupby(parameters, key=lambda parameter: part_of.get(id(parameter), "trunk"))
    ]
    return [part for part, _ in runs], [members for _, members in runs]
