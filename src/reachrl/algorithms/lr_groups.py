"""Parameters of a policy that have learning rates of their own."""

import itertools

from torch import nn
from torch.optim import AdamW

from reachrl.config.algorithm import PolicyGradientSection
from reachrl.errors import ConfigError
from reachrl.functional.schedules import decay
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


def schedule_factor(
    config: PolicyGradientSection, iteration: int, num_iterations: int | None, kl_factor: float
) -> float:
    """The factor that `lr_schedule` puts on the policy's rates in this iteration."""
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule == "kl":
        return kl_factor
    if num_iterations is None:
        raise ConfigError(
            f"algorithm.lr_schedule={config.lr_schedule} falls over a run's num_iterations, which this "
            "algorithm was not given: set its attribute num_iterations, or lr_schedule=constant"
        )
    return decay(config.lr_schedule, min(1.0, iteration / num_iterations), config.lr_final)


def grouped_optimizer(
    config: PolicyGradientSection, policy: Policy, parameters: list[nn.Parameter], value_parameters: list[nn.Parameter]
) -> tuple[list[str], AdamW]:
    """AdamW over the groups of `lr_groups` and, last, the critic's parameters.

    Returns:
        the part of each of the policy's groups, and the optimiser.
    """
    parts, trained = lr_groups(config, policy, parameters)
    groups = [{"params": members, "lr": config.lr, "role": "policy"} for members in trained if members]
    if value_parameters:
        groups.append({"params": value_parameters, "lr": config.lr, "role": "value"})
    return parts, AdamW(groups, eps=config.adam_eps, weight_decay=config.weight_decay)
