"""The head shared by both programs gives the models' own logits, or refuses."""

from pathlib import Path

import pytest
import torch
import transformers

from lm_head import LMHead, backbone_of, check_head, head_of, usable_vocabulary
from tests.models import FAMILIES, VOCABULARY_SIZE, family_config, save_model


def tiny(family: str, head_rows: int = 128) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    # Only the eager experts compute in float64.
    config = family_config(family, head_rows)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("vocabulary_size", [1, VOCABULARY_SIZE, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_backbone_is_the_models_own_logits(family: str, vocabulary_size: int | None) -> None:
    model = tiny(family)
    ids = torch.arange(24).reshape(2, 12) * 5 % 128
    with torch.no_grad():
        own = model(input_ids=ids).logits
        hidden = backbone_of(model)(input_ids=ids).last_hidden_state
        ours = head_of(model, vocabulary_size).logits(hidden)
    assert ours.shape[-1] == (vocabulary_size or 128)
    torch.testing.assert_close(ours, own[..., :vocabulary_size], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_the_tests_have_the_heads_they_stand_for(family: str) -> None:
    head = head_of(tiny(family))
    assert (head.bias is not None) == (family == "phi")
    assert head.scale == {"cohere": 0.25, "granite": 1 / 3}.get(family, 1.0)
    assert head.softcap == (10.0 if family == "gemma2" else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_check_head_passes_every_family_in_every_precision(family: str, dtype: torch.dtype) -> None:
    check_head(tiny(family).to(dtype))


def test_check_head_leaves_training_mode_as_it_was() -> None:
    model = tiny("llama").train()
    check_head(model)
    assert model.training


def test_check_head_refuses_a_head_of_another_form() -> None:
    model = tiny("llama")
    own_forward = model.forward

    def doubled(*args: object, **options: object) -> object:
        output = own_forward(*args, **options)
        output.logits = output.logits * 1.01
        return output

    model.forward = doubled
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: logits rebuilt .* unsupported form"):
        check_head(model)


def test_check_head_refuses_nan_weights() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="differ from the model's own by nan"):
        check_head(model)


def test_a_vocabulary_larger_than_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size is 129, but the head has 128 rows"):
        head_of(tiny("llama"), 129)


def test_a_model_without_a_head_is_refused() -> None:
    backbone = tiny("llama").model
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        head_of(backbone)
    with pytest.raises(ValueError, match="LlamaModel has no base model"):
        backbone_of(backbone)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 2.0)])
def test_logits_follow_the_formula(scale: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 3), (7,), (5, 3))
    )
    expected = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    torch.testing.assert_close(LMHead(weight, bias, scale, softcap).logits(hidden), expected)


def test_the_vocabulary_is_the_tokenizers_and_without_one_the_heads(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert usable_vocabulary(model, tokenizer) == VOCABULARY_SIZE
    assert usable_vocabulary(model, None) == 128
