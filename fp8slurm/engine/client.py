"""Talks to one SGLang server: generation by token ids, control, and the weight-update session."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import aiohttp
import numpy as np
import requests

from fp8slurm.core.errors import TransientInputError
from fp8slurm.engine.inside.digest import CHANGES_ACTION, DIGEST_ACTION
from fp8slurm.engine.inside.recorded import RECORDED, Form
from fp8slurm.engine.server import EngineError

UNVERSIONED = -1
"""Weight version of an engine that still serves the weights of its checkpoint folder."""
_CONCURRENT_REQUESTS = 128
_CONNECTIONS = 4096
"""As many as engine.max_running_requests may be."""
_PROGRESS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class GenerateRequest:
    """One sample to generate."""

    token_ids: list[int]
    """The prompt."""
    max_tokens: int
    """Most tokens of the response."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the response, besides the model's own end tokens."""
    seed: int | None = None
    """Same seed, weights and prompt: same tokens, where the engine is deterministic (EngineSettings), and on the CPU.
    Other engines on GPUs ignore it: SGLang draws by seeds under --enable-deterministic-inference alone, and before
    0.5.21 (seen with 0.5.16) only a response's first token came again. None draws anew."""
    routing: bool = False
    """Return the experts of every token; the server has to run with them (EngineSettings.return_routing)."""


@dataclass(frozen=True)
class Generation:
    """One response. The lists are all as long as token_ids."""

    token_ids: list[int]
    """What was generated, the token that stopped it included."""
    logprobs: list[float]
    """Natural log-probability of every token at the request's temperature, not renormalized for top_p and top_k."""
    finish_reason: str
    """"stop", "length" or "abort"."""
    weight_versions: list[int]
    """Version of the weights that made every token; -1 before the first update. Servers that do not stamp their tokens
    (SGLang before 0.5.20): the version when the request was sent, exact unless an update without abort came in
    between."""
    routing: np.ndarray | None = None
    """Where it was asked for: int32 [(prompt and response tokens - 1) * layers * experts per token], in that order."""


