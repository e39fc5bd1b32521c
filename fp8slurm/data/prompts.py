"""Prompts and supervised examples from JSONL or parquet, tokenized; and the order in which a run takes them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fp8slurm.config.schema import DataSection, SftSection
from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import read_json
from fp8slurm.core.types import Prompt
from fp8slurm.data import SUFFIXES, reasoning_gym
from fp8slurm.models.spec import ModelSpec

log = logging.getLogger(__name__)

TEXTS_PER_CALL = 1024
"""Prompts that are tokenized in one call."""
MOST_LINE_BYTES = 256 << 20
MOST_TOKENS = 10_000_000
MOST_NESTED = 100
"""Lists and objects in each other in one row."""
WARNINGS = 5
"""Bad lines that are logged one by one; all are counted."""
MISSING = object()
OWN_TEMPLATE_ARGUMENTS = ("add_generation_prompt", "tokenize", "return_dict", "return_tensors")


Content = str | list[dict[str, Any]]
"""A prompt as the data has it: text, or messages."""


class BadRow(InputError):
    """One row that cannot be used."""


@dataclass(frozen=True)
class SftExample:
    """A prompt with the response to imitate."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Ends with the tokenizer's end token."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local Hugging Face folder; InputError if there is none."""
    from transformers import AutoConfig, AutoTokenizer

    if not Path(folder).is_dir():
        raise TransientInputError(f"model folder {folder} does not exist (model.hf_checkpoint)")
    if (vocabulary := Path(folder) / "tokenizer.json").is_file():
        _check_numbers(vocabulary)
    try:
        if (config := Path(folder) / "config.json").is_file():
            AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise TransientInputError(
            f"{config}: transformers refuses it, with which SGLang and the tokenizer read it: {_on_one_line(error)}"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokens = tokenizer(["a 1"], add_special_tokens=False)["input_ids"][0]
        tokenizer.decode(tokens)  # what is damaged may show in use
    except BaseException as error:  # damaged files raise anything, the library's own parser a BaseException
        # An OSError without a number is how transformers says that a file is missing.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TransientInputError(
            f"{folder}: no tokenizer that can be read (tokenizer.json, tokenizer_config.json): {_on_one_line(error)}"
        ) from None
    if not tokens:
        gone = ", ".join(n for n in ("tokenizer.json", "tokenizer_config.json") if not (Path(folder) / n).is_file())
        raise TransientInputError(
            f"{folder}: its tokenizer has no vocabulary, and makes no token of 'a 1' "
            f"({f'{gone} is not there' if gone else f'{vocabulary}: model.vocab is empty'}); allowed: the tokenizer's "
            f"files of the model"
        )
    return tokenizer


def _on_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_numbers(path: Path) -> None:
    """The library makes room for the largest id that it reads, or ends the process where there is none."""
    left: list[Any] = [read_json(path)]
    while left:
        held = left.pop()
        for value in held.values() if isinstance(held, dict) else held:
            if isinstance(value, (dict, list)):
                left.append(value)
            elif isinstance(value, (int, float)) and not abs(value) <= MOST_TOKENS:
                raise TransientInputError(f"{path}: {value!r:.50} is no number of a tokenizer; at most {MOST_TOKENS}")


def end_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Every token that ends a response, ascending: eos_token_id of generation_config.json and config.json, and
    `unlisted_ends`.

    InputError: there is none, or one is beyond the model's embedding.
    """
    ends = sorted({*_listed_ends(folder), *unlisted_ends(folder, tokenizer)})
    if not ends:
        raise InputError(f"{folder}: neither generation_config.json nor config.json has an eos_token_id")
    rows = _spec(tokenizer).vocab_size
    if ends[-1] >= rows:
        raise InputError(f"{folder}: eos_token_id {ends[-1]}: the model has {rows} tokens; allowed: 0 to {rows - 1}")
    return ends


def unlisted_ends(folder: Path, tokenizer: Any) -> dict[int, str]:
    """Tokens that end a response though no eos_token_id names them, and what says so.

    A base model that was tuned with a chat template often has only its own end of text there: a response would run on
    behind the end of its turn until max_tokens. Supervised examples end with the tokenizer's eos_token.
    """
    ends = {_end_of_turn(tokenizer): "the chat template writes it behind an answer"}
    ends[tokenizer.eos_token_id] = "the tokenizer's eos_token"
    listed = _listed_ends(folder)
    return {token: why for token, why in ends.items() if token is not None and token not in listed}


