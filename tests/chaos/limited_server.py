"""The synthetic server with limits on what is open that a test can reach."""

import functools
import sys

from benchmarks.synthetic_server import main
from teacher_server import interceptors

REQUESTS = 512
UNSENT_BYTES = 16 * 2**20
RECEIVING = 2
RECEIVE_S = 2.0

if __name__ == "__main__":
    interceptors.CallLimits = functools.partial(  # type: ignore[misc]
        interceptors.CallLimits,
        requests=REQUESTS,
        unsent_bytes=UNSENT_BYTES,
        receiving=RECEIVING,
        receive_s=RECEIVE_S,
    )
    sys.exit(main())
