"""An agent that knows OpenAI's interface only, trained through a session's endpoint (docs/agents.md)."""

from __future__ import annotations

import ast
import json
import operator
from typing import TYPE_CHECKING, Any

from fp8slurm.agents.openai_client import openai_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI

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
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def generate(session: Session, prompt: Prompt) -> list[Sample]:
    """The agent asks until the model calls no tool any more."""
    async with openai_client(session.base_url, session.api_key) as client:
        await agent(client, prompt.content)
    return session.samples()


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
