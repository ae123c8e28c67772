"""Which waiting tasks are scored together."""

from collections.abc import Sequence

from stillhouse.codec import ScoreTask


def pick_batch(waiting: Sequence[ScoreTask], max_batch_tokens: int) -> list[int]:
    """Indices into `waiting` (oldest first) of the next batch; the oldest task is always in it.

    Every task of a batch has the same top_k and number of candidates, and their lengths are as close to
    the oldest's as possible, since all are padded to the longest: sequences x longest <= max_batch_tokens.
    A task that is longer than that goes alone.
    """
    oldest = waiting[0]
    alike = [
        index
        for index in range(1, len(waiting))
        if waiting[index].top_k == oldest.top_k and waiting[index].num_candidates == oldest.num_candidates
    ]
    # sorted() is stable: of two that fit equally well the older goes first.
    alike.sort(key=lambda index: abs(len(waiting[index].token_ids) - len(oldest.token_ids)))
    batch, longest = [0], len(oldest.token_ids)
    for index in alike:
        padded = max(longest, len(waiting[index].token_ids))
        if (len(batch) + 1) * padded <= max_batch_tokens:
            batch.append(index)
            longest = padded
    return batch
