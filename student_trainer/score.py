"""`student-trainer score`: texts in, the teacher's arrays out.

Each input line is a JSON object: `{"prompt": TEXT, "response": TEXT}`, or `{"token_ids": [...], "score_start": N}`
for who tokenises himself. Output is `part-NNNNN.npz`, ragged: row i of every array but `line` and `length` is
response token i of the part, sequences one after another.

    line [S]                 line of the input, from 1         top_ids, top_logprobs [R, k]
    length [S]               response tokens of a sequence     sampled_logprobs, log_tail,
    token_ids [R]            the response tokens               entropy, log_normalizer [R]

`teacher.json` says which revision scored, and how. Parts are written whole or not at all; run the same command
again after a crash and the parts that exist are kept.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.client import TeacherClient
from stillhouse.codec import Scores, Teacher
from stillhouse.security import Tls
from stillhouse.vocabulary import vocabulary_digest
from student_trainer.config import ConfigError
from student_trainer.policy import load_tokenizer
from student_trainer.progress import Heartbeat
from student_trainer.run_dir import write_json

_PER_TOKEN = ("top_ids", "top_logprobs", "sampled_logprobs", "log_tail", "entropy", "log_normalizer")


def score_file(options: argparse.Namespace) -> None:
    """Scores `options.input` part by part into `options.output` (see the command line for the rest)."""
    tokenizer = load_tokenizer(options.tokenizer)
    sequences = _read(options.input, tokenizer)
    with _client(options) as client:
        teacher = client.wait_until_ready(
            deadline_s=60.0,
            on_wait=lambda elapsed_s, error: print(
                f"waiting for the teacher ({elapsed_s:.0f} of 60 s): {error}", file=sys.stderr
            ),
        )
        _check(options, teacher, tokenizer, sequences)
        _claim(options, teacher)
        start_s, tokens = time.monotonic(), 0
        for part, first in enumerate(range(0, len(sequences), options.part_size)):
            path = options.output / f"part-{part:05}.npz"
            chosen = sequences[first : first + options.part_size]
            if path.exists():
                print(f"{path}: exists, kept", file=sys.stderr)
                continue
            futures = [
                client.submit_score(
                    ids,
                    score_start=start,
                    top_k=options.top_k,
                    temperature=options.temperature,
                    deadline_s=options.deadline_s,
                    expected_model_revision=teacher.model_revision,
                    expected_compute_dtype=teacher.compute_dtype,
                )
                for _, ids, start in chosen
            ]
            _write(path, chosen, _gather(futures))
            tokens += sum(len(ids) - start for _, ids, start in chosen)
            rate = tokens / (time.monotonic() - start_s)
            print(f"{path}: {len(chosen)} sequences, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)


def _client(options: argparse.Namespace) -> TeacherClient:
    files = options.tls_ca, options.tls_certificate, options.tls_key
    tls = Tls(*files, options.tls_server_name) if options.tls or any(files) or options.tls_server_name else None
    try:
        return TeacherClient(
            options.teacher,
            model=options.model,
            max_in_flight=options.max_in_flight,
            tls=tls,
            token_file=options.token_file,
            plaintext_token=options.plaintext_token,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"--teacher, --tls-... or --token-file: {error}") from error


def _gather(futures: list[Future[Scores]], *, note_every_s: float = 10.0) -> list[Scores]:
    """Results in order; a line on stderr every `note_every_s` while any is missing.

    The first failure is raised at once and the rest withdrawn. Each call carries its own deadline, so this ends.
    """
    heartbeat = Heartbeat("waiting for the teacher's scores", len(futures), every_s=note_every_s)
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=note_every_s, return_when=FIRST_COMPLETED)
        heartbeat.advance(len(done))
        for future in done:
            if future.exception() is not None:
                for other in pending:
                    other.cancel()
                future.result()
    return [future.result() for future in futures]


def _read(path: Path, tokenizer: Any) -> list[tuple[int, list[int], int]]:
    """(line, token ids, score_start) of every line; ConfigError with file and line for a broken one."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--input: {path} cannot be read ({error.strerror})") from error
    sequences = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            ids, start = _tokens(json.loads(line), tokenizer)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        sequences.append((number, ids, start))
    if not sequences:
        raise ConfigError(f"--input: {path} holds no line to score")
    return sequences


def _tokens(row: Any, tokenizer: Any) -> tuple[list[int], int]:
    if isinstance(row, dict) and "token_ids" in row:
        ids, start = row["token_ids"], row.get("score_start")
        if not (isinstance(ids, list) and all(type(i) is int for i in ids) and type(start) is int):
            raise ValueError("token_ids must be a list of whole numbers and score_start a whole number")
    else:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise ValueError('needs {"prompt": text, "response": text} or {"token_ids": [...], "score_start": n}')
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids, start = prompt + tokenizer(row["response"], add_special_tokens=False)["input_ids"], len(prompt)
    if not 1 <= start < len(ids):
        raise ValueError(f"{len(ids)} tokens with score_start {start}; there must be a prompt and a response")
    return ids, start


def _check(
    options: argparse.Namespace, teacher: Teacher, tokenizer: Any, sequences: list[tuple[int, list[int], int]]
) -> None:
    if vocabulary_digest(tokenizer.get_vocab()) != teacher.vocabulary_digest:
        raise ConfigError(f"--tokenizer: {options.tokenizer} is not the tokenizer of teacher {teacher.model!r}")
    if not 0 <= options.top_k <= teacher.max_top_k:
        raise ConfigError(f"--top-k: {options.top_k} is outside the server's 0 .. {teacher.max_top_k}")
    for number, ids, _ in sequences:
        if len(ids) > teacher.max_sequence_tokens:
            raise ConfigError(
                f"{options.input}:{number}: {len(ids)} tokens, the teacher takes {teacher.max_sequence_tokens}"
            )
        if not 0 <= min(ids) <= max(ids) < teacher.vocabulary_size:
            raise ConfigError(
                f"{options.input}:{number}: token ids {min(ids)} .. {max(ids)}; the vocabulary is "
                f"0 .. {teacher.vocabulary_size - 1}"
            )


def _claim(options: argparse.Namespace, teacher: Teacher) -> None:
    """Makes the output directory, or checks that it belongs to the same scoring."""
    facts = {
        "input": str(options.input.resolve()),
        "top_k": options.top_k,
        "temperature": options.temperature,
        "part_size": options.part_size,
        **asdict(teacher),
    }
    path = options.output / "teacher.json"
    if path.exists():
        kept = json.loads(path.read_text())
        changed = sorted(key for key in facts if kept.get(key) != facts[key])
        if changed:
            raise ConfigError(
                f"--output: {options.output} holds scores made with another {', '.join(changed)}; choose another "
                "directory"
            )
        return
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _write(path: Path, sequences: list[tuple[int, list[int], int]], scores: list[Scores]) -> None:
    arrays: dict[str, Any] = {name: np.concatenate([getattr(score, name) for score in scores]) for name in _PER_TOKEN}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            line=np.array([number for number, _, _ in sequences], np.int64),
            length=np.array([len(ids) - start for _, ids, start in sequences], np.int64),
            token_ids=np.concatenate([np.array(ids[start:], np.int32) for _, ids, start in sequences]),
            **arrays,
        )
    os.replace(partial, path)
