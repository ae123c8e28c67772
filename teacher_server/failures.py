"""What a caller learns of a failure that is not his."""

import logging
import secrets

from stillhouse.errors import EngineFailed

logger = logging.getLogger(__name__)


def engine_failed(cause: BaseException) -> EngineFailed:
    """Logs `cause` with its traceback under a fresh reference, and returns the error that names only that."""
    reference = secrets.token_hex(6)
    logger.error("unexpected failure reference=%s", reference, exc_info=cause)
    return EngineFailed(
        f"the server failed on this request; its log has the cause under reference {reference}",
        reference=reference,
    )
