"""What did not fit, and which limit to lower."""

import torch


class DoesNotFit(MemoryError):
    """Memory ran out; the message names the limit to lower. Nothing was learnt from the step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The host's allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
