"""Loads of a bucket that an engine has had before: the copies alone, without SGLang's way through the names.

SGLang finds a weight's place by its name, tensor by tensor, and what it comes to in the end is `part of a
parameter.copy_(part of the weight)`. For a bucket of the same tensors at the same places these copies are the same in
every update. The first time they are written down while SGLang makes them; after that they are made at once:

    first      every name, dtype and shape travels; SGLang loads them, every operation is watched
    later      the bucket's id travels; the parameters are looked up and compared with what they were, then the copies
    delta      the changed bytes travel (engine/inside/delta.py): the copies the other way, the changes, the copies

If a load does anything else to memory than copy out of the bucket into parameters (it fills in a scalar, writes into a
buffer), or SGLang has put other tensors in the parameters' place since, SGLang loads the bucket its own way again. What
arrives can be compared in any case (sync.verify).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8slurm.engine.inside import delta

log = logging.getLogger(__name__)

Form = tuple[str, str, tuple[int, ...], int]
"""A tensor of a bucket: name, dtype without "torch.", shape, first byte."""
KNOWN = "fp8slurm-bucket:"
"""With an id behind it the name of the only tensor, uint8, of a bucket that the engine knows."""
DELTA = "fp8slurm-delta:"
"""The same with what delta_name says behind it: changes to a bucket that the engine has loaded."""
RECORDED = "fp8slurm-recorded"
"""Among the names of an engine's digests: how often each bucket was loaded by its copies, a JSON list."""


def bucket_id(forms: Iterable[Form]) -> str:
    """The same for the same tensors at the same places, in every process."""
    text = json.dumps([[name, dtype, list(shape), start] for name, dtype, shape, start in forms])
    return hashlib.sha256(text.encode()).hexdigest()


def delta_name(bucket: str, changed: int, checksum: int) -> str:
    """What changes to the bucket with this id are announced as; changed: how many bytes, checksum: delta.checksum's."""
    return f"{DELTA}{bucket}:{changed}:{checksum}"


class FlatBucket:
    """A bucket as it arrived: iterable as (name, tensor), as SGLang's loaders want it."""

    def __init__(self, flat: torch.Tensor, forms: Sequence[Form]) -> None:
        """flat: uint8 [bytes]."""
        self.flat, self.forms = flat, tuple(forms)

    def __len__(self) -> int:
        return len(self.forms)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape, start in self.forms:
            kind = getattr(torch, dtype)
            size = kind.itemsize
            for n in shape:
                size *= n
            yield name, self.flat[start : start + size].view(kind).reshape(shape)


@dataclass(frozen=True)
class Strided:
    """Bytes of a storage: sizes and strides of one or more dimensions, the last of them dense, and the first byte."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def dense(self) -> bool:
        return len(self.sizes) == 1

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """These bytes of uint8 [bytes], whose first one is number 0."""
        if self.dense:
            return memory[self.offset : self.offset + self.sizes[0]]
        return memory.as_strided(self.sizes, self.strides, memory.storage_offset() + self.offset)


@dataclass
class Copy:
    """One copy: bytes of the parameter <- bytes of the bucket."""

    parameter: str
    to: Strided
    source: Strided
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    """Of the two, where the copy converts; both are dense then."""

    def target(self, storage: torch.Tensor) -> torch.Tensor:
        view = self.to.view(storage)
        return view if self.dtypes is None else view.view(self.dtypes[0])

    def origin(self, flat: torch.Tensor) -> torch.Tensor:
        view = self.source.view(flat)
        return view if self.dtypes is None else view.view(self.dtypes[1])


@dataclass(frozen=True)
class Held:
    """What a parameter's memory looked like when its copies were written down."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage_bytes: int

    @classmethod
    def of(cls, p: torch.Tensor) -> Held:
        return cls(p.dtype, tuple(p.shape), p.stride(), int(p.storage_offset()), p.untyped_storage().nbytes())


@dataclass
class Load:
    """How a model loads one bucket."""

    forms: tuple[Form, ...]
    copies: list[Copy] | None = None
    """None: not written down yet, or not to be."""
    refused: str = ""
    """Why SGLang loads this bucket its own way every time."""
    held: dict[str, Held] = field(default_factory=dict)
    views: list[torch.Tensor] = field(default_factory=list)
    """The copies' targets, made for the memory at `addresses`."""
    addresses: dict[str, int] = field(default_factory=dict)
    replays: int = 0
    """Times that the copies were made without SGLang, changes included."""

    @property
    def nbytes(self) -> int:
        """Of the bucket."""
        _, dtype, shape, start = max(self.forms, key=lambda form: form[3])
        return start + getattr(torch, dtype).itemsize * math.prod(shape)


