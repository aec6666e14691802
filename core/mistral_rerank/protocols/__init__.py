"""The wire contracts of rerank endpoints, one file each: pure functions, both directions."""

from mistral_rerank.protocols.protocol import Contract, RerankReply, RerankRequest, Unit
from mistral_rerank.protocols.registry import CONTRACTS

__all__ = ["CONTRACTS", "Contract", "RerankReply", "RerankRequest", "Unit"]