def _listed_ends(folder: Path) -> set[int]:
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if path.is_file():
            value = read_json(path).get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int and token >= 0 for token in listed):
                raise InputError(f"{path}: eos_token_id = {value!r}; allowed: a token, a list of tokens, or null")
            ends.update(listed)
    return ends


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first special token behind what an assistant says; None without a chat template, or where it writes none."""
    if not tokenizer.chat_template:
        return None
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise what they like
        log.warning("the chat template refuses a question with its answer (%s): its end of turn is not known", error)
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((i for i in encode(tokenizer, [text.rpartition(answer)[2]])[0] if i in special), None)


def load_prompts(
    data: DataSection, tokenizer: Any, path: Path, limit: int | None = None,
    label_error: Callable[[str], str | None] = lambda label: None,
) -> list[Prompt]:  # fmt: skip
    """The prompts of one file, in the file's order; `Prompt.index` is the row (from 0, blank lines of a JSONL counted).

    A prompt is text, tokenized as it stands, or a list of messages, to which the chat template is applied with the
    generation prompt and data.chat_template_kwargs. Prompts longer than data.max_prompt_tokens are left out; how many
    is logged. InputError: no such file, a row that cannot be used (file and line are named; with on_bad_line = "skip"
    it is counted and logged instead), or no prompt left. `limit`: read only that many rows. label_error: why no
    response could equal a label under the run's reward, or None; such a row cannot be used.
    """

    def read(row: dict) -> tuple[Content, str]:
        label = _label(row, data.label_key, "data.label_key") if data.label_key else ""
        if (error := label_error(label)) is not None:
            raise BadRow(f"{error} (data.label_key)")
        return prompt_content(row, data.prompt_key), label

    return [
        Prompt(r.index, tuple(r.token_ids), r.value, opens_thinking(tokenizer, r.token_ids), r.content, r.row)
        for r in _rows(path, data, tokenizer, read, limit)
    ]


def opens_thinking(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt ends inside <think>, as Qwen3-Thinking's template leaves it."""
    return tokenizer.decode(ids[-4:]).rstrip().endswith("<think>")


def load_sft(
    data: DataSection, sft: SftSection, tokenizer: Any, path: Path | None = None, limit: int | None = None
) -> list[SftExample]:
    """The supervised examples of sft.data (or `path`): prompts as in load_prompts, with the same template, filter and
    errors; the response's tokens followed by the tokenizer's end token.

    InputError besides: the chat template ends an answer to messages with another token than that.
    """
    path = path if path is not None else sft.data
    if path is None:
        raise InputError("sft.data is not set: no supervised examples to load")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token, with which a response must end (tokenizer_config.json)")
    rows = _rows(path, data, tokenizer, lambda row: _example(row, sft.prompt_key or data.prompt_key, sft), limit)
    _check_end(path, rows, tokenizer)
    positions = _spec(tokenizer).max_position_embeddings
    responses = encode(tokenizer, [r.value for r in rows], positions)
    end = (tokenizer.eos_token_id,)
    for row, response in zip(rows, responses):
        check_tokens(f"{path}:{row.index + 1}", response, tokenizer)
        tokens = len(row.token_ids) + len(response) + 1
        if tokens > positions:
            raise InputError(
                f"{path}:{row.index + 1}: prompt and response have at least {tokens} tokens with the end token; the "
                f"model has {positions} positions (max_position_embeddings)"
            )
    return [SftExample(tuple(r.token_ids), tuple(response) + end) for r, response in zip(rows, responses)]


def _example(row: dict, prompt_key: str, sft: SftSection) -> tuple[Content, str]:
    """(prompt, response) of a row. BadRow."""
    content = prompt_content(row, prompt_key)
    given = lookup(row, sft.response_key)
    if given is MISSING and isinstance(content, list) and len(content) > 1 and content[-1]["role"] == "assistant":
        return content[:-1], whole_text(content[-1]["content"], "the response")
    given = _messages(given)
    if not isinstance(given, list):
        return content, _label(row, sft.response_key, "sft.response_key")
    if len(given) != 1 or not isinstance(given[0], dict) or given[0].get("role") != "assistant":
        what = f"{sft.response_key!r} is text or one message of the assistant"
        raise BadRow(f"{what}, not {reprlib.repr(given)} (sft.response_key)")
    return content, _label(given[0], "content", "sft.response_key")


