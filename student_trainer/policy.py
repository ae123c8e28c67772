"""The student: loading it, and its log-probabilities at chosen tokens as one differentiable module."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lm_head import backbone_of, check_head, head_of, load_causal_lm, usable_vocabulary
from student_trainer.config import ConfigError, StudentConfig
from student_trainer.logprobs import Support, gathered_logprobs, support_logprobs


class Policy(nn.Module):
    """A causal LM seen through its log-probabilities; never makes logits of the whole vocabulary at once.

    All of it goes through `forward`, so that wrappers which hook `forward` (data parallel, FSDP) see it.
    """

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        ids: Tensor,
        present: Tensor,
        target_column: Tensor,
        distil_temperature: float,
        policy_temperature: float,
    ) -> tuple[Support, Tensor]:
        """Support of R response tokens, and the log-probability [R] of each under the policy.

        input_ids: [B, L], right-padded. rows: [R] into [B * L]. ids, present: [R, K]. target_column: [R], where
        in its support the token that was sampled stands. The support is at `distil_temperature`, the policy is
        the student at `policy_temperature`. Nats.
        """
        # No attention mask: padding is on the right, where a causal model never looks from a real token.
        hidden = backbone_of(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[rows]
        head = head_of(self.model, self.vocabulary_size)
        constants = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
        support = support_logprobs(
            hidden, head.weight, ids, present=present, temperature=distil_temperature, **constants
        )
        column = target_column[:, None]
        if policy_temperature == distil_temperature:
            return support, support.logprobs.gather(1, column).squeeze(1)
        sampled = gathered_logprobs(
            hidden, head.weight, ids.gather(1, column), temperature=policy_temperature, **constants
        )
        return support, sampled.logprobs.squeeze(1)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`."""
    if not directory.is_dir():
        raise ConfigError(f"student.model: {directory} is not a directory; give one with a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: {directory} has no usable tokenizer: {error}") from error


def load_model(config: StudentConfig) -> Any:
    """The causal LM in `config.model`, in training mode, its head checked against its own logits."""
    try:
        model = load_causal_lm(config.model, getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: {config.model} cannot be loaded: {error}") from error
    check_head(model)
    model.to(resolve_device(config.device))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"student.device: {name!r} is no device; use auto, cpu, cuda or cuda:0") from error


def student_vocabulary(model: Any, tokenizer: Any) -> int:
    """Number of token ids that exist for the student."""
    size = usable_vocabulary(model, tokenizer)
    head_of(model, size)  # refuses a tokenizer with more ids than the head has rows
    return size
