"""OpenAI's own client, as many conversations at a time need it at a session's endpoint (sessions/endpoint.py)."""

from __future__ import annotations

import ssl

import httpx
from openai import AsyncOpenAI

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Without certificates, whose loading takes each client 20 ms: the endpoint is http on loopback."""


def openai_client(base_url: str, api_key: str) -> AsyncOpenAI:
    """A client for one conversation: at each request a client looks at all connections that it has.

    It goes through no proxy that the environment names, waits as long as a turn takes, and asks once: what is sampled
    twice would be trained on twice.
    """
    http = httpx.AsyncClient(verify=_NO_TLS, trust_env=False, timeout=None)
    return AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, http_client=http)
