"""What turns the last hidden state of a causal language model into logits, for every family.

Both programs need it and neither may import the other: the teacher scores rows slice by slice, the student
trains through the head without ever holding [T, V]. Logits are

    z = softcap * tanh(scale * (h W^T + b) / softcap)        (softcap None: z = scale * (h W^T + b))

over the first `vocabulary_size` rows of W. Heads are often padded to a multiple of 64 or 128, differently
within one family; the rows beyond the tokenizer's last id are not tokens and take no part in any softmax.
`check_head` compares it with the model's own logits, so a family with a head of another form is
refused instead of scored wrongly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.vocabulary import vocabulary_size

# float32 products on an x86 CPU go to oneDNN, which torch's wheels ship, and not through torch.mm to MKL, which uses
# about half of a processor that is not Intel's.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile calls; without it torch.mm serves
)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden [T, d] weight^T [V, d] + bias [V], by the fastest product of the device."""
    if ONEDNN and not torch.is_grad_enabled() and hidden.is_cpu and hidden.dtype == torch.float32 and hidden.numel():
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return F.linear(hidden, weight, bias)


@dataclass(frozen=True, slots=True)
class LMHead:
    """A head's tensors and constants. weight: [V, d], bias: [V] or None, both views of the parameters."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d], in the dtype of the head."""
        z = linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z


def load_causal_lm(directory: Path, dtype: torch.dtype) -> Any:
    """The causal LM in `directory`, computing what its family defines.

    Raises OSError or ValueError if the directory does not hold all of a model.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    # Only eager attention caps its logits (Gemma 2); the others would compute another model.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
        directory,
        dtype=dtype,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager" if capped else None,
    )
    # transformers fills what is missing with random numbers and a warning.
    missing = sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])])
    if missing:
        raise ValueError(
            f"the weights lack {len(missing)} of the model's tensors or have them in another shape, "
            f"first {missing[0]}; save or download the model again"
        )
    return model


def head_of(model: Any, vocabulary_size: int | None = None) -> LMHead:
    """The head of a Hugging Face causal LM, cut to `vocabulary_size` rows (None: all it has)."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: it is not a causal language model")
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if vocabulary_size is not None:
        if vocabulary_size > len(weight):
            raise ValueError(
                f"vocabulary_size is {vocabulary_size}, but the head has {len(weight)} rows: the tokenizer "
                "defines ids that the model cannot score; resize the model's embeddings"
            )
        weight = weight[:vocabulary_size]
        bias = None if bias is None else bias[:vocabulary_size]
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale *= config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        scale /= config.logits_scaling
    if getattr(config, "lm_head_multiplier", None) is not None:  # Falcon-H1
        scale *= config.lm_head_multiplier
    return LMHead(weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def backbone_of(model: Any) -> nn.Module:
    """The part of a causal LM that makes the hidden states its head reads."""
    backbone = model.base_model
    if backbone is model:
        raise ValueError(f"{type(model).__name__} has no base model: it is not a causal language model")
    return backbone


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raises ValueError unless `head_of` and `backbone_of` reproduce the model's own logits on a probe."""
    device = next(model.parameters()).device
    size = model.get_output_embeddings().weight.shape[0]
    rows = min(size, model.get_input_embeddings().weight.shape[0])
    probe = (torch.arange(1, 9, device=device) * 7919 % rows)[None]
    was_training = model.training
    model.eval()
    own = model(input_ids=probe, use_cache=False).logits.float()
    hidden = backbone_of(model)(input_ids=probe, use_cache=False).last_hidden_state
    ours = head_of(model).logits(hidden).float()
    model.train(was_training)
    error = (own - ours).abs().max().item()
    tolerance = 8 * torch.finfo(model.dtype).eps * max(1.0, own.abs().max().item())
    # "not <=" so that NaN fails too.
    if not error <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: logits rebuilt from hidden states differ from the model's own by "
            f"{error:.3g} (tolerance {tolerance:.3g}). Its head is of an unsupported form (see lm_head)."
        )


def usable_vocabulary(model: Any, tokenizer: Any | None) -> int:
    """Number of ids that are tokens: the tokenizer's, or the head's rows if there is no tokenizer."""
    if tokenizer is None:
        return model.get_output_embeddings().weight.shape[0]
    return vocabulary_size(tokenizer.get_vocab())
