"""The examples of the documentation run as they stand."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from stillhouse.codec import ScoreTask
from stillhouse.errors import ModelRevisionMismatch
from stillhouse.v1 import teacher_pb2 as pb
from tests.fakes import ROOT, FakeServer


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/{page} has no {language!r} block"
    return found


def refuse_last_weeks_revision(server: FakeServer) -> Callable[[pb.ScoreRequest], pb.ScoreResponse]:
    right = server._scores

    def scores(request: pb.ScoreRequest) -> pb.ScoreResponse:
        if request.expected_model_revision not in ("", "r1"):
            raise ModelRevisionMismatch("this server has 'r1'")
        return right(request)

    return scores


def test_every_example_of_the_clients_page_runs(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "_scores", refuse_last_weeks_revision(server))
    names: dict[str, object] = {}
    for block in blocks("use-the-client.md", "python"):
        assert "127.0.0.1:50051" in block or "def " in block
        exec(block.replace("127.0.0.1:50051", server.address), names)
    printed = capsys.readouterr().out
    assert "bigram 19 19" in printed
    assert "the teacher was replaced: this server has 'r1'" in printed
    assert "the client is closed; make a new one" in printed
    assert len(server.requests) == 1 + 1 + 1 + 100 + 100 + 100 + 1


def test_the_digests_of_the_contracts_page_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("contract.md", "python")
    exec(program, {})
    printed = capsys.readouterr().out.split()
    ids = np.array([3, 1, 4], np.int32)
    candidates = np.array([[7, 8], [9, 7]], np.int32)
    ours = [
        ScoreTask("", ids, 1, 2).digest().hex(),
        ScoreTask("tiny", ids, 1, 2, candidates, temperature=0.5, half_precision=True).digest().hex(),
    ]
    assert printed == ours
    assert "\n".join(ours) + "\n" in blocks("contract.md", "text")


def test_the_contracts_page_lists_every_reason() -> None:
    from stillhouse.errors import BY_REASON

    text = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| `([A-Z_]+)` \| (yes|no)\b", text, re.MULTILINE)
    listed = {reason: (code, again) for names, code, again in rows for reason in re.findall(r"`(\w+)`", names)}
    assert listed == {reason: (kind.code.name, "yes" if kind.retryable else "no") for reason, kind in BY_REASON.items()}
