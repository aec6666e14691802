"""The queue in front of the model, its worker thread, the tokenizer stage, cascade and score cache."""