def _check_end(path: Path, rows: list[_Row], tokenizer: Any) -> None:
    """What is trained as the end of an answer to messages must be what the chat template writes there: both stop a
    response, but every later turn, and every other engine, would see the template's."""
    end, of_turn = tokenizer.eos_token_id, _end_of_turn(tokenizer)
    row = next((r for r in rows if not isinstance(r.content, str)), None)
    if row is not None and of_turn is not None and of_turn != end:
        raise InputError(
            f"{path}:{row.index + 1}: supervised examples end with the tokenizer's eos_token, {end} "
            f"({tokenizer.convert_ids_to_tokens(end)}), but the chat template ends an answer with {of_turn} "
            f"({tokenizer.convert_ids_to_tokens(of_turn)}); allowed: that one as eos_token of "
            f"{tokenizer.name_or_path}/tokenizer_config.json, or prompts as text (data.prompt_key)"
        )


@dataclass(frozen=True)
class PromptOrder:
    """The endless order in which n prompts are taken: epoch after epoch, each a new permutation if `shuffle`.

    The order is a function of (n, seed, shuffle) alone: one integer, the cursor, is all that a checkpoint keeps.
    """

    n: int
    seed: int
    shuffle: bool = True
    source: int = 0
    """Number of the data source: each has orders of its own."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("no prompts to order: the data set is empty")

    def take(self, cursor: int, k: int) -> tuple[list[int], int]:
        """(k positions in 0..n-1 from `cursor` on, the next cursor). The cursor counts all prompts ever taken."""
        taken: list[int] = []
        while len(taken) < k:
            epoch, start = divmod(cursor + len(taken), self.n)
            taken += self._epoch(epoch)[start : start + k - len(taken)]
        return taken, cursor + k

    def _epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.n))
        entropy = [self.seed, epoch] + ([self.source] if self.source else [])
        return np.random.Generator(np.random.PCG64(entropy)).permutation(self.n).tolist()


@dataclass(frozen=True)
class _Row:
    """A usable row of a data file, from 0; `value` is its label or response."""

    index: int
    token_ids: list[int]
    value: str
    content: Content
    row: dict[str, Any]


def _rows(
    path: Path, data: DataSection, tokenizer: Any, parts: Callable[[dict], tuple[Content, str]],
    limit: int | None = None,
) -> list[_Row]:  # fmt: skip
    """Every usable row whose prompt is short enough; parts: prompt, and label or response of a row."""
    path = Path(path)
    check_template_arguments(data.chat_template_kwargs)
    used: list[tuple[int, str, Content, dict[str, Any]]] = []
    texts, bad = [], 0
    for index, read in islice(read_rows(path), limit):
        try:
            row = read()
            content, value = parts(row)
            text = render(content, data, tokenizer)
            used.append((index, value, content, row))
        except BadRow as error:
            where = f"{path}:{index + 1}"
            if data.on_bad_line == "error":
                raise InputError(f'{where}: {error}. data.on_bad_line = "skip" leaves such lines out') from None
            bad += 1
            if bad <= WARNINGS:
                log.warning("%s left out: %s", where, error)
            continue
        texts.append(text)
    ids = encode(tokenizer, texts, data.max_prompt_tokens)
    kept = [
        _Row(index, tokens, value, content, row)
        for (index, value, content, row), tokens in zip(used, ids)
        if 0 < len(tokens) <= data.max_prompt_tokens
    ]
    for r in kept:
        check_tokens(f"{path}:{r.index + 1}", r.token_ids, tokenizer)
    long = len(ids) - len(kept)
    if bad:
        log.warning("%s: %d bad lines left out", path, bad)
    if long:
        why = f"empty or longer than data.max_prompt_tokens = {data.max_prompt_tokens} tokens"
        log.warning("%s: %d of %d prompts left out: %s", path, long, len(ids), why)
    if not kept:
        raise InputError(
            f"{path} is an empty data set: 0 prompts to use, {bad} bad lines left out, "
            f"{long} prompts empty or longer than data.max_prompt_tokens = {data.max_prompt_tokens}"
        )
    return kept


def read_rows(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    """(row index, function that parses the row or raises BadRow), blank lines left out."""
    if not path.is_file():
        what = "is a folder; allowed: a .jsonl or .parquet file" if path.is_dir() else "does not exist"
        raise TransientInputError(f"data file {path} {what}")
    if path.suffix == reasoning_gym.SUFFIX:
        yield from ((number, partial(dict, row)) for number, row in enumerate(reasoning_gym.read_task(path).rows()))
        return
    if path.suffix not in SUFFIXES:
        raise InputError(f"data file {path}: {path.suffix or 'no suffix'!r} is not one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with open(path, "rb") as f:
        index = 0
        while line := f.readline(MOST_LINE_BYTES + 1):
            too_long = len(line) > MOST_LINE_BYTES
            while too_long and not line.endswith(b"\n") and (line := f.readline(MOST_LINE_BYTES)):
                pass
            if not too_long and not line.endswith(b"\n"):
                _check_read_whole(f, path)
            if too_long or line.strip():
                yield index, _refuse_long if too_long else partial(_parse, line)
            index += 1
        _check_read_whole(f, path)


def _check_read_whole(file: BinaryIO, path: Path) -> None:
    """Python's files answer EAGAIN as if they ended there: rows would be missing, or cut. OSError."""
    if file.tell() < os.fstat(file.fileno()).st_size:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def _refuse_long() -> dict:
    raise BadRow(f"a line of more than {MOST_LINE_BYTES} bytes")


