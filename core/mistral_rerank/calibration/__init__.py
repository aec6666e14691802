"""From logits to probabilities: fitting, thresholds, reliability."""
