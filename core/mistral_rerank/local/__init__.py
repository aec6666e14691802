"""The local backend: checkpoints, model, batching and engine."""

import logging

# PEFT imports bitsandbytes, which warns about a missing kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