def _read_parquet(path: Path) -> Iterator[tuple[int, Callable[[], dict]]]:
    import pyarrow
    import pyarrow.parquet as parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"{path} has several columns called {twice[0]!r}; allowed: one")
            for batch in file.iter_batches(batch_size=TEXTS_PER_CALL):
                for row in batch.to_pylist():
                    yield index, partial(dict, row)
                    index += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # altered pages, dates beyond 9999
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # the file system's has a number
        raise TransientInputError(f"{path} is not a readable parquet file (row {index} or later): {error}") from None


def _parse(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_no_repeats)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise BadRow(f"a JSON object is expected, not {type(row).__name__}")
    if line.count(b"[") + line.count(b"{") > MOST_NESTED and _nested(row):
        raise BadRow(f"more than {MOST_NESTED} lists and objects in each other")
    return row


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise BadRow("a key stands twice in an object")
    return unique


def _nested(row: dict) -> bool:
    level: list[Any] = [row]
    for _ in range(MOST_NESTED):
        level = [v for held in level for v in (held.values() if isinstance(held, dict) else held)]
        level = [v for v in level if isinstance(v, (dict, list))]
    return bool(level)


def lookup(row: dict, key: str) -> Any:
    """The value of a key or, where there is no such key, of a path with dots through objects; MISSING."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def _field(row: dict, key: str, flag: str) -> Any:
    value = lookup(row, key)
    if value is None:
        raise BadRow(f"{key!r} is null ({flag})")
    if value is MISSING:
        raise BadRow(f"no {key!r} among its keys {sorted(row)} ({flag})")
    return value


def _label(row: dict, key: str, flag: str) -> str:
    return label_text(_field(row, key, flag), repr(key), f" ({flag})")


def label_text(value: Any, what: str, where: str = "") -> str:
    """A label as text: 64.0 is 64, since a column of whole numbers with a gap in it becomes one of floats. BadRow."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"{what} is text or a number, not {type(value).__name__}{where}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"{what} is {value}, which no answer equals{where}")
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
    return whole_text(str(value), what)


