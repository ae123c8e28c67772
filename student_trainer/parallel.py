"""How the student is spread over processes: accelerate does it, this chooses and translates.

none    every process has the whole model (DistributedDataParallel); gradients are averaged after the last
        micro-batch of an update
fsdp2   every process has a share of each parameter (fully_shard); they come together layer by layer

Launched by `torchrun` or `accelerate launch`; without either there is one process. What `accelerate config` says
about precision and sharding is overruled: the run's configuration is all there is to read.
"""

import contextlib
import datetime
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from student_trainer.config import RunConfig
from student_trainer.policy import plain_model


def make_accelerator(config: RunConfig, device: torch.device, project_dir: Path) -> Accelerator:
    """The accelerator of this process, which also joins the others."""
    sharded = config.student.sharding == "fsdp2"
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,  # every process has read the model, as each reads a checkpoint
            activation_checkpointing=False,  # transformers' own, by student.gradient_checkpointing
            # Products in half precision; gradients are summed in float32, and log-probabilities stay what they are.
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if config.student.mixed_precision == "bf16" else None,
                reduce_dtype=torch.float32,
            ),
        )
    return Accelerator(
        # accelerate places and scales; it must not choose another device than the configuration does.
        cpu=device.type == "cpu",
        mixed_precision=config.student.mixed_precision,
        fsdp_plugin=plugin,
        log_with=list(config.trackers) or None,
        project_dir=str(project_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=meeting_timeout_s(config)))],
    )


def meeting_timeout_s(config: RunConfig) -> float:
    """How long a process waits for the others: longer than any of them may wait for a teacher."""
    return 1800.0 + (config.teacher.outage_s + config.teacher.deadline_s if config.teacher else 0.0)


def sharded_modules(policy: nn.Module) -> list[Any]:
    """The units of a sharded model; none of any other."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole_for_generation(policy: nn.Module) -> Generator[None]:
    """Every parameter whole in every process, so that each can generate at its own pace.

    A meeting of all processes at its beginning, and none until its end. Needs memory for the whole model.
    """
    units = sharded_modules(policy)
    for unit in units:
        unit._get_fsdp_state()._lazy_init()  # what the first forward does; generation goes around it
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def whole_weights(policy: nn.Module, model: Any) -> dict[str, Tensor]:
    """What `model.save_pretrained` needs, whole and copied to the CPU. A meeting if the model is sharded.

    Of a model with adapters only these. Of a sharded model in the main process only. Tied weights are one tensor
    under all their names.
    """
    adapted = hasattr(model, "peft_config")
    if sharded_modules(policy):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
        inside = "base_model.model." if adapted else ""  # peft's name for the model that it adapts
        found: dict[str, Any] = {
            inside + name.removeprefix("model."): tensor
            for name, tensor in get_model_state_dict(policy, options=options).items()
        }
    else:
        found = model.state_dict()
    copies: dict[int, Tensor] = {}
    same = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    whole = {}
    for name, tensor in found.items():
        if adapted and "lora_" not in name:
            continue
        key = same.get(name, id(tensor))
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        whole[name] = copies[key]
    return whole


def handed_over(policy: nn.Module, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of every weight, under transformers' names, adapters merged in; one at a time.

    Every process gets all of them: with a sharded model each tensor is a meeting.
    """
    for name, parameter in _merged_parameters(plain_model(model)):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        yield name, whole.detach()


def _merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters as the plain model has them: an adapted layer's is its base weight plus what the adapter adds."""
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".base_layer.")[0]
        if ".lora_" in name:
            continue
        if owner in adapted:
            leaf = name.rpartition(".")[2]
            yield f"{owner}.{leaf}", _with_delta(adapted[owner], parameter) if leaf == "weight" else parameter
        else:
            yield name, parameter


def _with_delta(layer: Any, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
