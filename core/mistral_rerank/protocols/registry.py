"""All protocols, by the value of the setting `protocol`."""

from mistral_rerank.protocols.cohere import COHERE, JINA
from mistral_rerank.protocols.nvidia import NVIDIA
from mistral_rerank.protocols.tei import TEI
from mistral_rerank.protocols.vllm import VLLM
from mistral_rerank.protocols.voyage import VOYAGE

PROTOCOLS = {protocol.name: protocol for protocol in (NVIDIA, COHERE, JINA, VLLM, TEI, VOYAGE)}
