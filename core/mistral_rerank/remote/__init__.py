"""The reranker behind an HTTP endpoint: protocols from `protocols`, one exchange without I/O, one transport."""
