"""The OpenVLA architecture in any size, its prompt, pixels and checkpoints."""
