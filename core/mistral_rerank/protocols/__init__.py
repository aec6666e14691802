"""The wire contracts of rerank endpoints, one file each: pure functions, both directions."""

from mistral_rerank.protocols.contract import Contract, RerankReply, RerankRequest, Unit
from mistral_rerank.protocols.contracts import CONTRACTS

__all__ = ["CONTRACTS", "Contract", "RerankReply", "RerankRequest", "Unit"]
