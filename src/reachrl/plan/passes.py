"""Memory and work of one pass over a policy, for any number of rows."""

from dataclasses import dataclass

import numpy as np

from reachrl.plan.device import Device


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over any number of rows needs; each line of an array is a fixed number and one for each row."""

    live: np.ndarray
    """f64[E 2], bytes alive after each allocation, less what was alive before the pass."""
    work: np.ndarray
    """f64[O 2 2], FLOPs and bytes moved by each operation."""
    halves: np.ndarray
    """bool[O], whether an operation computes in numbers of at most two bytes."""
    launched: int
    """Operations that are started one by one."""

    def peak(self, rows: float) -> float:
        """Bytes at the worst moment of a pass over `rows` rows."""
        return float((self.live @ (1, rows)).max())

    def flops(self, rows: float) -> float:
        """Floating-point operations of matrix products and convolutions, and nothing else."""
        return float((self.work[:, 0] @ (1, rows)).sum())

    def moved(self, rows: float) -> float:
        """Bytes that the operations read and write."""
        return float((self.work[:, 1] @ (1, rows)).sum())

    def seconds(self, rows: float, device: Device, *, training: bool = False) -> float:
        """Seconds of one pass: each operation takes as long as its arithmetic or its bytes, whichever is longer.

        Args:
            rows: of the pass.
            device: peak figures and the share of them that is reached.
            training: whether gradients are computed.

        Source: Williams et al. 2009, Roofline, section 3.
        """
        share = device.training_share if training else device.forward_share
        peak = 1e12 * np.where(self.halves, device.bf16, device.fp32)
        arithmetic = self.work[:, 0] @ (1, rows) / (share * peak)
        transfers = self.work[:, 1] @ (1, rows) / (device.bandwidth_share * 1e9 * device.bandwidth)
        return max(float(np.maximum(arithmetic, transfers).sum()), self.launched * device.launch_s)
