"""The engine: queue, tokenizer stage, forward thread, cascade and score cache."""
