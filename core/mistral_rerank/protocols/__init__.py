"""The wire protocols of rerank endpoints, one file each: pure functions, both directions."""

from mistral_rerank.protocols.cohere import COHERE, JINA
from mistral_rerank.protocols.nvidia import NVIDIA
from mistral_rerank.protocols.protocol import RerankReply, RerankRequest, WireProtocol
from mistral_rerank.protocols.tei import TEI
from mistral_rerank.protocols.vllm import VLLM
from mistral_rerank.protocols.voyage import VOYAGE

__all__ = ["PROTOCOLS", "RerankReply", "RerankRequest", "WireProtocol"]

PROTOCOLS: dict[str, WireProtocol] = {protocol.name: protocol for protocol in (NVIDIA, COHERE, JINA, VLLM, TEI, VOYAGE)}
"""All protocols, by the value of the setting `protocol`."""
