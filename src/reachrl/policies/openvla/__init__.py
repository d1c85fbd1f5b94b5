"""OpenVLA: the policy, its checkpoints, and what is done with them."""
