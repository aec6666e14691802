"""The reranker behind an HTTP endpoint: contracts from `protocols`, one exchange without I/O, one transport."""
