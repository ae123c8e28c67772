"""The student: loading it, and its log-probabilities at chosen tokens as one differentiable module."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from lm_head import backbone_of, check_head, head_of, load_causal_lm, usable_vocabulary
from student_trainer.config import ConfigError, LoraConfig, StudentConfig
from student_trainer.logprobs import Support, gathered_logprobs, support_logprobs

CPU = torch.device("cpu")


class Policy(nn.Module):
    """A causal LM seen through its log-probabilities; never makes logits of the whole vocabulary at once.

    All of it goes through `forward`, so that wrappers which hook `forward` (data parallel, FSDP) see it: within it
    the head's weight is whole, also when it is sharded elsewhere.
    """

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary_size = vocabulary_size
        # Which layers FSDP makes units of.
        self._no_split_modules = list(getattr(model, "_no_split_modules", None) or ())

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        ids: Tensor,
        present: Tensor,
        target_column: Tensor,
        distil_temperature: float,
        policy_temperature: float,
        position_ids: Tensor | None = None,
    ) -> tuple[Support, Tensor]:
        """Support of R response tokens, and the log-probability [R] of each under the policy.

        input_ids: [B, L], right-padded; or packed, [1, L] with position_ids [1, L] that begin at 0 with every
        sequence. rows: [R] into [B * L]. ids, present: [R, K]. target_column: [R], where in its support the token
        that was sampled stands. The support is at `distil_temperature`, the policy is the student at
        `policy_temperature`. Nats.
        """
        hidden = self.hidden(input_ids, position_ids).flatten(0, 1)[rows]
        head = head_of(self.model, self.vocabulary_size)
        device, weight = hidden.device.type, head.weight
        if torch.is_autocast_enabled(device):
            # The product's inputs are rounded as autocast does it, its sums stay float32.
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        form = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
        column = target_column[:, None]
        with torch.autocast(device, enabled=False):
            support = support_logprobs(hidden, weight, ids, present=present, temperature=distil_temperature, **form)
            if policy_temperature == distil_temperature:
                return support, support.logprobs.gather(1, column).squeeze(1)
            sampled = gathered_logprobs(hidden, weight, ids.gather(1, column), temperature=policy_temperature, **form)
            return support, sampled.logprobs.squeeze(1)

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the head reads, [B, L, d]."""
        # No attention mask: padding is on the right, where a causal model never looks from a real token, and
        # between packed sequences transformers puts a mask where the positions begin anew.
        places = {} if position_ids is None else {"position_ids": position_ids}
        return backbone_of(self.model)(input_ids=input_ids, use_cache=False, **places).last_hidden_state


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`."""
    if not directory.is_dir():
        raise ConfigError(f"student.model: {directory} is not a directory; give one with a Hugging Face model")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: {directory} has no usable tokenizer: {error}") from error


def load_model(config: StudentConfig, device: torch.device, resumed: Path | None = None) -> Any:
    """The causal LM in `config.model` on `device`, in training mode, its head checked against its own logits.

    With `config.lora` a model with adapters injected, of which only these train. resumed: the checkpoint whose
    weights (or adapters) to take instead.
    """
    directory = resumed if resumed is not None and config.lora is None else config.model
    dtype = getattr(torch, config.dtype)
    try:
        if (directory / "adapter_config.json").is_file():
            model = _merged(directory, dtype)
        else:
            model = load_causal_lm(directory, dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: {directory} cannot be loaded: {error}") from error
    check_head(model)
    model.to(device)
    if config.gradient_checkpointing:
        # The new name where there is one: the old warns that it goes.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.lora is not None:
        model = _with_adapters(model, config.lora, resumed)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
    return model.train()


def _merged(directory: Path, dtype: torch.dtype) -> Any:
    """The model that a checkpoint of adapters stands for."""
    peft = _peft()
    settings = peft.PeftConfig.from_pretrained(str(directory))
    base = Path(settings.base_model_name_or_path or "")
    if not base.is_dir():
        raise ValueError(f"its adapters are for the model in {str(base)!r}, which is no directory here; put it there")
    model = peft.PeftModel.from_pretrained(load_causal_lm(base, dtype), str(directory))
    return model.merge_and_unload()


def _with_adapters(model: Any, config: LoraConfig, resumed: Path | None) -> Any:
    peft = _peft()
    if resumed is not None:
        return peft.PeftModel.from_pretrained(model, str(resumed), is_trainable=True)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules],
        task_type="CAUSAL_LM",
    )
    model.name_or_path = str(Path(model.name_or_path).resolve())  # what the adapters will say that they are for
    try:
        model = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"student.lora.target_modules: {error}") from error
    if isinstance(model.get_output_embeddings(), peft.tuners.tuners_utils.BaseTunerLayer):
        raise ConfigError("student.lora.target_modules: names the head, which has to stay as it is; leave it out")
    return model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("student.lora: needs the package peft; pip install peft") from error
    return peft


def plain_model(model: Any) -> Any:
    """The transformers model inside, adapters and all."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU of this process if there is one."""
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"student.device: {name!r} is no device; use auto, cpu, cuda or cuda:0") from error


def student_vocabulary(model: Any, tokenizer: Any) -> int:
    """Number of token ids that exist for the student."""
    size = usable_vocabulary(model, tokenizer)
    head_of(model, size)  # refuses a tokenizer with more ids than the head has rows
    return size


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Raises ConfigError unless two sequences behind each other give what they give alone."""
    device = next(policy.parameters()).device
    rows = policy.model.get_input_embeddings().weight.shape[0]
    one = torch.arange(1, 8, device=device)[None] * 7919 % rows
    other = torch.arange(3, 14, device=device)[None] * 104729 % rows
    was_training = policy.training
    policy.eval()
    alone = torch.cat([policy.hidden(one), policy.hidden(other)], 1)
    places = torch.cat([torch.arange(one.shape[1]), torch.arange(other.shape[1])])[None].to(device)
    together = policy.hidden(torch.cat([one, other], 1), places)
    policy.train(was_training)
    error = (alone - together).abs().max().item()
    tolerance = 64 * torch.finfo(alone.dtype).eps * max(1.0, alone.abs().max().item())
    if not error <= tolerance:
        raise ConfigError(
            f"optimizer.packing: {type(policy.model).__name__} does not keep packed sequences apart (hidden states "
            f"differ by {error:.3g}, tolerance {tolerance:.3g}); set it to false"
        )
