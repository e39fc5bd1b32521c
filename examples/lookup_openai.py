"""examples/lookup.py by an agent that knows OpenAI's interface only: the same conversations, token for token.

    python examples/lookup.py data/lookup
    python -m examples.lookup_openai models/tiny models/lookup
    fp8slurm train --recipe examples/lookup.toml --run.name openai-0 --model.hf-checkpoint models/lookup \
                   --rollout.generate examples.lookup_openai:generate

The second line copies the model and gives it a chat template that writes messages as lookup.py writes text.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8slurm.agents.openai_client import openai_client

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from fp8slurm.core.types import Prompt, Sample
    from fp8slurm.sessions.session import Session

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"


async def generate(session: Session, prompt: Prompt) -> list[Sample]:
    """One call of the tool, if the model makes one, and then its answer."""
    async with openai_client(session.base_url, session.api_key) as client:
        await agent(client, str(prompt.content), prompt.row["table"])
    return session.samples()


async def agent(client: AsyncOpenAI, question: str, table: dict[str, str]) -> None:
    messages: list[Any] = [{"role": "user", "content": question}]
    said = (await client.chat.completions.create(model="policy", messages=messages)).choices[0]
    if said.finish_reason == "stop" and said.message.content in table:
        messages += [said.message.model_dump(exclude_none=True)]
        messages += [{"role": "user", "content": f"={table[said.message.content]}>"}]
        await client.chat.completions.create(model="policy", messages=messages)


def write_model(origin: Path, folder: Path) -> None:
    """A copy with this chat template."""
    shutil.copytree(origin, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), Path(sys.argv[2]))
