"""The model: transformer, attention, rotary embedding, pooling, quantization and early exit."""
