"""A store whose values only this attempt's tasks can make.

TCPStore knows no users: whoever reaches its port can list, read and write its keys, other users of the node among them.
What our tasks say to each other over it (commands to the rollout workers, folders to save into, addresses of gloo's
peers) is therefore signed with a key that stands in the attempt's folder, which nobody else can read. Reading is not
prevented: nothing secret goes over the store. Megatron's own rendezvous runs over the plain store, once, at the start.

That a name is there counts only with its signature, so `wait` and `check` read what they find. A value that is written
again and again can be replaced by an earlier one of its own: who reads such a value takes only one that goes on, as a
worker's count of its progress.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from fp8slurm.core.files import patiently, read_json

SIGNATURE_BYTES = hashlib.sha256().digest_size


class ForgedError(RuntimeError):
    """A value in the store was not written by a task of this attempt."""


def new_key() -> str:
    """A key for one attempt, as text."""
    return secrets.token_hex(32)


def read_key(path: Path) -> str:
    """The key in the file that tells the tasks where the store is."""
    return patiently(lambda: read_json(path))["key"]


class SignedStore(dist.Store):
    """HMAC-SHA256 of name and value before every value; anything else raises ForgedError when it is read, waited for
    or looked for.

    There are no counters (`add`): the server adds without knowing the key, so anybody could count.
    """

    def __init__(self, plain: dist.Store, key: str) -> None:
        super().__init__()
        self.plain, self._key = plain, bytes.fromhex(key)

    def _sign(self, name: str, value: bytes) -> bytes:
        return hmac.digest(self._key, len(name).to_bytes(8, "big") + name.encode() + value, "sha256")

    def set(self, name: str, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.plain.set(name, self._sign(name, value) + value)  # type: ignore[arg-type]  # takes bytes, too

    def get(self, name: str) -> bytes:
        """Waits for the name. Raises ForgedError."""
        stored = self.plain.get(name)
        signature, value = stored[:SIGNATURE_BYTES], stored[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(name, value)):
            raise ForgedError(
                f"{name} in the job's store was not written by this run: somebody else writes to its port"
            )
        return value

    def wait(self, names: list[str], timeout: timedelta | None = None) -> None:
        """Until all names are there. Raises ForgedError: one is, but from somebody else."""
        self.plain.wait(names) if timeout is None else self.plain.wait(names, timeout)
        for name in names:
            self.get(name)

    def check(self, names: list[str]) -> bool:
        """Whether all names are there. Raises ForgedError: one is, but from somebody else."""
        there = [name for name in names if self.plain.check([name])]
        for name in there:
            self.get(name)
        return there == names

    def delete_key(self, name: str) -> bool:
        return self.plain.delete_key(name)

    def num_keys(self) -> int:
        return self.plain.num_keys()

    def clone(self) -> SignedStore:
        """A connection of its own, for another thread: a call that waits holds up the others of its connection."""
        return SignedStore(self.plain.clone(), self._key.hex())  # type: ignore[attr-defined]

    def set_timeout(self, timeout: timedelta) -> None:
        self.plain.set_timeout(timeout)
