"""What ends a run: every error has one reason and one exit status, and a launcher reports that of the cause."""

import errno
import signal

import pytest
import torch
import torch.distributed as dist

from stillhouse.archive import ArchiveError
from stillhouse.errors import (
    BY_REASON,
    InvalidRequest,
    ModelRevisionMismatch,
    PermissionDenied,
    StillhouseError,
    Unavailable,
    VocabularyMismatch,
)
from student_trainer.checkpoint import CheckpointError
from student_trainer.config import ConfigError
from student_trainer.failures import FAILED, LOST, REASONS, REFUSED, failure_of
from student_trainer.guards import Runaway
from student_trainer.handover import WrongWeights
from student_trainer.launch import outcome
from student_trainer.memory import DoesNotFit
from student_trainer.objective import NonFiniteLoss
from student_trainer.processes import PeerFailed
from student_trainer.sampler import SamplerLost
from student_trainer.verifiers import VerifierError

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21871. This is "
    "typically caused by a remote worker crashing."
)
TIMEOUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5ms for send operation"


def _after(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "status"),
    [
        (ConfigError("steps: is missing"), "config", REFUSED),
        (ConfigError("damaged", reason="checkpoint"), "checkpoint", REFUSED),
        (NonFiniteLoss("nan"), "non_finite", FAILED),
        (Runaway("kl"), "runaway", FAILED),
        (DoesNotFit("a pass"), "memory", FAILED),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory", FAILED),
        (VerifierError("key", "answer", "it failed"), "verifier", FAILED),
        (WrongWeights("gap"), "sampler", FAILED),
        (SamplerLost("killed"), "sampler", LOST),
        (CheckpointError("full"), "checkpoint", FAILED),
        (_after(CheckpointError("full"), OSError(errno.ENOSPC, "full")), "checkpoint", FAILED),
        (_after(CheckpointError("gone"), OSError(errno.EIO, "gone")), "checkpoint", LOST),
        (_after(CheckpointError("peer"), RuntimeError(GLOO)), "peer", LOST),
        (ArchiveError("no entry"), "archive", FAILED),
        (_after(ArchiveError("full"), OSError(errno.ENOSPC, "full")), "archive", FAILED),
        (_after(ArchiveError("bucket"), OSError("s3://bucket cannot be written: timeout")), "archive", LOST),
        (PeerFailed("process 1 of 2 failed"), "peer", LOST),
        (PeerFailed("process 1 of 2 failed", "verifier", FAILED), "verifier", FAILED),
        (RuntimeError(GLOO), "peer", LOST),
        (RuntimeError(TIMEOUT), "peer", LOST),
        (dist.DistBackendError("NCCL error ... ncclRemoteError: a peer exited"), "peer", LOST),
        (dist.DistBackendError("NCCL error ... ncclInvalidUsage: Duplicate GPU detected"), "unexpected", FAILED),
        (dist.DistStoreError("wait timeout"), "peer", LOST),
        (dist.DistNetworkError("connection refused"), "peer", LOST),
        (RuntimeError("gloo/transport/tcp/device.cc:84] Unable to find address for: node-1"), "unexpected", FAILED),
        (RuntimeError("shapes do not fit"), "unexpected", FAILED),
        (KeyError("x"), "unexpected", FAILED),
        (ModelRevisionMismatch("r2"), "teacher_revision", FAILED),
        (VocabularyMismatch("other"), "teacher_revision", FAILED),
        (Unavailable("nobody"), "teacher", LOST),
        (_after(Unavailable("nobody lets us in"), PermissionDenied("no")), "teacher", FAILED),
        (InvalidRequest("top_k"), "teacher", FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_every_error_has_its_reason_and_its_status(error, reason, status):
    failure = failure_of(error)
    assert (failure.reason, failure.status) == (reason, status)
    # What nobody foresaw is told with its traceback.
    foreseen = reason != "unexpected" and not isinstance(error, torch.OutOfMemoryError)
    assert (failure.message is not None) == foreseen


def test_a_peer_that_is_gone_is_told_in_a_line():
    assert failure_of(RuntimeError(GLOO)).message == (
        "another process of the run is gone: Connection closed by peer [127.0.0.1]:21871"
    )


@pytest.mark.parametrize("kind", BY_REASON.values(), ids=BY_REASON)
def test_of_the_teachers_errors_those_may_be_over_that_the_client_tries_again(kind: type[StillhouseError]):
    failure = failure_of(kind("text"))
    assert failure.reason in ("teacher", "teacher_revision") and failure.reason in REASONS
    assert failure.status == (LOST if kind.retryable else FAILED)


TERM, KILL, ABORT = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT


@pytest.mark.parametrize(
    ("codes", "told", "status"),
    [
        ([0, 0], False, 0),
        ([75, 75], True, 75),
        ([75, 75], False, 75),  # another node was told
        ([0, 75], True, 75),
        ([1, 3], False, 1),
        ([3, 1], False, 1),
        ([2, 3], False, 2),
        ([75, 1], True, 1),
        ([75, 3], True, 3),
        ([130, 130], True, 130),
        ([3, 3], False, 3),
        ([3, TERM], False, 3),  # ended by torchelastic, because the other had ended
        ([1, TERM], False, 1),
        ([KILL, 3], False, 137),
        ([KILL, TERM], False, 137),
        ([KILL, 1], False, 1),
        ([ABORT, 3], False, 134),
        ([TERM, TERM], True, 75),  # before they listened
        ([TERM, TERM], False, 143),
        ([0, None], False, 3),  # hangs in the kernel
        ([], False, 3),
    ],
)
def test_a_launcher_reports_the_worker_that_has_the_cause(codes, told, status):
    assert outcome(codes, 75, told=told) == status