def whole_text(text: str, what: str) -> str:
    """BadRow: JSON can write half of a character (\\ud83d), which no tokenizer takes and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} has half of a surrogate pair at character {error.start}") from None
    return text


def _messages(prompt: Any) -> Any:
    """A prompt; messages that were kept as JSON text (a column of strings) are messages again."""
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("["):
        return prompt
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError):
        return prompt
    fits = (
        isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )
    return value if fits else prompt


def prompt_content(row: dict, key: str) -> Content:
    """The prompt of a row: text, or messages. BadRow: neither."""
    prompt = _messages(_field(row, key, "data.prompt_key"))
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise BadRow(f"{key!r} is text or a list of messages, not {reprlib.repr(prompt)} (data.prompt_key)")
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"a message is an object with the texts role and content, not {reprlib.repr(message)}")
    return [{k: v for k, v in message.items() if v is not None} for message in prompt]


@dataclass(frozen=True)
class Doubts:
    """What contradicts itself in prompts or questions, in words."""

    unmeant: list[str]
    """Nobody can have meant."""
    unusual: list[str]
    """Somebody may have meant."""


def last_turns(prompts: Sequence[tuple[str, Content]]) -> Doubts:
    """Prompts, each with the name of its place, whose messages do not end with a turn that asks for something."""
    found: dict[str, list[str]] = {}
    for where, content in prompts:
        if isinstance(content, str):
            continue
        role = content[-1]["role"]
        if role not in ("user", "tool"):
            found.setdefault(f"end with a turn of {role!r}", []).append(where)
        elif not content[-1]["content"].strip():
            found.setdefault("end with an empty turn", []).append(where)
    doubts = Doubts([], [])
    for what, places in found.items():
        text = f"{len(places)} of {len(prompts)} prompts {what} ({places[0]} first)"
        if what == "end with a turn of 'assistant'":
            doubts.unmeant.append(
                f"{text}: the model would be asked for another answer behind it; allowed: a last turn of 'user' (in "
                f"--sft.data the last turn is the response)"
            )
        else:
            doubts.unusual.append(f"{text}, not with one of 'user'")
    return doubts


def render(content: Content, data: DataSection, tokenizer: Any) -> str:
    """What is tokenized: text as it stands, messages through the chat template. BadRow: the template refuses them, or
    it is no whole text."""
    if isinstance(content, str):
        return whole_text(content, "the prompt")
    if not tokenizer.chat_template:
        raise InputError(
            f"{data.prompt_key!r} holds messages, but the tokenizer of {tokenizer.name_or_path} has no chat template: "
            "use a tokenizer with one, or give the prompts as text"
        )
    try:
        text = tokenizer.apply_chat_template(
            content, tokenize=False, add_generation_prompt=True, **data.chat_template_kwargs
        )
    except Exception as error:  # templates raise what they like
        raise BadRow(f"the chat template refuses it: {error}") from None
    return whole_text(text, "the prompt")


def check_template_arguments(arguments: dict[str, Any]) -> None:
    taken = sorted(set(arguments) & set(OWN_TEMPLATE_ARGUMENTS))
    if taken:
        raise InputError(f"data.chat_template_kwargs must not set {', '.join(taken)}: the loader sets it")


def encode(tokenizer: Any, texts: list[str], at_most: int | None = None) -> list[list[int]]:
    """The tokens of each text. at_most: a text that has more for certain, by its length alone, is not tokenized (which
    takes minutes for one of 100 MB): as many zeros stand for it as are one too many."""
    ids: list[list[int]] = []
    too_long = set()
    if at_most is not None and any(len(text) > at_most for text in texts):
        # Four characters can be one before they are tokenized (NFC).
        longest = 4 * max(map(len, tokenizer.get_vocab()))
        too_long = {i for i, text in enumerate(texts) if len(text) > longest * at_most}
        texts = ["" if i in too_long else text for i, text in enumerate(texts)]
    for start in range(0, len(texts), TEXTS_PER_CALL):
        ids += tokenizer(texts[start : start + TEXTS_PER_CALL], add_special_tokens=False)["input_ids"]
    return [[0] * ((at_most or 0) + 1) if i in too_long else tokens for i, tokens in enumerate(ids)]


def check_tokens(where: str, tokens: Sequence[int], tokenizer: Any) -> None:
    """InputError for a token that the model has no embedding for: on a GPU it would read another row, or end the
    process."""
    rows = _spec(tokenizer).vocab_size
    if tokens and max(tokens) >= rows:
        token = max(tokens)
        raise InputError(
            f"{where}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is beyond the model's embedding of "
            f"{rows} rows (config.json: vocab_size): the tokenizer is not this model's"
        )


def _spec(tokenizer: Any) -> ModelSpec:
    """Of the model folder that the tokenizer was loaded from."""
    return _spec_of(tokenizer.name_or_path)


@lru_cache
def _spec_of(folder: str) -> ModelSpec:
    return ModelSpec.from_hf_dir(folder)


def sample_seed(seed: int, position: int | str, sample: int) -> int:
    """Seed of one sample, in [0, 2^31): the same for a prompt position and sample number in every attempt of a run.

    position: of the prompt in the run, or TASK/ID of an evaluation's question.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
