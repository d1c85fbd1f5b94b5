"""OpenVLA: the policy, its checkpoints, and what is done with them."""

import logging

# peft brings bitsandbytes along where it is installed, which then misses a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
