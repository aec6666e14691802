"""From token ids to batches: packed rows with shared prefixes, or padded rows."""
