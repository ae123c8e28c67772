"""What a model directory's weights need, from the headers of its files: before minutes of reading and loading.

The figure is what holding the weights takes at least. The model's pass, its logits and a KV cache come on top; of
those only the engine knows.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from teacher_server.memory import host_free
from teacher_server.start_failures import MEMORY_FIX, StartError

_CAST = ("F64", "F32", "F16", "BF16")
"""Types that are loaded as the dtype asked for. Others are quantised, or ids, and stay as they are."""
_STORED_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "F4": 0.5}
"""Bytes of an element where it is not 1."""

_PROGRAM_BYTES = 2**27
"""What the program itself takes of the host from here until it serves: 80 MB were measured, and some file cache."""


class DamagedWeights(StartError):
    """The files of the weights are not whole."""

    reason = "model"


class DoesNotFit(StartError):
    """There is less memory than the weights need."""

    reason = "memory"


def check_weights(
    directory: Path, config: Any, dtype: torch.dtype, device: torch.device, *, head_rows: int | None, fits: bool = True
) -> None:
    """Raises DamagedWeights, or DoesNotFit if the device, or for a CPU the container or machine, cannot hold them.

    head_rows: of the float32 copy of the head (None: all). fits=False: only whether the files are whole.
    """
    needed = weight_bytes(directory, config, dtype, head_rows=head_rows)
    where, more = str(device), ""
    if device.type == "cpu":
        needed += _PROGRAM_BYTES
        where, more = "the container or machine", f", the program's own {_PROGRAM_BYTES} included"
    free = free_bytes(device) if fits else None
    if free is not None and needed > free:
        raise DoesNotFit(
            f"the weights as {str(dtype).removeprefix('torch.')} need {needed} bytes ({needed / 2**30:.2f} GiB{more}), "
            f"and {where} has {free} bytes free ({free / 2**30:.2f} GiB); {MEMORY_FIX}"
        )


def weight_bytes(directory: Path, config: Any, dtype: torch.dtype, *, head_rows: int | None) -> int:
    """Memory of the weights as `dtype`, with the float32 copy of the head. Raises DamagedWeights."""
    text = config.get_text_config()
    total = 0.0
    for name in _files(directory):
        try:
            # Not "pt": torch would map the file as if it were to be written, and be refused that for a large one.
            with safe_open(directory / name, "np") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                    if text.tie_word_embeddings and key.endswith("lm_head.weight"):
                        continue  # stored twice, loaded once
                    tensor = file.get_slice(key)
                    kind = tensor.get_dtype()
                    size = dtype.itemsize if kind in _CAST else _STORED_BYTES.get(kind, 1)
                    total += size * math.prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise DamagedWeights(
                f"the safetensors file {name} is missing or damaged ({error}); save or download the model again"
            ) from error
    if dtype != torch.float32:
        total += 4 * (head_rows or text.vocab_size) * text.hidden_size
    return round(total)


def _files(directory: Path) -> list[str]:
    """The names of the files that are loaded: others may lie beside them."""
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in directory.glob("*.safetensors"))
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedWeights(f"{index.name} is no index of safetensors files; download the model again") from error


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there. None: not known."""
    if device.type == "cpu":
        return host_free()
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
