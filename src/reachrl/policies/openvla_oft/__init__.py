"""OpenVLA-OFT with its token head: a chunk of actions in one pass with attention in both directions."""
