"""The wire protocols of rerank endpoints, one file each: pure functions, both directions."""

from mistral_rerank.protocols.protocol import RerankReply, RerankRequest, Unit, WireProtocol
from mistral_rerank.protocols.registry import PROTOCOLS

__all__ = ["PROTOCOLS", "RerankReply", "RerankRequest", "Unit", "WireProtocol"]
