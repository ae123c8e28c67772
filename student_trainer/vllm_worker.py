"""What runs in the processes of the rollout engine (see `vllm_sampler`). Imports nothing of vLLM."""

import ctypes
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


class EngineSettings:
    """Our part of vLLM's configuration, which every process of the engine is sent when it is started.

    Where it arrives, it ties the process to the trainer, before anything of vLLM runs there: the process ends when
    the trainer does, however that ends. vocabulary_size: see `VllmSampler`. lock: a file in a directory of its own,
    which the trainer keeps locked as long as it lives; its name is the trainer's process id.
    """

    def __init__(self, vocabulary_size: int, lock: Path) -> None:
        self.vocabulary_size = vocabulary_size
        self._lock = lock

    def compute_hash(self) -> str:
        """Of what a compiled model depends on: nothing of ours."""
        return ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() != int(self._lock.name):
            _tie_to_trainer(self._lock)


def _tie_to_trainer(lock: Path) -> None:
    if os.getpgrp() == os.getpgid(os.getppid()):
        os.setpgid(0, 0)  # the terminal's Ctrl-C is the trainer's, which stops in order
    if sys.platform.startswith("linux") and os.getppid() != int(lock.name):
        # A worker ends with the process that started it. The trainer need not have started that from a thread that
        # lives as long as itself, which is what this goes by.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_when_unlocked, args=(lock,), name="TrainerWatch", daemon=True).start()


def _end_when_unlocked(lock: Path) -> None:
    """Ends this process once the trainer is gone: then the kernel takes back its lock. Removes what it left there."""
    try:
        with lock.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH)
    except FileNotFoundError:  # so is the trainer
        pass
    shutil.rmtree(lock.parent, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


class WorkerExtension:
    """Further methods of vLLM's worker, for `collective_rpc`: vLLM adds this class to its bases."""

    def load_student(self, directory: str) -> list[str]:
        """Takes over the weights in the safetensors files of `directory`, which have Hugging Face's names.

        Returns the parameters that none of them was for: those still hold what they held before.
        """
        worker: Any = self
        model = worker.model_runner.get_model()
        loaded: set[str] = set()
        load_weights = model.load_weights

        def load_and_note(*arguments: Any, **options: Any) -> Any:
            names = load_weights(*arguments, **options)
            loaded.update(names)
            return names

        # It warns of every layer that has no weights, at every step of the training; what is missing we say ourselves.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        model.load_weights = load_and_note
        try:
            worker.reload_weights(weights_path=directory, is_checkpoint_format=True)
        finally:
            del model.load_weights
        if worker.device.type == "cpu":
            _pack_embeddings_anew(model)
        return sorted({name for name, _ in model.named_parameters()} - loaded)


def _pack_embeddings_anew(model: Any) -> None:
    """On a CPU a head multiplies with a packed copy of its weight, which a reload of a tied head leaves as it was."""
    for module in model.modules():
        if hasattr(module, "num_embeddings_per_partition") and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
