"""What supervised fits share: the optimiser of a policy's warm start and of a reward model."""

from collections.abc import Sequence

from torch.nn import Parameter
from torch.optim import AdamW

from reachrl.run.weight_change import check_float32


def adamw(parameters: Sequence[Parameter], *, lr: float, weight_decay: float, model: str) -> AdamW:
    """AdamW whose weight decay acts on matrices only, not on biases and norms.

    Args:
        parameters: what is trained.
        lr: peak learning rate.
        weight_decay: of the matrices.
        model: the name of the model's class, for the error.

    Raises:
        ConfigError: parameters are held in 16 bits, where small steps are rounded away.
    """
    check_float32(parameters, model)
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr)
