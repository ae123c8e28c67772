"""`student-trainer`: train, eval, score, launch. Arguments are parsed before anything heavy is imported."""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import stillhouse
from student_trainer.stopping import StopRequest

if TYPE_CHECKING:
    from student_trainer.failures import Failure


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status, of which `student_trainer.failures` has the list."""
    try:
        return _main(arguments)
    finally:
        if arguments is None:
            # Python takes its handlers away before it has ended, and a signal would then be the status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _main(arguments: list[str] | None) -> int:
    # Threads that wait leave their cores to the other processes; set before torch reads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["launch"] and "--" in words:
        end = words.index("--")
        options = _parse(words[end + 1 :])
        if options.command != "train":
            _parser().error(f"launch: {options.command} is one process; write launch [torchrun's options] -- train ...")
        from student_trainer.launch import launch

        return launch(words[1:end], words[end + 1 :], options.stopped_status)
    options = _parse(words)
    with contextlib.ExitStack() as stack:
        stop = StopRequest()
        if options.command == "train":
            # As a program it listens to the end: a signal to one that is about to end changes nothing.
            stop = stop.listen() if arguments is None else stack.enter_context(stop)
        try:
            return _dispatch(options, stop)
        except KeyboardInterrupt:
            print("interrupted; the last checkpoint stands", file=sys.stderr)
            return 130


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if options.command == "launch":
        parser.error("launch: write -- between torchrun's options and train, for example launch -- train CONFIG.yaml")
    # argparse takes key=value only where it stands right behind the file; behind an option it means the same.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


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
            command.add_argument(
                "--stopped-status",
                type=_stopped_status,
                default=0,
                metavar="N",
                help="exit status of a run that SIGTERM stopped and that was saved (default: 0)",
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
    what = "torchrun, but with an exit status that says what happened"
    launch = commands.add_parser(
        "launch", help=what, description=f"{what}. torchrun's options: python -m torch.distributed.run --help"
    )
    launch.usage = "student-trainer launch [torchrun's options] -- train CONFIG.yaml ..."
    launch.add_argument("options", nargs="*", metavar="torchrun's options", help="for example --nproc-per-node 8")
    return parser


def _stopped_status(text: str) -> int:
    if not text.isdigit() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text} is no exit status; choose one of 0 .. 255, for example 75")
    if int(text) in (1, 2, 3):
        raise argparse.ArgumentTypeError(f"{text} means that a run failed; choose another, for example 75")
    return int(text)


def _dispatch(options: argparse.Namespace, stop: StopRequest) -> int:
    if options.command == "train":
        return _train(options, stop)
    try:
        if options.command == "score":
            from student_trainer.score import score_file

            score_file(options)
        else:
            _evaluate(options)
        return 0
    except Exception as error:
        return _told(error).status


def _train(options: argparse.Namespace, stop: StopRequest) -> int:
    from student_trainer.config import load_config, metrics_page
    from student_trainer.stopping import Interrupted, Stopped

    page = metrics_page(options.config, options.overrides)
    exporter = None
    with contextlib.ExitStack() as stack:
        try:
            if page is not None and _is_main():
                from student_trainer.exporter import Exporter

                exporter = Exporter(page)
                stack.callback(exporter.close)
                print(f"metrics at {exporter.url}", flush=True)
            config = load_config(options.config, options.overrides)
            if exporter is not None:
                exporter.describe(config)
            _quiet_libraries()
            from student_trainer.train import train

            folder = options.config.resolve().parent
            summary = train(config, folder, resume=options.resume, stop=stop, exporter=exporter)
            if _is_main():
                print(json.dumps(summary, indent=2))
            return 0
        except Stopped as stopped:
            if _speaks():
                print(f"student-trainer: {stopped}: saved, --resume goes on from here", file=sys.stderr)
            return 130 if isinstance(stopped, Interrupted) else options.stopped_status
        except Exception as error:
            failure = _told(error)
            if exporter is not None:
                exporter.failed(failure.reason)
            if page is not None and page.hold_s and stop.signal is None:
                # Also where there is no page: the first process to end takes the others with it.
                if exporter is not None:
                    print(
                        f"student-trainer: stays for {page.hold_s:g} s so that {exporter.url} is read (metrics_hold_s)",
                        file=sys.stderr,
                    )
                stop.wait(page.hold_s)
            return failure.status


def _evaluate(options: argparse.Namespace) -> None:
    from student_trainer.config import load_config

    config = load_config(options.config, options.overrides)
    _quiet_libraries()
    from student_trainer.train import evaluate_only

    result = evaluate_only(config, options.config.resolve().parent)
    print(json.dumps(result, indent=2))
    if options.out:
        from student_trainer.run_dir import write_json

        write_json(options.out, result)


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is one line a step


def _is_main() -> bool:
    """Of several processes started by a launcher, the first."""
    return os.environ.get("RANK", "0") == "0"


def _speaks() -> bool:
    """Of several processes that would say the same, one on each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _told(error: Exception) -> "Failure":
    """Says in one message what ended the program; what nobody foresaw, with its traceback."""
    from student_trainer.failures import REFUSED, failure_of

    failure = failure_of(error)
    if failure.message is None:
        traceback.print_exception(error)
    elif failure.status != REFUSED or _speaks():
        print(f"student-trainer: {failure.message}", file=sys.stderr)
    return failure


if __name__ == "__main__":
    sys.exit(main())
