#!/usr/bin/env python3
"""Many conversations at a time on one engine, with a tool of random latency: threads, memory, and the engine's slots.

usage: bench_sessions.py MODEL [--agents ids openai ...] [--sessions 256] [--turns 10] [--tokens 8] [--tool-s 0.5] [--slots 64]
                         [--json FILE]
MODEL is a Hugging Face folder (make tiny-data: models/tiny). Each session has so many turns; after each the tool waits for a time
that is drawn from an exponential distribution with mean --tool-s, and its output is four tokens. Agents, one after the other on the
same engine:
    ids             session.complete with token ids
    openai          the openai client through the endpoint, in this process; a client for each conversation (agents/openai_client.py)
    openai-apart    the same in a process of its own
    openai-shared   in this process, one client with one pool of connections for all
Slots are counted while no session is over: at the end there is nothing left to fill them with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
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
AGENTS = ("ids", "openai", "openai-apart", "openai-shared")


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


async def hold_by_openai(
    client: Any, number: int, messages: list[Any], turns: int, tokens: int, tool_s: float
) -> None:  # fmt: skip
    """The same by an agent of messages."""
    chance = random.Random(number)
    for _ in range(turns):
        answer = await client.chat.completions.create(model="policy", messages=messages, max_tokens=tokens)
        await asyncio.sleep(chance.expovariate(1 / tool_s))
        messages += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "on"}]


class Apart:
    """The agents' own process: given a conversation, it says when it is over, and at the end what it has computed."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_agents, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._over: dict[int, asyncio.Future[None]] = {}

    async def hold(self, number: int, *what: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._read)
        over = self._over[number] = loop.create_future()
        self._pipe.send((number, *what))
        await over

    def _read(self) -> None:
        number, error = self._pipe.recv()
        if error:
            self._over.pop(number).set_exception(RuntimeError(error))
        else:
            self._over.pop(number).set_result(None)

    def end(self) -> float:
        """Seconds of a core that it has used, its imports left out."""
        self._pipe.send(None)
        spent: float = self._pipe.recv()
        self._process.join()
        return spent


def _serve_agents(pipe: Any) -> None:
    from fp8slurm.agents.openai_client import openai_client

    async def hold(number: int, url: str, key: str, *how: Any) -> None:
        try:
            async with openai_client(url, key) as client:
                await hold_by_openai(client, number, *how)
            pipe.send((number, ""))
        except BaseException as error:  # told where somebody waits for it
            pipe.send((number, f"{type(error).__name__}: {error}"))

    async def serve() -> None:
        loop, over, tasks = asyncio.get_running_loop(), asyncio.Event(), set()

        def read() -> None:
            what = pipe.recv()
            if what is None:
                over.set()
            else:
                tasks.add(loop.create_task(hold(*what)))

        loop.add_reader(pipe.fileno(), read)
        await over.wait()
        loop.remove_reader(pipe.fileno())

    begun = time.process_time()
    asyncio.run(serve())
    pipe.send(time.process_time() - begun)


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


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A report for each of the agents. Threads and memory are this process's, the server's are its own."""
    import httpx
    import openai

    from fp8slurm.agents.openai_client import openai_client
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
    how = (args.turns, args.tokens, args.tool_s)

    async def generate(session: Any, prompt: Prompt) -> Any:
        if agent == "ids":
            await hold(session, *how)
        elif agent == "openai":
            async with openai_client(session.base_url, session.api_key) as client:
                await hold_by_openai(client, session.number, list(content), *how)
        elif agent == "openai-apart":
            await apart.hold(session.number, session.base_url, session.api_key, list(content), *how)
        else:
            mine = shared.with_options(base_url=session.base_url, api_key=session.api_key)
            await hold_by_openai(mine, session.number, list(content), *how)
        watch.over += 1
        return session.samples()

    module.load_generate = lambda name: generate
    reports = []
    with tempfile.TemporaryDirectory() as logs:
        member = Member(Engine(args.model, Path(logs), EngineSettings(section)), "engine")
        pool = EnginePool([member], section)
        completions = Completions(pool)
        try:
            pool.start()
            pool.wait_ready()
            for agent in args.agents:
                runner = module.SessionRunner(
                    RolloutSection(generate="bench:generate", tool_timeout_s=3600),
                    Model(tokenizer, ends, spec, spec.max_position_embeddings),
                )
                shared = openai.AsyncOpenAI(
                    base_url="http://127.0.0.1", api_key="none", timeout=3600, max_retries=0,
                    http_client=httpx.AsyncClient(
                        trust_env=False, timeout=3600, limits=httpx.Limits(max_connections=None)
                    ),
                )  # fmt: skip
                apart = Apart() if agent == "openai-apart" else None
                request = GenerateRequest(list(prompt.token_ids), args.turns * args.tokens, stop_token_ids=ends)
                asked = [module.Asked(prompt, n, request) for n in range(args.sessions)]
                before = {"threads": status_of_process("Threads"), "rss_mib": status_of_process("VmRSS") >> 10}
                with Watch(member, args.sessions) as watch:
                    begun, cpu = time.monotonic(), time.process_time()
                    held = runner.converse(asked, module.through(completions), check=completions.check)
                    seconds, spent = time.monotonic() - begun, time.process_time() - cpu
                runner.close()
                samples = [s for samples in held for s in samples]
                turns = sum(len(s.turns) for s in samples)
                reports.append({
                    "agent": agent, "sessions": args.sessions, "turns": turns,
                    "branches": len(samples) - args.sessions, "seconds": round(seconds, 1),
                    "turns_per_s": round(turns / seconds, 1), "before": before,
                    "most": {"threads": watch.threads, "rss_mib": watch.rss_kib >> 10}, "slots": args.slots,
                    "slots_filled": round(statistics.mean(watch.busy or [0]) / args.slots, 3),
                    "cpu_ms_a_turn": round(1000 * spent / turns, 2),
                    "agents_cpu_ms_a_turn": round(1000 * apart.end() / turns, 2) if apart else None,
                    "load": os.getloadavg()[0], "cores": len(os.sched_getaffinity(0)),
                })  # fmt: skip
                print(json.dumps(reports[-1]), flush=True)
        finally:
            completions.close()
            pool.stop()
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8, help="most tokens of a turn")
    parser.add_argument("--tool-s", type=float, default=0.5, help="mean seconds of the tool")
    parser.add_argument("--slots", type=int, default=64, help="engine.max_running_requests")
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=["ids"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reports = measure(args)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
