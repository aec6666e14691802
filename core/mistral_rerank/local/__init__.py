"""The model on this machine: checkpoint -> tokens -> batches -> forward -> logits."""

import logging

# PEFT imports bitsandbytes, which warns that it found no kernel of the hub's; nothing here would use it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
