"""OpenAI's chat completions on loopback, for agents that exist already: one server a rollout worker, a key a session.

POST /v1/chat/completions and GET /v1/models. What is asked for and not there is refused in OpenAI's form of an error,
never left out without a word.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fp8slurm.core.errors import InputError, bounded
from fp8slurm.sessions.chat import Chat, ChatError, Reply
from fp8slurm.sessions.session import Message, NoRoom, Session

log = logging.getLogger(__name__)

MODEL = "policy"
"""The only model that is served."""
MOST_BODY_BYTES = 32 << 20
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "store": (False,), "parallel_tool_calls": (True,), "stop": ([],),
    "response_format": ({"type": "text"},), "tool_choice": ("auto",), "modalities": (["text"],), "functions": ([],),
}  # fmt: skip
"""Parameters that are taken where they change nothing: null, and these."""
_NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""They say nothing about the answer."""
_READ = ("model", "messages", "tools", "stream", "stream_options", "max_tokens", "max_completion_tokens")
_RUNS_OWN = ("temperature", "top_p", "top_k")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


class Refused(Exception):
    """Answered with this status and OpenAI's form of an error."""

    def __init__(self, status: int, text: str, code: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code, self.parameter = status, code, parameter


@dataclass(eq=False)
class _Open:
    """A session that has a key."""

    chat: Chat
    key: str
    requests: set[asyncio.Task[Any]] = field(default_factory=set)


_SESSION = web.RequestKey("session", _Open)


class Endpoint:
    """The server, on one event loop. It listens as soon as it is made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._socket.setblocking(False)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._open: dict[str, _Open] = {}
        self._runner: web.AppRunner | None = None
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(), loop)

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._answer], client_max_size=MOST_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, handle_signals=False)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket, backlog=1024).start()

    def open(self, session: Session) -> str:
        """A key for this session."""
        key = secrets.token_urlsafe(32)
        self._open[key] = _Open(Chat(session), key)
        return key

    def shut(self, key: str) -> None:
        """The session is over: its key is refused from now on, and its requests are ended."""
        held = self._open.pop(key, None)
        if held is None:
            return
        for task in held.requests:
            task.cancel()
        for reason, count in held.chat.branches.items():
            session = held.chat.session
            log.debug(
                "prompt %d, conversation %d: %d branches: %s", session.prompt.index, session.number, count, reason
            )

    async def close(self) -> None:
        for key in list(self._open):
            self.shut(key)
        await asyncio.wrap_future(self._serving)
        if self._runner is not None:
            await self._runner.cleanup()

    # -- requests --------------------------------------------------------------------------------------------------

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Keys first; whatever is raised becomes an answer."""
        held: _Open | None = None
        try:
            kind, _, key = request.headers.get("Authorization", "").partition(" ")
            held = self._open.get(key) if kind == "Bearer" else None
            if held is None:
                raise Refused(401, "no session has this API key (session.api_key), or it is over", "invalid_api_key")
            task = asyncio.current_task()
            assert task is not None
            held.requests.add(task)
            try:
                request[_SESSION] = held
                return await handler(request)
            finally:
                held.requests.discard(task)
        except Refused as error:
            return _error(error)
        except web.HTTPRequestEntityTooLarge:
            text = f"the body is larger than {MOST_BODY_BYTES >> 20} MiB"
            return _error(Refused(413, text, "request_too_large"))
        except web.HTTPMethodNotAllowed as error:
            return _error(
                Refused(405, f"{request.method} {request.path}: use {', '.join(error.allowed_methods)}", "method")
            )
        except web.HTTPNotFound:
            text = f"{request.path} is not there: POST /v1/chat/completions and GET /v1/models are"
            return _error(Refused(404, text, "unknown_url"))
        except ChatError as error:
            return _error(Refused(400, str(error), "invalid_value", error.parameter))
        except NoRoom as error:
            assert held is not None
            # agents look for these words
            text = f"this model's maximum context length is {held.chat.session.model.context} tokens: {error}"
            return _error(Refused(400, text, "context_length_exceeded", "messages"))
        except (InputError, ValueError) as error:
            return _error(Refused(400, bounded(str(error)), "invalid_value"))
        except Exception as error:  # the agent is told; the run's own errors do not come this way
            log.warning("a request of an agent failed: %s: %s", type(error).__name__, bounded(str(error)))
            return _error(Refused(500, f"{type(error).__name__}: {bounded(str(error))}", "server_error"))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "fp8slurm"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        held = request[_SESSION]
        body = _body(await request.read())
        messages, tools = _messages(body), _tools(body)
        _check(body, held.chat.session)
        reply = await held.chat.complete(messages, tools, _most(body))
        if reply.finish_reason == "abort":
            raise Refused(503, "the engines were stopped before the turn was over", "aborted")
        made = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": MODEL}
        if not body.get("stream"):
            return web.json_response(_whole(made, reply))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        async for piece in _pieces(made, reply, usage):
            await response.write(f"data: {json.dumps(piece)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


def _error(error: Refused) -> web.Response:
    """No client is to try the same again: what is sampled would be sampled twice."""
    kind = {401: "authentication_error", 404: "not_found_error"}.get(error.status, "invalid_request_error")
    kind = "server_error" if error.status >= 500 else kind
    said = {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}
    return web.json_response({"error": said}, status=error.status, headers={"x-should-retry": "false"})


def _body(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object", "invalid_json")
    return body


def _refuse(body: dict[str, Any], name: str, allowed: str) -> Refused:
    return Refused(400, f"{name} = {body[name]!r:.80}; allowed: {allowed}", "unsupported_value", name)


def _check(body: dict[str, Any], session: Session) -> None:
    """Every parameter is one that is read, or changes nothing."""
    if body.get("model") != MODEL:
        raise Refused(
            404, f"model {body.get('model')!r:.80} is not there; allowed: {MODEL!r}", "model_not_found", "model"
        )
    sampling = session.sampling
    for name, value in body.items():
        if value is None or name in _READ or name in _NO_EFFECT:
            continue
        if name == "tool_choice" and value == "none" and not body.get("tools"):
            continue
        if name in _RUNS_OWN:
            own = getattr(sampling, name)
            if value != own:
                raise _refuse(body, name, f"what the run samples with, rollout.{name} = {own:g}, or leave it out")
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise _refuse(body, name, f"{_NEUTRAL[name][0]!r}, or leave it out")
        else:
            raise Refused(400, f"the parameter {name!r:.80} is not known here", "unsupported_parameter", name)
    if not isinstance(body.get("stream", False), (bool, type(None))):
        raise _refuse(body, "stream", "true or false")
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and set(options) <= {"include_usage"}):
        raise _refuse(body, "stream_options", "{'include_usage': true}")


def _most(body: dict[str, Any]) -> int | None:
    given = {n: body[n] for n in ("max_tokens", "max_completion_tokens") if body.get(n) is not None}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise _refuse(body, name, "a whole number above 0")
    return min(given.values(), default=None)


def _tools(body: dict[str, Any]) -> list[dict[str, Any]]:
    tools = body.get("tools") or []
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
            text = "tools is a list of {'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
            raise Refused(400, text, "invalid_value", "tools")
    return tools


def _messages(body: dict[str, Any]) -> list[Message]:
    """As templates take them: content as one text, and nothing that is empty."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is a list of at least one message", "invalid_value", "messages")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: Any) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise Refused(400, f"{where} is no object", "invalid_value", where)
    made = {name: value for name, value in message.items() if value not in (None, [], {})}
    role = "system" if made.get("role") == "developer" else made.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        text = f"{where}.role = {role!r:.80}; allowed: system, developer (the same), user, assistant, tool"
        raise Refused(400, text, "invalid_value", f"{where}.role")
    strange = [name for name in made if name not in _MESSAGE_KEYS]
    if strange:
        raise Refused(400, f"{where}.{strange[0]} is not known here", "unsupported_value", f"{where}.{strange[0]}")
    content = made.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            text = f"{where}.content has a part that is no text"
            raise Refused(400, text, "unsupported_value", f"{where}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refused(400, f"{where}.content is no text", "invalid_value", f"{where}.content")
    for call in made.get("tool_calls", ()) if isinstance(made.get("tool_calls", ()), (list, tuple)) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function):
            text = f"{where}.tool_calls is a list of {{'function': {{'name': ..., 'arguments': ...}}}}"
            raise Refused(400, text, "invalid_value", f"{where}.tool_calls")
    return {**made, "role": role, "content": content}


def _usage(reply: Reply) -> dict[str, int]:
    said = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    return {**said, "total_tokens": reply.prompt_tokens + reply.tokens}


def _whole(made: dict[str, Any], reply: Reply) -> dict[str, Any]:
    message = (
        {**reply.message, "content": reply.message["content"] or None}
        if "tool_calls" in reply.message
        else reply.message
    )
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}
    return {**made, "object": "chat.completion", "choices": [choice], "usage": _usage(reply)}


async def _pieces(made: dict[str, Any], reply: Reply, usage: bool) -> AsyncIterator[dict[str, Any]]:
    """A turn as a stream. It is there as a whole: engines answer with whole turns."""
    message = dict(reply.message)
    deltas: list[dict[str, Any]] = [{"role": message.pop("role"), "content": ""}]
    calls = message.pop("tool_calls", [])
    deltas += [{name: text} for name, text in message.items() if text]
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(calls)]
    head = {**made, "object": "chat.completion.chunk"}
    for delta in deltas:
        yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]}
    if usage:
        yield {**head, "choices": [], "usage": _usage(reply)}
