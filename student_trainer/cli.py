"""`student-trainer`: train, eval, score. Arguments are parsed before anything heavy is imported."""

import argparse
import json
import os
import sys
from pathlib import Path

import stillhouse


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, or stopped by SIGTERM and saved; 1 failed while running; 2
    refused before it began; 130 stopped by Ctrl-C."""
    # Threads that wait leave their cores to the other processes; set before torch reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value only where it stands right behind the file; behind an option it means the same.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        return _dispatch(options)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint stands", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="student-trainer", description="Train a student on its own answers, scored by served teachers."
    )
    parser.add_argument("--version", action="version", version=f"stillhouse {stillhouse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("train", "train a student; writes metrics, samples and checkpoints into run_dir"),
        ("eval", "pass@k of student.model on the held-out prompts"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("config", type=Path, metavar="CONFIG.yaml")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example optimizer.learning_rate=1e-5"
        )
        if name == "train":
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on with the run in run_dir from its newest checkpoint; start it if there is none",
            )
        if name == "eval":
            command.add_argument("--out", type=Path, help="also write the result there, as JSON")
    score = commands.add_parser("score", help="score a JSONL of texts with a teacher and write the arrays")
    score.add_argument("--teacher", action="append", required=True, metavar="HOST:PORT", help="repeat for a pool")
    score.add_argument("--tokenizer", type=Path, required=True, help="directory of the teacher's tokenizer")
    score.add_argument("--input", type=Path, required=True, help='lines {"prompt": ..., "response": ...}')
    score.add_argument("--output", type=Path, required=True, help="directory for part-NNNNN.npz files")
    score.add_argument("--model", default="", help="name of the model on the server (default: its only one)")
    score.add_argument("--top-k", type=int, default=16)
    score.add_argument("--temperature", type=float, default=1.0)
    score.add_argument("--max-in-flight", type=int, default=64)
    score.add_argument("--deadline-s", type=float, default=120.0, help="of one sequence, retries included")
    score.add_argument("--tls", action="store_true", help="encrypt; the options below imply it")
    score.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM of the servers' authority")
    score.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM of your own certificate")
    score.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key")
    score.add_argument("--tls-server-name", metavar="NAME", help="that the servers' certificates must have")
    score.add_argument("--token-file", type=Path, metavar="FILE", help="holds a bearer token")
    score.add_argument("--plaintext-token", action="store_true", help="send it without TLS")
    score.add_argument("--part-size", type=int, default=1024, help="sequences in a file")
    return parser


def _dispatch(options: argparse.Namespace) -> int:
    from student_trainer.config import ConfigError, load_config

    try:
        if options.command == "score":
            from student_trainer.score import score_file

            score_file(options)
            return 0
        config = load_config(options.config, options.overrides)
        folder = options.config.resolve().parent
        from transformers.utils import logging

        from student_trainer.train import evaluate_only, train

        logging.disable_progress_bar()  # ours is one line a step

        if options.command == "train":
            summary = train(config, folder, resume=options.resume)
            if _is_main():
                print(json.dumps(summary, indent=2))
            return 0
        result = evaluate_only(config, folder)
        print(json.dumps(result, indent=2))
        if options.out:
            from student_trainer.run_dir import write_json

            write_json(options.out, result)
        return 0
    except ConfigError as error:
        if _is_main():  # the others say the same
            print(f"student-trainer: nothing was started:\n{error}", file=sys.stderr)
        return 2
    except Exception as error:
        return _failed(error)


def _is_main() -> bool:
    """Of several processes started by a launcher, the first."""
    return os.environ.get("RANK", "0") == "0"


def _failed(error: Exception) -> int:
    """Says in one message what ended the run; what nobody foresaw is raised on, with its traceback."""
    from stillhouse.archive import ArchiveError
    from stillhouse.errors import StillhouseError
    from student_trainer.checkpoint import CheckpointError
    from student_trainer.guards import Runaway
    from student_trainer.handover import WrongWeights
    from student_trainer.memory import DoesNotFit
    from student_trainer.objective import NonFiniteLoss
    from student_trainer.processes import PeerFailed
    from student_trainer.sampler import SamplerLost
    from student_trainer.stopping import Interrupted, Stopped
    from student_trainer.verifiers import VerifierError

    if isinstance(error, StillhouseError):
        print(f"student-trainer: the teacher: {error.reason}: {error}", file=sys.stderr)
        return 1
    if isinstance(error, Stopped):
        if _is_main():
            print(f"student-trainer: {error}: saved, --resume goes on from here", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 0
    training = NonFiniteLoss | Runaway | DoesNotFit | CheckpointError
    if isinstance(error, training | VerifierError | PeerFailed | SamplerLost | WrongWeights | ArchiveError):
        print(f"student-trainer: {error}", file=sys.stderr)
        return 1
    raise error


if __name__ == "__main__":
    sys.exit(main())