def loads_of(model: torch.nn.Module) -> dict[str, Load]:
    """What is known of the buckets of a model, by id."""
    return model.__dict__.setdefault("_fp8slurm_loads", {})


def load_bucket(model: torch.nn.Module, bucket: FlatBucket, original: Callable[[torch.nn.Module, Any], Any]) -> None:
    """Load a bucket into a model. original(model, pairs): SGLang's load_weights.

    Raises KeyError for a bucket that is announced by an id that this model does not know, ValueError for changes that
    are not what was announced or that cannot be made.
    """
    known = loads_of(model)
    first = bucket.forms[0][0]
    if first.startswith(DELTA):
        name, changed, checksum = first.removeprefix(DELTA).split(":")
        _change(model, bucket.flat, known[name], int(changed), int(checksum))
        return
    if first.startswith(KNOWN):
        load = known[first.removeprefix(KNOWN)]
    else:
        load = known.setdefault(bucket_id(bucket.forms), Load(bucket.forms))
    if load.copies is not None and _replay(model, bucket.flat, load):
        return
    pairs = FlatBucket(bucket.flat, load.forms)
    if load.refused:
        original(model, pairs)
        return
    with _Recorder(model, bucket.flat) as recorder:
        original(model, list(pairs))
    if overlapping(recorder.copies):
        recorder.refused = recorder.refused or "it writes twice to the same place"
    if name := recorder.moved(model):
        recorder.refused = recorder.refused or f"it gives {name} other memory"
    load.refused = recorder.refused
    load.copies = None if recorder.refused else merged(recorder.copies)
    load.held, load.views, load.addresses = recorder.held, [], {}
    if recorder.refused:
        log.info("a bucket from %s on is loaded by SGLang every time: %s", load.forms[0][0], recorder.refused)


def refusal(load: Load) -> str:
    """Why changes alone cannot be put into the bucket where it lies in the parameters; "" where they can."""
    if load.copies is None:
        return load.refused or "it has not been loaded"
    converted = next((c for c in load.copies if c.dtypes is not None), None)
    return "" if converted is None else f"{converted.parameter} has another dtype in the engine"


def refusals(model: torch.nn.Module) -> list[str]:
    """A sentence for every bucket of the model that `refusal` names a reason for."""
    named = ((load.forms[0][0], refusal(load)) for load in loads_of(model).values())
    return [f"the bucket from {first} on: {why}" for first, why in named if why]


def _change(model: torch.nn.Module, encoded: torch.Tensor, load: Load, changed: int, checksum: int) -> None:
    """Make changes (delta.encode) to a bucket that the model has loaded. This rank's part of it is read back from the
    parameters; what is other ranks' is not defined, and is not written anywhere."""
    if why := refusal(load) or ("" if _ready(model, load) else "its parameters are not what they were"):
        raise ValueError(f"changes to the bucket from {load.forms[0][0]} on cannot be made: {why}")
    if delta.checksum(encoded) != checksum:
        raise ValueError(f"changes to the bucket from {load.forms[0][0]} on arrived damaged: their checksum differs")
    assert load.copies is not None
    flat = torch.empty(load.nbytes, dtype=torch.uint8, device=encoded.device)
    parts = [copy.origin(flat) for copy in load.copies]
    with torch.no_grad():
        if parts:
            torch._foreach_copy_(parts, load.views)
        delta.apply(encoded, changed, flat)
        if parts:
            torch._foreach_copy_(load.views, parts)
    load.replays += 1


def _replay(model: torch.nn.Module, flat: torch.Tensor, load: Load) -> bool:
    """Make the copies; False, and nothing is done, if a parameter is not what it was."""
    assert load.copies is not None
    if not _ready(model, load):
        return False
    if load.copies:  # else all of it is other ranks'
        with torch.no_grad():
            torch._foreach_copy_(load.views, [copy.origin(flat) for copy in load.copies])
    load.replays += 1
    return True


def _ready(model: torch.nn.Module, load: Load) -> bool:
    """Make the copies' targets where they have moved; False if a parameter is not what it was."""
    assert load.copies is not None
    try:
        parameters = {name: model.get_parameter(name) for name in load.held}
    except AttributeError:
        return False
    if any(Held.of(p) != load.held[name] for name, p in parameters.items()):
        return False
    addresses = {name: p.untyped_storage().data_ptr() for name, p in parameters.items()}
    if addresses != load.addresses:
        storages = {name: _all_bytes(p) for name, p in parameters.items()}
        load.views = [copy.target(storages[copy.parameter]) for copy in load.copies]
        load.addresses = addresses
    return True


