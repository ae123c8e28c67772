"""Checkpoints: the student for everybody, and the state of the run to go on from.

checkpoints/step-N/               after N steps
    config.json, *.safetensors    the student and its tokenizer, a Hugging Face directory (adapters: a peft one)
    state/trainer.json            counters, pass rates, what made it and from which configuration
    state/process-R.npz           of each process: random states, answers in flight
    state/optimizer/              the optimiser's tensors (torch.distributed.checkpoint)
    checksums.json                size and SHA-256 of every file
checkpoints/best                  link to the best one, if the run evaluates

A checkpoint is written under another name and renamed when all of it is on disk, so what is called step-N is whole.
Everything is copied first; the writing itself goes on behind the next steps. Who waits: `save` for the write before
it, `wait` for the last.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from student_trainer.config import ConfigError
from student_trainer.parallel import sharded_modules, whole_weights
from student_trainer.processes import Processes

FORMAT = 1
"""Of everything under state/; raised by one with every change that older code could not read."""

_CHECKSUMS = "checksums.json"

# torch says so each time; a run of one process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """The run could not be saved; the checkpoint before stands."""


class Checkpoints:
    """The checkpoints of one run. on_saved: called in the main process, from any thread, when one is on disk."""

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        keep: int,
        background: bool,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._processes = processes
        self._keep = keep
        self._background = background
        self._on_saved = on_saved
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._best: int | None = None
        if processes.is_main:
            for partial in folder.glob(".step-*.partial"):  # of a save that was killed
                shutil.rmtree(partial)

    def save(
        self,
        step: int,
        *,
        policy: Any,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        trainer: dict[str, Any],
        write_process: Any,
        best: bool,
    ) -> None:
        """Saves the run as it is after `step` steps. A meeting; the files are whole after the next `wait`.

        trainer: what trainer.json holds. write_process(path): writes this process's own part. best: so far.
        """
        self.wait()
        final, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        if best:
            self._best = step
        with self._processes.together():
            if self._processes.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "state").mkdir(parents=True)
        with self._processes.together():
            write_process(partial / "state" / f"process-{self._processes.rank}.npz")
            sharded = bool(sharded_modules(policy))
            # Every process has all of a model that is not sharded: one copy is enough.
            writes = sharded or self._processes.is_main
            weights = whole_weights(policy, model) if writes else {}
            moments = _staged(policy, optimizer) if writes else {}

        def write() -> None:
            if writes:
                save(
                    moments,
                    checkpoint_id=partial / "state" / "optimizer",
                    process_group=self._processes.background_group if sharded else None,
                    no_dist=not sharded,
                )
            if self._processes.is_main:
                model.save_pretrained(partial, state_dict=weights)
                tokenizer.save_pretrained(partial)
                (partial / "state" / "trainer.json").write_text(json.dumps(trainer, indent=1, allow_nan=False) + "\n")
                _seal(partial)
                shutil.rmtree(final, ignore_errors=True)  # saved before, by a run that went on from an older one
                os.replace(partial, final)
                _sync(self.folder)
                self._on_saved()
                self._rotate()

        self._writer = threading.Thread(target=self._guarded, args=(write,), name="checkpoint")
        self._writer.start()
        if not self._background:
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk. Raises what kept it from that, on every process: a meeting."""
        if self._writer is None:
            return
        self.join()
        error, self._error = self._error, None
        with self._processes.together():
            if error is not None:
                raise CheckpointError(f"{self.folder}: the checkpoint could not be saved: {error}") from error

    def join(self) -> None:
        """Until this process writes nothing any more, whatever came of it. No meeting."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def note_best(self, step: int | None) -> None:
        """Which step is the best so far, after a resume."""
        self._best = step

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except BaseException as error:  # told by `wait`
            self._error = error

    def _rotate(self) -> None:
        saved = saved_steps(self.folder)
        self._link("latest", saved[-1])  # first: whoever follows it must not find what is removed next
        for step in saved[: -self._keep]:
            if step != self._best:
                shutil.rmtree(self.folder / f"step-{step}")
        if self._best in saved:
            self._link("best", self._best)

    def _link(self, name: str, step: int | None) -> None:
        link = self.folder / f".{name}.partial"
        with contextlib.suppress(OSError):  # a file system without links: summary.json names the checkpoints too
            link.unlink(missing_ok=True)
            link.symlink_to(f"step-{step}")
            os.replace(link, self.folder / name)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, rising."""
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


