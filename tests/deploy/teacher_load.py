"""Callers of a real teacher: `tests.chaos.load` with sequences of the demo's vocabulary, each answer compared bit for
bit with that of a server which nobody disturbed.

```python
expected = write_expected(client, path)                 # once, of a server started by hand
with Load(["dns:///pool-small.default.svc:50051"], module=MODULE, variables={EXPECTED: str(path)}) as load:
    ...
```
"""

import asyncio
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores
from tests.chaos import load

MODULE = "tests.deploy.teacher_load"
EXPECTED = "STILLHOUSE_EXPECTED"
"""Variable with the path of what `write_expected` wrote."""

_DIFFERENT = 40
_VOCABULARY = 17
_ARRAYS = ("top_ids", "top_logprobs", "sampled_logprobs", "log_tail", "entropy")


def make_sequence(plan: Any, number: int) -> load.Sequence:
    """Sequence `number`; they repeat after a while."""
    rng = np.random.default_rng(number % _DIFFERENT)
    token_ids = rng.integers(0, _VOCABULARY, int(rng.integers(8, 60))).astype(np.int32)
    return load.Sequence(token_ids, int(rng.integers(1, len(token_ids) - 1)), 4, {})


def difference(sequence: load.Sequence, scores: Scores) -> str:
    """Which arrays are not the right ones, bit for bit; "" if none."""
    return ", ".join(name for name in _ARRAYS if _arrays(scores)[name] != _right(sequence)[name])


def write_expected(teacher: TeacherClient, path: Path) -> None:
    """The right answers, by this teacher."""
    sequences = [make_sequence(None, number) for number in range(_DIFFERENT)]
    scores = [teacher.score(s.token_ids, score_start=s.score_start, top_k=s.top_k) for s in sequences]
    path.write_text(json.dumps({_key(s): _arrays(of) for s, of in zip(sequences, scores, strict=True)}))


def _key(sequence: load.Sequence) -> str:
    return sequence.token_ids.tobytes().hex()


def _arrays(scores: Scores) -> dict[str, str]:
    return {name: getattr(scores, name).tobytes().hex() for name in _ARRAYS}


def _right(sequence: load.Sequence) -> dict[str, str]:
    global _expected
    if _expected is None:
        _expected = json.loads(Path(os.environ[EXPECTED]).read_text())
    return _expected[_key(sequence)]


_expected: dict[str, dict[str, str]] | None = None

if __name__ == "__main__":
    load.make_sequence, load.difference = make_sequence, difference  # type: ignore[assignment]
    report = asyncio.run(load._main(load.Plan(**json.loads(sys.argv[1]))))
    print(json.dumps({"report": dataclasses.asdict(report)}), flush=True)
