"""Whether the weights of a Hugging Face folder are those that its config.json describes, by the files' headers."""

from __future__ import annotations

import re
from pathlib import Path

from fp8slurm.checkpoint.formats.hf_folder import natural, open_hf
from fp8slurm.checkpoint.formats.sources import DequantizedSource, HfSource, Source
from fp8slurm.core.errors import InputError
from fp8slurm.fp8.block import FLOAT_DTYPES
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_weights(folder: Path, spec: ModelSpec, flag: str) -> None:
    """Names, shapes and dtypes of all tensors that the model has, and no layer that it has not; no data is read.

    Block FP8 counts as what it stands for. flag: where the folder was given.

    Raises:
        BadCheckpoint: a file is missing, damaged, or not what the index says.
        InputError: names the first tensor, in the order of the layers, that contradicts config.json.
    """
    where = f"{flag} {folder}"
    source: Source = HfSource(open_hf(folder))
    if spec.quantization is not None:
        source = DequantizedSource(source, spec.quantization.block)
    present = source.tensors
    source.close()
    for name, tensor in sorted(NameTable(spec).hf_tensors().items(), key=lambda item: natural(item[0])):
        if name not in present:
            raise InputError(f"{where}: no tensor {name}, which {spec.architecture} needs")
        shape, dtype = tuple(present[name].shape), present[name].dtype
        if shape != tuple(tensor.shape):
            raise InputError(f"{where}: {name} is {list(shape)}, config.json makes it {list(tensor.shape)}")
        if dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{where}: {name} is {str(dtype).removeprefix('torch.')}; allowed: bfloat16, float16, float32"
            )
    for name in present:
        layer = LAYER.match(name)
        if layer and int(layer[1]) >= spec.num_layers:
            raise InputError(
                f"{where}: it holds {name}, but config.json has num_hidden_layers {spec.num_layers}: layers would be "
                f"left out; allowed: the config.json that belongs to these weights"
            )
