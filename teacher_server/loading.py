"""From a model directory to a model that can score."""

import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lm_head import LMHead, backbone_of, check_head, head_of, load_causal_lm, usable_vocabulary
from stillhouse.codec import Teacher
from stillhouse.vocabulary import vocabulary_digest, vocabulary_size
from teacher_server.options import OptionError, Options, server_version
from teacher_server.weights import check_weights

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model ready to score, and what its server says about it."""

    backbone: nn.Module  # token ids [B, L] -> last_hidden_state [B, L, d]
    head: LMHead  # float32, vocabulary_size rows
    device: torch.device
    teacher: Teacher


def load_model(options: Options) -> ServedModel:
    """Loads the model that `options` names.

    Raises OptionError if an option does not fit the machine or the model, DoesNotFit if the memory does not suffice,
    DamagedWeights, OSError or ValueError if the directory does not hold a model that can be scored.
    """
    device = _device(options.device)
    config = read_config(options)
    dtype = compute_dtype(options.dtype, config, device)
    max_sequence_tokens = longest_sequence(options, config)
    check_weights(options.model, config, dtype, device, head_rows=options.vocabulary_size)
    tokenizer = _load_tokenizer(options.model)
    revision = _revision(options)
    logger.info("loading model=%s dtype=%s device=%s", options.model, dtype, device)
    model = load_causal_lm(options.model, dtype).to(device).eval().requires_grad_(False)
    size = options.vocabulary_size or usable_vocabulary(model, tokenizer)
    check_head(model)
    head = _float32_head(head_of(model, size))
    teacher = _teacher(options, "torch", revision, tokenizer, size, max_sequence_tokens, dtype)
    return ServedModel(backbone_of(model), head, device, teacher)


def describe_model(options: Options, config: Any, dtype: torch.dtype) -> Teacher:
    """What a server says of the model that `options` names, for an engine that loads the weights itself.

    Raises OptionError, OSError or ValueError.
    """
    tokenizer = _load_tokenizer(options.model)
    rows = config.get_text_config().vocab_size
    size = options.vocabulary_size or (vocabulary_size(tokenizer.get_vocab()) if tokenizer is not None else rows)
    if size > rows:
        raise OptionError(
            f"--vocabulary-size {size} (default: the tokenizer's): the model's head has {rows} rows; "
            "resize the model's embeddings, or give its own tokenizer"
        )
    revision = _revision(options)
    return _teacher(options, options.engine, revision, tokenizer, size, longest_sequence(options, config), dtype)


def _teacher(
    options: Options,
    engine: str,
    revision: str,
    tokenizer: Any | None,
    vocabulary: int,
    max_sequence_tokens: int,
    dtype: torch.dtype,
) -> Teacher:
    return Teacher(
        model=options.name,
        model_revision=revision,
        vocabulary_size=vocabulary,
        vocabulary_digest=vocabulary_digest(tokenizer.get_vocab()) if tokenizer is not None else "",
        max_sequence_tokens=max_sequence_tokens,
        max_top_k=min(options.max_top_k, vocabulary),
        max_candidates=options.max_candidates,
        min_temperature=MIN_TEMPERATURE,
        max_temperature=MAX_TEMPERATURE,
        max_response_bytes=options.max_response_bytes,
        compute_dtype=str(dtype).removeprefix("torch."),
        engine=engine,
        server_version=server_version(),
    )


def read_config(options: Options) -> Any:
    """The model's configuration. Raises OSError or ValueError."""
    return transformers.AutoConfig.from_pretrained(options.model, local_files_only=True)


def compute_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """What `--dtype name` means for a model of this configuration on this device."""
    if name != "auto":
        return getattr(torch, name)
    # A CPU computes in half precision slowly, and its scores would be worse.
    stored = config.get_text_config().dtype
    return stored if stored is not None and device.type == "cuda" else torch.float32


def _revision(options: Options) -> str:
    """What is announced. Raises OptionError if the files are not those that were expected."""
    revision = options.revision or digest_model(options.model)
    if options.expect_revision and options.expect_revision != revision:
        raise OptionError(
            f"--expect-revision {options.expect_revision}: the digest of the files in {options.model} is {revision}; "
            "put the right model there (was its download whole?), or expect this one",
            reason="revision",
        )
    return revision


def digest_model(directory: Path) -> str:
    """SHA-256 (hex) over name, size and content of config.json and every safetensors file."""
    digest = hashlib.sha256()
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    total = sum(path.stat().st_size for path in files)
    logger.info("revision: reading bytes=%d (give --revision to skip this)", total)
    done, reported_s = 0, time.monotonic()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
                done += len(block)
                if time.monotonic() - reported_s > 10:
                    logger.info("revision: read bytes=%d of=%d", done, total)
                    reported_s = time.monotonic()
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"--device {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; give another")
    return device


def longest_sequence(options: Options, config: Any) -> int:
    """The longest sequence to serve, in tokens. Raises OptionError."""
    allowed = getattr(config.get_text_config(), "max_position_embeddings", None)
    asked = options.max_sequence_tokens
    if allowed is None and asked is None:
        raise OptionError("--max-sequence-tokens is not given, and config.json has no max_position_embeddings")
    if allowed is not None and asked is not None and asked > allowed:
        raise OptionError(f"--max-sequence-tokens {asked}: the model's positions end at {allowed}; give at most that")
    return asked if asked is not None else int(allowed)  # pyright: ignore[reportArgumentType]


def _load_tokenizer(directory: Path) -> Any | None:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("no tokenizer in %s: ids are all rows of the head, and clients cannot check them", directory)
        return None
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _float32_head(head: LMHead) -> LMHead:
    if head.weight.dtype == torch.float32:
        return head
    logger.info("float32 copy of the head: bytes=%d", 4 * head.weight.numel())
    return LMHead(head.weight.float(), head.bias.float() if head.bias is not None else None, head.scale, head.softcap)
