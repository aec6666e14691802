"""The model on this machine: checkpoint -> tokens -> batches -> forward -> logits."""
