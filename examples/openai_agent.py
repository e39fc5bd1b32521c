"""An agent that knows OpenAI's interface only, trained through a session's endpoint (docs/agents.md)."""

from __future__ import annotations

import ast
import json
import operator
import ssl
from typing import TYPE_CHECKING, Any

import httpx
from openai import AsyncOpenAI

if TYPE_CHECKING:
    from fp8slurm.core.types import Prompt, Sample
    from fp8slurm.sessions.session import Session

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "The value of an arithmetic expression",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The address is http on loopback. Otherwise each client would load all certificates, which takes 20 ms."""
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def generate(session: Session, prompt: Prompt) -> list[Sample]:
    """The agent asks until the model calls no tool any more."""
    async with client_of(session) as client:
        await agent(client, prompt.content)
    return session.samples()


def client_of(session: Session) -> AsyncOpenAI:
    """One for each conversation: with many connections in one client each request looks at all of them. It goes through
    no proxy of the environment's, and waits as long as a turn takes."""
    http = httpx.AsyncClient(verify=NO_TLS, trust_env=False, timeout=None)
    return AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, http_client=http)


async def agent(client: AsyncOpenAI, question: str | list[dict[str, Any]], turns: int = 4) -> str | None:
    """Any agent could stand here."""
    messages: list[Any] = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    for _ in range(turns):
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[CALCULATOR])
        message = answer.choices[0].message
        if not message.tool_calls:
            return message.content
        messages.append(message.model_dump(exclude_none=True))
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": calculate(call.function.arguments)}
            for call in message.tool_calls
        ]
    return None


def calculate(arguments: str) -> str:
    """The tool. What the model gets wrong is its answer, not an exception."""
    try:
        return str(value(ast.parse(json.loads(arguments)["expression"], mode="eval").body))
    except Exception as error:
        return f"error: {type(error).__name__}"


def value(node: ast.AST) -> int:
    """Of whole numbers, sums, differences and products."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("no arithmetic")
