#!/usr/bin/env python3
"""Many conversations at a time on one engine, with a tool of random latency: threads, memory, and the engine's slots.

usage: bench_sessions.py MODEL [--sessions 256] [--turns 10] [--tokens 8] [--tool-s 0.5] [--slots 64] [--agent openai] [--json FILE]
MODEL is a Hugging Face folder (make tiny-data: models/tiny). Each session has so many turns; after each the tool waits for a time
that is drawn from an exponential distribution with mean --tool-s, and its output is four tokens. With --agent openai each turn is
asked for through the endpoint by the openai client. Slots are counted while no session is over: at the end there is nothing left
to fill them with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def status_of_process(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1])


async def hold(session: Any, turns: int, tokens: int, tool_s: float) -> None:
    """One conversation by token ids."""
    chance = random.Random(session.number)
    ids = list(session.prompt.token_ids)
    for _ in range(turns):
        turn = await session.complete(ids, max_tokens=tokens)
        await asyncio.sleep(chance.expovariate(1 / tool_s))
        ids = turn.ids + [50, 51, 52, 53]


async def hold_by_openai(session: Any, client: Any, turns: int, tokens: int, tool_s: float) -> None:
    """The same by an agent of messages."""
    chance = random.Random(session.number)
    messages: list[Any] = list(session.prompt.content)
    mine = client.with_options(base_url=session.base_url, api_key=session.api_key)
    for _ in range(turns):
        answer = await mine.chat.completions.create(model="policy", messages=messages, max_tokens=tokens)
        await asyncio.sleep(chance.expovariate(1 / tool_s))
        messages += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "on"}]


class Watch:
    """Looks at this process and the engine ten times a second."""

    def __init__(self, member: Any, sessions: int) -> None:
        self.member, self.sessions, self.over = member, sessions, 0
        self.busy: list[int] = []
        self.threads = self.rss_kib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self.threads = max(self.threads, status_of_process("Threads"))
            self.rss_kib = max(self.rss_kib, status_of_process("VmRSS"))
            if not self.over:
                self.busy.append(self.member.busy)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Threads and memory are this process's, the server's are its own."""
    import httpx
    import openai

    from fp8slurm.config.schema import EngineSection, RolloutSection
    from fp8slurm.core.types import Prompt
    from fp8slurm.data.prompts import end_token_ids, load_tokenizer
    from fp8slurm.engine.client import GenerateRequest
    from fp8slurm.engine.completions import Completions
    from fp8slurm.engine.pool import EnginePool, Member
    from fp8slurm.engine.server import Engine, EngineSettings
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.sessions import runner as module
    from fp8slurm.sessions.session import Model

    section = EngineSection(max_running_requests=args.slots)
    tokenizer = load_tokenizer(args.model)
    spec = ModelSpec.from_hf_dir(args.model)
    ends = end_token_ids(args.model, tokenizer)
    content = [{"role": "user", "content": "what is the sum"}]
    text = tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
    prompt = Prompt(0, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), "", content=content)
    client = openai.AsyncOpenAI(
        base_url="http://127.0.0.1", api_key="none", timeout=3600, max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False, timeout=3600, limits=httpx.Limits(max_connections=None)),
    )  # fmt: skip

    async def generate(session: Any, prompt: Prompt) -> Any:
        if args.agent == "openai":
            await hold_by_openai(session, client, args.turns, args.tokens, args.tool_s)
        else:
            await hold(session, args.turns, args.tokens, args.tool_s)
        watch.over += 1
        return session.samples()

    with tempfile.TemporaryDirectory() as logs:
        member = Member(Engine(args.model, Path(logs), EngineSettings(section)), "engine")
        pool = EnginePool([member], section)
        completions = Completions(pool)
        module.load_generate = lambda name: generate
        runner = module.SessionRunner(
            RolloutSection(generate="bench:generate", tool_timeout_s=3600),
            Model(tokenizer, ends, spec, spec.max_position_embeddings),
        )
        try:
            pool.start()
            pool.wait_ready()
            request = GenerateRequest(list(prompt.token_ids), args.turns * args.tokens, stop_token_ids=ends)
            asked = [module.Asked(prompt, n, request) for n in range(args.sessions)]
            before = {"threads": status_of_process("Threads"), "rss_mib": status_of_process("VmRSS") >> 10}
            with Watch(member, args.sessions) as watch:
                begun, cpu = time.monotonic(), time.process_time()
                held = runner.converse(asked, module.through(completions), check=completions.check)
                seconds, spent = time.monotonic() - begun, time.process_time() - cpu
        finally:
            runner.close()
            completions.close()
            pool.stop()
    samples = [s for samples in held for s in samples]
    turns = sum(len(s.turns) for s in samples)
    return {
        "agent": args.agent, "sessions": args.sessions, "turns": turns, "branches": len(samples) - args.sessions,
        "seconds": round(seconds, 1), "turns_per_s": round(turns / seconds, 1), "before": before,
        "most": {"threads": watch.threads, "rss_mib": watch.rss_kib >> 10},
        "slots": args.slots, "slots_filled": round(statistics.mean(watch.busy or [0]) / args.slots, 3),
        "cpu_ms_a_turn": round(1000 * spent / turns, 2), "load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8, help="most tokens of a turn")
    parser.add_argument("--tool-s", type=float, default=0.5, help="mean seconds of the tool")
    parser.add_argument("--slots", type=int, default=64, help="engine.max_running_requests")
    parser.add_argument("--agent", choices=("ids", "openai"), default="ids")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = measure(args)
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
