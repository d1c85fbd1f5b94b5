"""Low-rank adapters of any policy: beside its linear maps, in peft's files, folded into the weights."""

import logging

# peft brings bitsandbytes along where it is installed, which then misses a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
