"""Entry point of `teacher-server`."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from teacher_server.logs import set_up
from teacher_server.options import USAGE, OptionError, Options, check, parse
from teacher_server.start_failures import StartFailure, explain
from teacher_server.vllm_plugin import die_with_parent

if TYPE_CHECKING:
    from teacher_server.pages import Pages

logger = logging.getLogger(__name__)

# gRPC's core writes lines of its own past our log, whenever a stranger sends it nonsense.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# The engine's processes begin with this module, and die with the server from here on.
die_with_parent()

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT.

    Exit codes: 0 stopped, 1 could not load or serve, 2 wrong option, 3 the engine died.
    """
    with _stopped_at_once():
        options = parse(argv)
        set_up(options.log_level, options.log_format)
        try:
            check(options)
        except OptionError as error:
            if options.log_format == "text" and not options.hold_failed_s > 0:
                print(f"usage: {USAGE}", file=sys.stderr)
            return _failed(options, None, error)
        except OSError as error:  # a file that may not be read
            return _failed(options, None, error)
        return _serve(options)


def _serve(options: Options) -> int:
    # From here on it takes time: first grpc, and when the pages are open torch and transformers.
    from teacher_server.engine import EngineLost

    pages = None
    try:
        pages = _open_pages(options)
        from teacher_server.run import run

        run(options, pages)
    except EngineLost as error:
        return _end(options, StartFailure("engine", 3, str(error)))
    except Exception as error:
        return _failed(options, pages, error)
    except KeyboardInterrupt:
        return 130
    finally:
        if pages is not None:
            pages.close()
    return 0


def _open_pages(options: Options) -> "Pages":
    from teacher_server.pages import Pages

    return Pages(
        metrics_host=options.host or "127.0.0.1",
        metrics_port=options.metrics_port,
        health_listen=options.health_listen,
        stall_s=options.stall_s,
    )


def _failed(options: Options, pages: "Pages | None", error: Exception) -> int:
    """Says why, stays for a while if asked to, and gives the exit code."""
    # Whatever a library says of a damaged model, on one line; the traceback is for --log-level debug.
    logger.debug("could not serve", exc_info=error)
    failure = explain(error, options.model)
    if options.hold_failed_s > 0 and not (pages and pages.served):
        logger.error("%s", failure.text)
        try:
            pages = pages or _open_pages(options)
        except (ValueError, OverflowError) as closed:
            logger.error("not held: %s", closed)  # there is nobody who could look
        else:
            _hold(failure, pages, options.hold_failed_s)
            pages.close()
    return _end(options, failure)


def _end(options: Options, failure: StartFailure) -> int:
    """Writes the last line."""
    if options.log_format == "json":
        logger.error("%s", failure.text)
    else:
        print(f"teacher-server: error: {failure.text}", file=sys.stderr)
    return failure.exit_code


@contextlib.contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Until the server takes the signals itself, one ends the program with 0, whatever it is doing.

    Process 1 of a container has no default action for SIGTERM, and threads that load cannot be interrupted; nothing is
    lost yet. The engine's processes see that their parent is gone.
    """
    before = {number: signal.signal(number, _stop_at_once) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _stop_at_once:
                signal.signal(number, handler)


def _stop_at_once(number: int, frame: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it came while a line was being written
        logger.info("stopped before it was ready: signal=%s", signal.Signals(number).name)
    os._exit(0)


class _Signalled(BaseException):
    pass


def _hold(failure: StartFailure, pages: "Pages", seconds: float) -> None:
    """Shows the failure for so long, or until a signal."""

    def stop(number: int, frame: Any) -> None:
        ignore()  # launchers often pass one signal on twice
        raise _Signalled

    def ignore() -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)

    try:
        # Before anybody can see that it failed: a signal from then on ends it with the failure's code and line.
        for number in _SIGNALS:
            signal.signal(number, stop)
        pages.metrics.start_failed(failure.reason)
        logger.info("held: reason=%s seconds=%g exit_code=%d", failure.reason, seconds, failure.exit_code)
        time.sleep(seconds)
        ignore()  # it ends anyway, with its last line
    except _Signalled:
        pass


if __name__ == "__main__":
    sys.exit(main())
