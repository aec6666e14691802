"""Fine-tuning: groups of passages, losses, LoRA."""