class _Recorder(TorchDispatchMode):
    """Watches a load: its copies out of `flat` into parameters, or what speaks against making them again."""

    def __init__(self, model: torch.nn.Module, flat: torch.Tensor) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self.held: dict[str, Held] = {}
        self.refused = ""
        self._flat = flat
        self._start = flat.untyped_storage().data_ptr()
        self._parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._copy(args[0], args[1])
        elif func._schema.is_mutable and any(t.numel() for a in args[:1] for t in _tensors(a)):
            self.refused = self.refused or f"it calls {func}"
        return result

    def moved(self, model: torch.nn.Module) -> str:
        """A parameter that has other memory than before the load (`p.data = ...`), "" if there is none."""
        return next(
            (name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() not in self._parameters), ""
        )

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if to.numel() == 0:
            return
        parameter = self._parameters.get(to.untyped_storage().data_ptr())
        if parameter is None:
            self.refused = self.refused or "it writes into what is no parameter"
        elif source.untyped_storage().data_ptr() != self._start:
            self.refused = self.refused or f"what it writes into {parameter[0]} is not in the bucket"
        elif (
            source.shape != to.shape or source.dtype != to.dtype and not (to.is_contiguous() and source.is_contiguous())
        ):
            self.refused = self.refused or f"it makes {parameter[0]} from {source.dtype} {list(source.shape)}"
        if self.refused:
            return
        assert parameter is not None
        name, held = parameter
        self.held.setdefault(name, Held.of(held))
        dtypes: tuple[torch.dtype, torch.dtype] | None = None
        if source.dtype == to.dtype:
            target, part = in_bytes(to, source)
        else:
            dtypes = to.dtype, source.dtype
            target, part = (
                Strided((t.nbytes,), (1,), int(t.storage_offset()) * t.element_size()) for t in (to, source)
            )
        begin = int(self._flat.storage_offset())  # of `flat` itself, which may be a view
        part = Strided(part.sizes, part.strides, part.offset - begin)
        self.copies.append(Copy(name, target, part, dtypes))


def _tensors(argument: Any) -> list[torch.Tensor]:
    """The tensors of an operator's argument, which may be a list of them."""
    several = argument if isinstance(argument, (list, tuple)) else [argument]
    return [t for t in several if isinstance(t, torch.Tensor)]


def overlapping(copies: list[Copy]) -> bool:
    """Whether two copies write to the same place: then their order counts, and it is not kept. Places in rows with gaps
    are compared as a whole, those that lie in one piece byte by byte."""
    if len({(c.parameter, c.to) for c in copies}) < len(copies):
        return True
    pieces = sorted((c.parameter, c.to.offset, c.to.offset + c.to.sizes[0]) for c in copies if c.to.dense)
    return any(a[0] == b[0] and b[1] < a[2] for a, b in zip(pieces, pieces[1:]))


def in_bytes(to: torch.Tensor, source: torch.Tensor) -> tuple[Strided, Strided]:
    """Two tensors of one dtype and shape as bytes of their storages, dimensions joined where both are dense."""
    size = to.element_size()
    sizes, a, b = [size], [1], [1]
    for n, i, j in zip(reversed(to.shape), reversed(to.stride()), reversed(source.stride())):
        i, j = i * size, j * size
        if n == 1:
            continue
        if i == sizes[0] * a[0] and j == sizes[0] * b[0]:
            sizes[0] *= n
        else:
            sizes, a, b = [n, *sizes], [i, *a], [j, *b]
    offsets = (int(t.storage_offset()) * size for t in (to, source))
    first, second = (Strided(tuple(sizes), tuple(strides), at) for strides, at in zip((a, b), offsets))
    return first, second


def merged(copies: list[Copy]) -> list[Copy]:
    """The same copies, dense neighbours (in the bucket and in the parameter) as one."""
    out: list[Copy] = []
    for copy in sorted(copies, key=lambda c: c.source.offset):
        last = out[-1] if out else None
        if (
            last is not None and last.parameter == copy.parameter and last.dtypes is copy.dtypes is None
            and last.to.dense and copy.to.dense and copy.source.dense
            and last.source.offset + last.source.sizes[0] == copy.source.offset
            and last.to.offset + last.to.sizes[0] == copy.to.offset
        ):  # fmt: skip
            size = (last.to.sizes[0] + copy.to.sizes[0],)
            last.to, last.source = Strided(size, (1,), last.to.offset), Strided(size, (1,), last.source.offset)
        else:
            out.append(replace(copy))
    return out


def _all_bytes(p: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes] over all of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=p.device).set_(p.untyped_storage())
