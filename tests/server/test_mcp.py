"""The MCP server with the official client: in one process, and over stdio with the real command."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
from command import COMMAND
from families import qwen3_reranker
from mcp import Client, MCPError, StdioServerParameters
from remote.endpoint import Endpoint, gives
from support import FailingReranker, LengthReranker
from typer.testing import CliRunner

from mistral_rerank import CheckpointError, RerankSettings
from mistral_rerank.cli import app
from mistral_rerank.server.mcp import create_server, takes_instruction

QUERY = "which is longest?"
PASSAGES = ["one", "three", "four and five", "a"]


@asynccontextmanager
async def connected(reranker, *, with_instruction=False):
    async with Client(create_server(lambda: reranker, with_instruction=with_instruction)) as client:
        yield client


async def results(client, **arguments):
    reply = await client.call_tool("rerank", {"query": QUERY, "passages": PASSAGES} | arguments)
    assert not reply.is_error, reply.content
    assert json.loads(reply.content[0].text) == reply.structured_content
    return reply.structured_content["results"]


async def failure(client, **arguments):
    reply = await client.call_tool("rerank", {"query": QUERY, "passages": PASSAGES} | arguments)
    assert reply.is_error
    assert reply.structured_content is None
    return reply.content[0].text


async def test_the_official_client_lists_and_calls_the_tool_over_stdio(tiny, tiny_reranker):
    unparsable = []

    async def received(message):
        unparsable.extend([message] if isinstance(message, Exception) else [])

    command = [str(COMMAND), "mcp", "--model", str(tiny), "--device", "cpu", "--dtype", "float32"]
    server = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
    async with Client(server, message_handler=received) as client:
        (tool,) = (await client.list_tools()).tools
        assert tool.name == "rerank"
        first, second = await asyncio.gather(results(client, top_n=3), results(client, top_n=3))
    expected = tiny_reranker.rank(QUERY, PASSAGES, top_n=3)
    assert first == second
    assert [result["index"] for result in first] == [passage.index for passage in expected]
    assert [result["probability"] for result in first] == pytest.approx(
        [passage.score.probability for passage in expected], rel=0.01
    )
    assert unparsable == []


async def test_results_have_positions_probabilities_and_texts(length_reranker):
    async with connected(length_reranker) as client:
        assert await results(client, top_n=2) == [
            {"index": 2, "probability": 1.0, "text": "four and five"},
            {"index": 1, "probability": 0.993, "text": "three"},
        ]
        assert [result["text"] for result in await results(client, min_score=0.9)] == ["four and five", "three", "one"]
        assert await results(client, passages=[]) == []


async def test_highlight_gives_the_best_sentence_instead_of_the_passage(length_reranker):
    async with connected(length_reranker) as client:
        (result,) = await results(client, passages=["Short one. A much longer one. End."], highlight=True)
    assert result["text"] == "A much longer one."


async def test_a_list_that_arrives_as_a_json_string_is_read(length_reranker):
    async with connected(length_reranker) as client:
        assert await results(client, passages=json.dumps(PASSAGES)) == await results(client)


async def test_the_schema_describes_every_argument(length_reranker):
    async with connected(length_reranker) as client:
        (tool,) = (await client.list_tools()).tools
    fields = tool.input_schema["properties"]
    assert tool.input_schema["required"] == ["query", "passages"]
    assert list(fields) == ["query", "passages", "top_n", "min_score", "highlight"]
    assert all(field["description"] for field in fields.values())
    assert (fields["passages"]["items"], fields["top_n"]["default"]) == ({"type": "string"}, 5)
    assert tool.annotations.read_only_hint


class Recorder(LengthReranker):
    async def ascore_pairs(self, pairs, *, overflow=None, instruction=None):
        self.instruction = instruction
        return self.score_pairs(pairs)


async def test_an_instruction_is_an_argument_where_the_model_takes_one():
    recorder = Recorder()
    async with connected(recorder, with_instruction=True) as client:
        (tool,) = (await client.list_tools()).tools
        assert "instruction" in tool.input_schema["properties"]
        await results(client, instruction="prefer the newest")
        assert recorder.instruction == "prefer the newest"
        await results(client)
        assert recorder.instruction is None
    async with connected(recorder) as client:
        assert await failure(client, instruction="x") == "instruction: Extra inputs are not permitted"


def test_the_checkpoint_or_the_protocol_says_whether_there_is_an_instruction(tmp_path):
    assert not takes_instruction(RerankSettings(model="mini"))
    assert takes_instruction(RerankSettings(model=str(qwen3_reranker(tmp_path))))
    assert takes_instruction(RerankSettings(backend="remote", base_url="http://x", protocol="vllm"))
    assert not takes_instruction(RerankSettings(backend="remote", base_url="http://x"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": " "}, "the question is empty; give the text to rank the passages by"),
        ({"passages": "a secret text"}, "passages: Input should be a valid list"),
        ({"passages": ["a", 5]}, "passages.1: Input should be a valid string"),
        ({"top_n": 0}, "top_n: Input should be greater than or equal to 1"),
        ({"topn": 3}, "topn: Extra inputs are not permitted"),
    ],
)
async def test_wrong_arguments_are_tool_errors_that_name_the_field(length_reranker, arguments, message):
    async with connected(length_reranker) as client:
        assert await failure(client, **arguments) == message


async def test_another_tool_is_a_protocol_error(length_reranker):
    async with connected(length_reranker) as client:
        with pytest.raises(MCPError, match="there is rerank"):
            await client.call_tool("search", {})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("/home/me/model is broken"), "the model is unusable; the server's log says why"),
        (KeyError("a secret text"), "the server failed (KeyError); its log says more"),
    ],
)
async def test_a_failure_is_a_tool_error_without_paths_and_texts(error, message, caplog):
    async with connected(FailingReranker(error)) as client:
        assert await failure(client) == message
    assert type(error).__name__ in caplog.text


async def test_a_model_that_cannot_be_opened_is_a_tool_error_of_each_call(caplog):
    def open_reranker():
        raise CheckpointError("there is no folder 'x'")

    async with Client(create_server(open_reranker, with_instruction=False)) as client:
        for _ in range(2):
            assert await failure(client) == "the model is unusable; the server's log says why"
    assert "the model cannot be opened: there is no folder 'x'" in caplog.text


async def test_an_endpoints_refusal_shows_no_key_and_no_address(caplog):
    with Endpoint(gives(401, {"detail": "wrong key sk-1"})) as endpoint:
        settings = RerankSettings(backend="remote", base_url=endpoint.url, protocol="nvidia", api_key="sk-1")
        async with connected(settings.open()) as client:
            assert await failure(client) == "the model's endpoint gave no usable answer; the server's log says why"
    assert "sk-1" not in caplog.text


async def test_the_reranker_is_closed_at_the_end(length_reranker):
    async with connected(length_reranker) as client:
        await results(client)
        assert not length_reranker.is_closed
    assert length_reranker.is_closed


PRINTS = """
import os
from mistral_rerank.server import mcp
from mistral_rerank.settings import RerankSettings

RerankSettings.open = lambda self: print("printed", flush=True) or os.system("echo by a child")
mcp.serve(RerankSettings(backend="remote", base_url="http://127.0.0.1:9"))
"""
"""A reranker whose library prints while it is opened, as the background does; the number that it gives is none."""


def test_standard_output_carries_the_protocol_alone_and_an_interrupt_ends_the_command():
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    call = {"name": "rerank", "arguments": {"query": QUERY, "passages": PASSAGES}}
    messages = [
        {"id": 1, "method": "initialize", "params": hello},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/call", "params": call},
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PRINTS], text=True, **pipes) as process:
        for message in messages:
            process.stdin.write(json.dumps({"jsonrpc": "2.0"} | message) + "\n")
        process.stdin.flush()
        replies = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert [reply["id"] for reply in replies] == [1, 2]
        assert replies[1]["result"]["isError"]
        assert process.stdout.read() == ""
        assert "printed\nby a child\n" in process.stderr.read()


def test_a_missing_checkpoint_is_an_error_before_anything_is_served():
    result = CliRunner().invoke(app, ["mcp", "--model", "./nowhere"])
    assert isinstance(result.exception, CheckpointError)
    assert "there is no folder './nowhere'" in str(result.exception)
    assert result.output == ""
