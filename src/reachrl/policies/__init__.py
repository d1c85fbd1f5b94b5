"""Vision-language-action policies with a value head."""

import logging

# peft, which policies with adapters import, brings bitsandbytes along where it is installed; that warns of a kernel
# that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