def verify(checkpoint: Path) -> None:
    """Raises ConfigError unless every file is there with the size and the SHA-256 it was saved with."""
    try:
        wanted = json.loads((checkpoint / _CHECKSUMS).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise _broken(checkpoint, f"{_CHECKSUMS} cannot be read ({error})") from error
    for name, (size, digest) in wanted.items():
        path = checkpoint / name
        if not path.is_file():
            raise _broken(checkpoint, f"{name} is missing")
        if path.stat().st_size != size:
            raise _broken(checkpoint, f"{name} has {path.stat().st_size} bytes and should have {size}")
        if _sha256(path) != digest:
            raise _broken(checkpoint, f"{name} is not what was saved (SHA-256)")


def saved_at(checkpoint: Path) -> float:
    """When it was written, in seconds since 1970."""
    return (checkpoint / _CHECKSUMS).stat().st_mtime


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """trainer.json of a verified checkpoint. Raises ConfigError if another version of the format wrote it."""
    found = json.loads((checkpoint / "state" / "trainer.json").read_text())
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"run_dir: {checkpoint} was saved by stillhouse {found.get('stillhouse')} in format {found.get('format')}, "
            f"this version reads {FORMAT}; resume with that version, or start a new run from its weights: "
            f"student.model={checkpoint}"
        )
    return found


def load_moments(checkpoint: Path, policy: Any, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """The optimiser's state of a checkpoint into `optimizer`. A meeting."""
    sharded = bool(sharded_modules(policy))
    whole = get_optimizer_state_dict(policy, optimizer)
    with processes.together():
        load(
            whole["state"],  # pyright: ignore[reportArgumentType]
            checkpoint_id=checkpoint / "state" / "optimizer",
            process_group=processes.background_group if sharded else None,
            no_dist=not sharded,
        )
    set_optimizer_state_dict(policy, optimizer, whole)


def fingerprint(model: Any) -> str:
    """Two models with the same one can exchange checkpoints: names, shapes and dtypes of what is trained, and for
    what is not (under adapters) also what it sums to."""
    text = "\n".join(
        f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        + ("" if parameter.requires_grad else f" {parameter.detach().double().sum().item():.6e}")
        for name, parameter in model.named_parameters()
    )
    return hashlib.sha256(f"{type(model).__name__}\n{text}".encode()).hexdigest()


def process_files(checkpoint: Path) -> Sequence[Path]:
    """The parts of the processes that saved `checkpoint`, by rank."""
    found = (checkpoint / "state").glob("process-*.npz")
    return sorted(found, key=lambda path: int(path.stem.removeprefix("process-")))


def _staged(policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{parameter: {name: tensor}} on the CPU, each process its own shard; rates and such are the schedule's."""
    on_cpu = next(policy.parameters()).device.type == "cpu"
    state = get_optimizer_state_dict(policy, optimizer, options=StateDictOptions(cpu_offload=not on_cpu))["state"]
    return _copied(state) if on_cpu else state  # pyright: ignore[reportReturnType]


def _copied(tree: Any) -> Any:
    """The same, of tensors on the CPU that nobody else changes."""
    if isinstance(tree, dict):
        return {name: _copied(value) for name, value in tree.items()}
    if isinstance(tree, DTensor):
        local = _copied(tree.to_local())
        return DTensor.from_local(
            local, tree.device_mesh, tree.placements, run_check=False, shape=tree.shape, stride=tree.stride()
        )
    return tree.detach().clone() if isinstance(tree, Tensor) else tree


def _seal(folder: Path) -> None:
    """Writes every file through to the disk, and the checksums of all of them."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = (path.stat().st_size, _sha256(path))
    (folder / _CHECKSUMS).write_text(json.dumps({"files": files}, indent=1) + "\n")
    for path in (folder / _CHECKSUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(checkpoint: Path, what: str) -> ConfigError:
    others = [step for step in saved_steps(checkpoint.parent) if f"step-{step}" != checkpoint.name]
    older = f"the run then goes on from step {others[-1]}" if others else "the run then starts from the beginning"
    return ConfigError(
        f"run_dir: {checkpoint} is damaged: {what}. Remove that directory ({older}), or restore it from a copy",
        reason="checkpoint",
    )
