"""What ends a run with an error, for those who look from outside: a reason for the metrics, an exit status.

0    done, or stopped and saved (`train --stopped-status` may say otherwise)
1    failed, and would again: the same answers, the same verifier, the same weights
2    refused before it began
3    lost something that may be there again: another process of the run, the rollout engine, the teachers
130  stopped by Ctrl-C
"""

import errno
import re
from dataclasses import dataclass

FAILED = 1
REFUSED = 2
LOST = 3

REASONS = (
    "config", "teacher", "teacher_revision", "non_finite", "runaway", "memory", "checkpoint", "verifier", "sampler",
    "archive", "peer", "unexpected",
)  # fmt: skip
"""Values of the label `reason` of `stillhouse_student_failed`."""

# gloo has no exceptions of its own, and NCCL one for everything. What is wrong with the set-up would come again.
_PEER_IS_GONE = re.compile(r"gloo/transport/\w+/(pair|buffer|unbound_buffer|context)\.cc")
_NCCL_REFUSED = re.compile(r"ncclInvalid(Usage|Argument)")

# A disk that is full, or may not be written, will be so for the next attempt, too. One that vanished may come back.
# None: a bucket that does not answer has no number.
_STORAGE_IS_GONE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, None)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ended."""

    reason: str  # one of REASONS
    status: int  # FAILED, REFUSED or LOST
    message: str | None  # to say; None: nobody foresaw it, so the traceback


def failure_of(error: Exception) -> Failure:
    """Reason, exit status and message of what ended a run."""
    from student_trainer.config import ConfigError

    if isinstance(error, ConfigError):  # before torch is imported
        return Failure(error.reason, REFUSED, f"nothing was started:\n{error}")

    from stillhouse.archive import ArchiveError
    from stillhouse.errors import (
        ModelRevisionMismatch,
        PermissionDenied,
        StillhouseError,
        Unauthenticated,
        VocabularyMismatch,
    )
    from student_trainer.checkpoint import CheckpointError
    from student_trainer.guards import Runaway
    from student_trainer.handover import WrongWeights
    from student_trainer.memory import DoesNotFit, is_out_of_memory
    from student_trainer.objective import NonFiniteLoss
    from student_trainer.processes import PeerFailed
    from student_trainer.sampler import SamplerLost
    from student_trainer.verifiers import VerifierError

    said, cause = str(error), error.__cause__
    match error:
        case PeerFailed():
            return Failure(error.reason, error.status, said)
        case StillhouseError():
            changed = isinstance(error, ModelRevisionMismatch | VocabularyMismatch)
            refused = isinstance(cause, PermissionDenied | Unauthenticated)
            return Failure(
                "teacher_revision" if changed else "teacher",
                LOST if error.retryable and not refused else FAILED,
                f"the teacher: {error.reason}: {error}",
            )
        case NonFiniteLoss():
            return Failure("non_finite", FAILED, said)
        case Runaway():
            return Failure("runaway", FAILED, said)
        case DoesNotFit():
            return Failure("memory", FAILED, said)
        case CheckpointError() if cause is not None and _peer_is_gone(cause):
            return Failure("peer", LOST, said)
        case CheckpointError():
            return Failure("checkpoint", LOST if _storage_is_gone(cause) else FAILED, said)
        case VerifierError():
            return Failure("verifier", FAILED, said)
        case WrongWeights():
            return Failure("sampler", FAILED, said)
        case SamplerLost():
            return Failure("sampler", LOST, said)
        case ArchiveError():
            return Failure("archive", LOST if _storage_is_gone(cause) else FAILED, said)
    if _peer_is_gone(error):
        what = re.sub(r"^\[\S+\] ", "", said.partition(". This is")[0].partition("\n")[0])  # without gloo's advice
        return Failure("peer", LOST, f"another process of the run is gone: {what}")
    return Failure("memory" if is_out_of_memory(error) else "unexpected", FAILED, None)


def _peer_is_gone(error: BaseException) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return not _NCCL_REFUSED.search(str(error))
    return isinstance(error, RuntimeError) and _PEER_IS_GONE.search(str(error)) is not None


def _storage_is_gone(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _STORAGE_IS_GONE
