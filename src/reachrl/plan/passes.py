"""Memory and work of one pass of a policy, as linear functions of the number of rows."""

from dataclasses import dataclass

import numpy as np

from reachrl.plan.device import Device


@dataclass(frozen=True, slots=True)
class Pass:
    """Memory and work of one pass; the last axis of an array is (fixed, per row)."""

    live: np.ndarray
    """f64[E 2], bytes allocated since the pass began, after each allocation."""
    work: np.ndarray
    """f64[O 2 2], FLOPs and bytes moved of each operation."""
    halves: np.ndarray
    """bool[O], whether an operation computes in 16 bits or fewer."""
    launched: int
    """Operations that are launched one by one."""

    def peak(self, rows: float) -> float:
        """Return the peak of a pass over `rows` rows, in bytes."""
        return float((self.live @ (1, rows)).max())

    def flops(self, rows: float) -> float:
        """Return the FLOPs of matrix products and convolutions; other operations are not counted."""
        return float((self.work[:, 0] @ (1, rows)).sum())

    def moved(self, rows: float) -> float:
        """Return the bytes read and written."""
        return float((self.work[:, 1] @ (1, rows)).sum())

    def seconds(self, rows: float, device: Device, *, training: bool = False) -> float:
        """Return the seconds of one pass: of each operation the longer of arithmetic and memory traffic.

        Args:
            rows: of the pass.
            device: peak figures and the fraction of them that is reached.
            training: whether gradients are computed.

        Source: Williams et al. 2009, Roofline, section 3.
        """
        share = device.training_share if training else device.forward_share
        peak = 1e12 * np.where(self.halves, device.bf16, device.fp32)
        arithmetic = self.work[:, 0] @ (1, rows) / (share * peak)
        transfers = self.work[:, 1] @ (1, rows) / (device.bandwidth_share * 1e9 * device.bandwidth)
        return max(float(np.maximum(arithmetic, transfers).sum()), self.launched * device.launch_s)