class EngineClient:
    """HTTP client of one server. EngineError: the server is gone or failed; InputError: it refuses a request.

    After an update that went wrong (`quarantine`) it refuses to generate: the server may hold half of it.
    """

    def __init__(self, url: str, api_key: str, timeout_s: float = 3600.0) -> None:
        """timeout_s: deadline of one request, in seconds."""
        self.url, self.timeout_s = url, timeout_s
        self.weight_version = UNVERSIONED
        self._quarantined: str | None = None
        self._has_sessions: bool | None = None
        self._tells_progress = True
        self._api_key = api_key
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy is nothing for loopback
        self._session.headers["Authorization"] = f"Bearer {api_key}"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
        self._session.mount("http://", adapter)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(self, batch: Sequence[GenerateRequest], one_batch: bool = False) -> list[Generation]:
        """Responses in the order of the requests.

        one_batch sends all of them in one request. They are then computed in the same composition every time, and
        requests whose seeds count give the same bits; otherwise neighbours with the same prompt go together, all at
        once.
        """
        if not batch:
            return []
        self._refuse_in_quarantine()
        if one_batch:
            return self._generate(batch)
        groups = [list(g) for _, g in groupby(batch, key=lambda request: request.token_ids)]
        with ThreadPoolExecutor(min(len(groups), _CONCURRENT_REQUESTS)) as pool:
            return [generation for group in pool.map(self._generate, groups) for generation in group]

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token after the first of each sequence, given those before it (lengths minus 1)."""
        if not token_id_lists:
            return []
        self._refuse_in_quarantine()
        answer = self._post(
            "/generate",
            {
                "input_ids": [list(ids) for ids in token_id_lists],
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        return [[entry[0] for entry in one["meta_info"]["input_token_logprobs"][1:]] for one in answer]

    async def complete(self, http: aiohttp.ClientSession, request: GenerateRequest) -> Generation:
        """`generate` of one request, from an asyncio loop; `http` is the loop's, for all clients."""
        self._refuse_in_quarantine()
        begun, headers = self.weight_version, {"Authorization": f"Bearer {self._api_key}"}
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        url = self.url + "/generate"
        try:
            async with http.post(url, json=_body([request]), headers=headers, timeout=timeout) as response:
                status, text = response.status, await response.text()
        except TimeoutError as error:
            raise EngineError(f"{url} did not answer within {self.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineError(f"{url}: the connection broke: {error}") from error
        _check_status("/generate", url, status, text, (200,))
        (answer,) = json.loads(text)
        return self._generation(answer, begun)

    def abort_all(self) -> None:
        """End all requests: they are answered with the tokens so far."""
        self._post("/abort_request", {"rid": "", "abort_all": True})

    def _generate(self, batch: Sequence[GenerateRequest]) -> list[Generation]:
        begun = self.weight_version
        return [self._generation(one, begun) for one in self._post("/generate", _body(batch))]

    def _generation(self, answer: dict[str, Any], begun: int) -> Generation:
        """begun: the version when the request was sent; stands in where the server does not stamp its tokens."""
        meta = answer["meta_info"]
        logprobs = meta.get("output_token_logprobs") or []  # none where a request was ended before it began
        ids = [entry[1] for entry in logprobs]
        versions = [begun] * len(ids)
        for span in meta.get("weight_versions") or ():
            for i in range(span["start"], min(span["end"], len(ids))):
                versions[i] = _version(span["version"])
        routing = meta.get("routed_experts")
        experts = None if routing is None else np.frombuffer(base64.b64decode(routing), dtype="<i4")
        return Generation(ids, [entry[0] for entry in logprobs], meta["finish_reason"]["type"], versions, experts)

    # -- control -------------------------------------------------------------------------------------------------

    def pause(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        """Stop generating: running requests are ended, put back into the queue, or kept as they are."""
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Go on after pause()."""
        self._post("/continue_generation", {})

    def flush_cache(self, if_idle: bool = False) -> None:
        """Forget all cached keys and values. While requests run the server refuses: EngineError, unless if_idle."""
        self._request("POST", "/flush_cache", accept=(200, 400) if if_idle else (200,))

    def model_info(self) -> dict[str, Any]:
        """SGLang's /model_info: model_path, weight_version and more."""
        return self._request("GET", "/model_info").json()

    def server_info(self) -> dict[str, Any]:
        """SGLang's /server_info: its settings and the state of its schedulers, the API key masked."""
        return json.loads(self._request("GET", "/server_info").text.replace(self._api_key, "***"))

    def progress(self) -> tuple[Any, ...] | None:
        """Something that changes whenever the server's schedulers have computed anything; None where it does not tell.

        SGLang's /v1/loads: running and waiting requests, used tokens of the cache, steps so far. The schedulers write
        them into shared memory after every batch anyway and are not asked. Raises EngineError: no answer within
        seconds."""
        if not self._tells_progress:
            return None
        response = self._request("GET", "/v1/loads?include=core", accept=(200, 404), timeout_s=_PROGRESS_TIMEOUT_S)
        self._tells_progress = response.status_code == 200
        if not self._tells_progress:
            return None
        return tuple(
            str(sorted((k, v) for k, v in load.items() if k != "timestamp")) for load in response.json()["loads"]
        )

    def quarantine(self, reason: str) -> None:
        """Refuse to generate from now on, for this reason; a restarted server gets a new client."""
        self._quarantined = reason

    def _refuse_in_quarantine(self) -> None:
        if self._quarantined is not None:
            raise EngineError(f"{self.url} must not generate: {self._quarantined}")

    # -- weights -------------------------------------------------------------------------------------------------

    def join_group(
        self, name: str, port: int, world_size: int, backend: str, address: str = "127.0.0.1", first_rank: int = 1
    ) -> None:
        """Have the server's ranks join group `name` as ranks `first_rank` and following, by a store on address:port."""
        body = {"master_address": address, "master_port": port, "rank_offset": first_rank, "world_size": world_size}
        self._post("/init_weights_update_group", {**body, "group_name": name, "backend": backend})

    def leave_group(self, name: str) -> None:
        self._post("/destroy_weights_update_group", {"group_name": name})

    def begin_update(self) -> bool:
        """Open an update session; False if this server knows none (SGLang before 0.5.21)."""
        if self._has_sessions is not False:
            self._has_sessions = self._request("POST", "/begin_weight_update", {}, (200, 404)).status_code == 200
        return self._has_sessions

    def receive_bucket(self, group: str, forms: Sequence[Form]) -> None:
        """Have the server's ranks receive one flat broadcast from rank 0 of `group`; returns when it is loaded."""
        names, dtypes, shapes = [f[0] for f in forms], [f[1] for f in forms], [list(f[2]) for f in forms]
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group, "flush_cache": False}
        self._post("/update_weights_from_distributed", {**body, "load_format": "flattened_bucket"})

    def receive_handles(self, handles: list[str]) -> None:
        """Have each of the server's ranks load one flat bucket from memory that it maps (sync/transport.py)."""
        body = {"serialized_named_tensors": handles, "load_format": "flattened_bucket", "flush_cache": False}
        self._post("/update_weights_from_tensor", body)

    def release_memory(self) -> None:
        """Give the GPU memory of weights, KV cache and CUDA graphs back, contents and all. Nothing may be running."""
        self._post("/release_memory_occupation", {})

    def resume_memory(self) -> None:
        """Take that memory again; the weights have to be loaded anew."""
        self._post("/resume_memory_occupation", {})

    def end_update(self) -> None:
        self._post("/end_weight_update", {})

    def set_weight_version(self, version: int) -> None:
        """Stamp tokens with `version` from now on."""
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.weight_version = version

    def digest(self) -> list[dict[str, str]]:
        """sha256 of every parameter's raw bytes by name, one dict a tensor-parallel rank (inside/plugin.py)."""
        return [{k: v for k, v in checksums.items() if k != RECORDED} for checksums in self._checksums()]

    def recorded(self) -> list[list[int]]:
        """How often each bucket was loaded by its recorded copies (inside/recorded.py), by tensor-parallel rank."""
        return [json.loads(checksums[RECORDED]) for checksums in self._checksums()]

    def changes_refused(self) -> list[str]:
        """Why buckets that the server has loaded take no changes alone (inside/recorded.py), of all ranks; [] if all
        do."""
        return list(dict.fromkeys(why for rank in self._checksums(CHANGES_ACTION) for why in rank.values()))

    def _checksums(self, action: str = DIGEST_ACTION) -> list[dict[str, str]]:
        ranks = self._post("/weights_checker", {"action": action})["ranks"]

        def number(rank: dict[str, Any]) -> int:
            info = rank["parallelism_info"]  # one for every role; older servers have a single one
            return (info[0] if isinstance(info, list) else info)["rank"]

        ranks.sort(key=number)
        return [rank["checksums"] for rank in ranks]

    # -- http ----------------------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        response = self._request("POST", path, body)
        try:
            return response.json()
        except requests.exceptions.JSONDecodeError:
            return response.text

    def _request(
        self, method: str, path: str, body: Any = None, accept: tuple[int, ...] = (200,), timeout_s: float | None = None
    ) -> requests.Response:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            response = self._session.request(method, self.url + path, json=body, timeout=timeout_s)
        except requests.exceptions.Timeout as error:
            raise EngineError(f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except requests.exceptions.RequestException as error:
            raise EngineError(f"{self.url}{path}: the connection broke: {error}") from error
        _check_status(path, self.url + path, response.status_code, response.text, accept)
        return response


def _check_status(path: str, url: str, status: int, text: str, accept: tuple[int, ...]) -> None:
    if status == 400 and path == "/generate":
        raise TransientInputError(f"the engine refused a request: {text[:1000]}")
    if status not in accept:
        raise EngineError(f"{url} answered {status}: {text[:1000]}")


def _body(batch: Sequence[GenerateRequest]) -> dict[str, Any]:
    body = {
        # a list of prompts is scheduled as one; one prompt with n > 1 is not
        "input_ids": [list(request.token_ids) for request in batch],
        "sampling_params": [_sampling_params(request) for request in batch],
        "return_logprob": True,
    }
    if any(request.routing for request in batch):
        body["return_routed_experts"] = True
    return body


def _sampling_params(request: GenerateRequest) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop_token_ids": list(request.stop_token_ids),
    }
    if request.seed is not None:
        params["sampling_seed"] = request.seed
    return params


def _version(text: str) -> int:
    return UNVERSIONED if text == "default" else int(text)
