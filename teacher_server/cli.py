"""Entry point of `teacher-server`."""

import logging
import os
import sys
from collections.abc import Sequence

from teacher_server.logs import set_up
from teacher_server.options import OptionError, parse
from teacher_server.vllm_plugin import die_with_parent

# gRPC's core writes lines of its own past our log, whenever a stranger sends it nonsense.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# The engine's processes begin with this module, and die with the server from here on.
die_with_parent()


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT.

    Exit codes: 0 stopped, 1 could not load or serve, 2 wrong option, 3 the engine died.
    """
    options = parse(argv)
    set_up(options.log_level, options.log_format)
    # From here on it takes seconds: torch, transformers and grpc.
    from teacher_server.engine import EngineLost
    from teacher_server.run import run

    try:
        run(options)
    except OptionError as error:
        print(f"teacher-server: error: {error}", file=sys.stderr)
        return 2
    except EngineLost as error:
        print(f"teacher-server: error: {error}", file=sys.stderr)
        return 3
    except Exception as error:
        # Whatever a library says of a damaged model, on one line; the traceback is for --log-level debug.
        logging.getLogger(__name__).debug("could not serve", exc_info=True)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"teacher-server: error: cannot serve {options.model}: {cause}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
