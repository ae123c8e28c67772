"""What weights need, before they are read: against the parameters of the loaded model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lm_head import load_causal_lm
from teacher_server import weights
from teacher_server.weights import DamagedWeights, DoesNotFit, check_weights, free_bytes, weight_bytes
from tests.models import FAMILIES, save_model

CPU = torch.device("cpu")
HALF = torch.bfloat16


def config_of(directory: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(directory)


def loaded_bytes(directory: Path, dtype: torch.dtype) -> int:
    model = load_causal_lm(directory, dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_loaded_model_holds(tmp_path: Path, family: str, stored: torch.dtype) -> None:
    directory = save_model(tmp_path, family, dtype=stored)
    assert weight_bytes(directory, config_of(directory), torch.float32, head_rows=None) == loaded_bytes(
        directory, torch.float32
    )


def test_a_half_precision_model_has_a_float32_copy_of_the_served_rows_of_its_head_besides(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    config = config_of(directory)
    held = loaded_bytes(directory, HALF)
    assert weight_bytes(directory, config, HALF, head_rows=None) == held + 4 * 128 * 32
    assert weight_bytes(directory, config, HALF, head_rows=97) == held + 4 * 97 * 32


def test_shards_count_together_and_files_that_are_not_loaded_do_not(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    config = config_of(directory)
    expected = weight_bytes(directory, config, torch.float32, head_rows=None)
    load_causal_lm(directory, torch.float32).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()
    shards = list(directory.glob("*.safetensors"))
    assert len(shards) > 2
    save_file({"x": torch.zeros(10**6)}, directory / "consolidated.safetensors")
    assert weight_bytes(directory, config, torch.float32, head_rows=None) == expected
    shards[0].unlink()
    with pytest.raises(DamagedWeights, match=f"{shards[0].name} is missing or damaged"):
        weight_bytes(directory, config, torch.float32, head_rows=None)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DamagedWeights, match="is no index"):
        weight_bytes(directory, config, torch.float32, head_rows=None)


def test_quantised_tensors_count_as_they_are_stored(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = config_of(tmp_path)
    tensors = {
        "codes": torch.zeros(1000, dtype=torch.int32),
        "fp8": torch.zeros(100, dtype=torch.float8_e4m3fn),
        "scales": torch.zeros(10, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path, config, torch.float32, head_rows=None) == 4000 + 100 + 40


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, keep: int) -> None:
    file = save_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DamagedWeights, match=r"model\.safetensors is missing or damaged .*download the model again"):
        weight_bytes(tmp_path, config_of(tmp_path), torch.float32, head_rows=None)


def test_what_does_not_fit_is_refused_with_both_figures_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(save_model(tmp_path))
    needed = weight_bytes(tmp_path, config, torch.float32, head_rows=None) + 2**27
    free: list[int | None] = [needed]
    monkeypatch.setattr(weights, "free_bytes", lambda device: free[0])
    check_weights(tmp_path, config, torch.float32, CPU, head_rows=None)
    free[0] = needed - 1
    with pytest.raises(DoesNotFit) as raised:
        check_weights(tmp_path, config, torch.float32, CPU, head_rows=None)
    said = str(raised.value)
    assert f"the weights as float32 need {needed} bytes" in said
    assert f"the container or machine has {needed - 1} bytes free" in said
    assert "more memory" in said and "--tensor-parallel-size" in said and "--dtype" in said
    check_weights(tmp_path, config, torch.float32, CPU, head_rows=None, fits=False)
    free[0] = None  # not known
    check_weights(tmp_path, config, torch.float32, CPU, head_rows=None)


def test_a_gpu_is_asked_for_what_is_free_and_what_torch_keeps_without_using_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda:1")
    asked: list[torch.device] = []
    config = config_of(save_model(tmp_path))
    needed = weight_bytes(tmp_path, config, HALF, head_rows=None)

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return needed - 100, 10**9

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert free_bytes(device) == needed
    check_weights(tmp_path, config, HALF, device, head_rows=None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 149)
    with pytest.raises(DoesNotFit, match=rf"as bfloat16 need {needed} bytes .* and cuda:1 has {needed - 1} bytes free"):
        check_weights(tmp_path, config, HALF, device, head_rows=None)
    assert set(asked) == {device}
