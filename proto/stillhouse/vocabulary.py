"""What a token id means: the facts two models must share before their distributions can be compared."""

import hashlib
from collections.abc import Mapping


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """Number of ids that exist, `max id + 1`, for a tokenizer's full mapping from token to id.

    A model's head may have more rows (padding to a multiple of 64 or 128, different within one family);
    the ids beyond are not tokens.
    """
    if not vocabulary:
        raise ValueError("vocabulary is empty: the tokenizer defines no token")
    return max(vocabulary.values()) + 1


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 (hex) over all (id, token) pairs in order of id: equal if and only if every id means the same.

    Takes a tokenizer's `get_vocab()`, special and added tokens included.
    """
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        encoded = token.encode("utf-8", "surrogatepass")
        digest.update(f"{index} {len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()
