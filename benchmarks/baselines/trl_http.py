"""vLLM's OpenAI endpoint, asked by TRL's client, as TRL's distillation trainers do it."""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from benchmarks.baselines import contender
from benchmarks.baselines.contender import Answer, Contender, Sequences

NAME = "vllm serve + TRL"
_MODULE = "vllm.entrypoints.launchers.api_server.entry"


@contextlib.contextmanager
def started(model: Path, *, variables: dict[str, str], limit_s: float) -> Iterator["TrlHttp"]:
    """A server of `model`."""
    port = contender.free_port()

    def ready(_: object) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as page:
                return page.status == 200
        except (urllib.error.URLError, OSError):
            return False

    with contender.process(contender.serve_command(_MODULE, model, port), ready, variables=variables) as running:
        yield TrlHttp(running.pid, port, limit_s)


class TrlHttp(Contender):
    def __init__(self, pid: int, port: int, limit_s: float) -> None:
        super().__init__(pid)
        self._session = _Session(port, limit_s)
        self._client = _trl_client(port, self._session)

    def wave(self, variant: str, sequences: Sequences, k: int) -> float:
        tokens = [sequence.tolist() for sequence in sequences]
        began_s = time.perf_counter()
        self._scores(tokens, k)
        return time.perf_counter() - began_s

    def answer(self, sequence: NDArray[np.int32], k: int) -> Answer:
        found = self._scores([sequence.tolist()], k)
        return Answer(
            np.array(found["actual_logprobs"][0], np.float32)[:, 0],
            np.array(found["logprob_token_ids"][0], np.int32),
            np.array(found["logprobs"][0], np.float32),
        )

    def payload_bytes(self) -> int | None:
        return self._session.body_bytes

    def _scores(self, tokens: list[list[int]], k: int) -> dict[str, list[Any]]:
        # A request a sequence, all at once: vLLM batches them.
        return self._client.get_sequence_logprobs(
            tokens, [1] * len(tokens), top_logprobs=k, chunk_size=1, max_concurrent_requests=len(tokens)
        )


def _trl_client(port: int, session: "_Session") -> Any:
    """TRL's client without its constructor.

    The constructor wants vllm and requests importable here, though scoring needs nothing of the former and of the
    latter only `session.post`. What is measured, `get_sequence_logprobs`, is TRL's own code, unchanged; it uses
    these three attributes.
    """
    from trl.generation.vllm_client import VLLMClient

    client: Any = object.__new__(VLLMClient)
    client.session = session
    client.base_url = f"http://127.0.0.1:{port}"
    client.model = "teacher"
    return client


class _Session:
    """`requests.Session.post` on http.client, which requests is built on too: less work, never more.

    A connection for each request, as the server closes idle ones after 5 s; on one machine that is 0.1 ms.
    """

    def __init__(self, port: int, limit_s: float) -> None:
        self._port = port
        self._limit_s = limit_s
        self.body_bytes = 0

    def post(self, url: str, json: Any) -> "_Response":
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._limit_s)
        with contextlib.closing(connection):
            connection.request("POST", urlsplit(url).path, _dumps(json), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
        self.body_bytes = len(body)
        return _Response(response.status, body)


class _Response:
    def __init__(self, status_code: int, body: bytes) -> None:
        self.status_code = status_code
        self._body = body

    @property
    def text(self) -> str:
        return self._body.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self._body)


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()
