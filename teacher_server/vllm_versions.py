"""Which versions of vLLM `vllm_adapter` was read against. Imports nothing of it, so any version can be refused."""

SUPPORTED = ((0, 25), (0, 33))
"""First and last minor version."""


class UnsupportedVllm(RuntimeError):
    """This version of vLLM, or this model in it, cannot be served."""


def check_version(version: str) -> None:
    """Raises UnsupportedVllm unless `version`, as `vllm.__version__` says it, is supported."""
    numbers = version.split("+")[0].split(".")[:2]
    found = tuple(int(number) for number in numbers) if all(number.isdigit() for number in numbers) else ()
    (low_major, low), (high_major, high) = SUPPORTED
    if not SUPPORTED[0] <= found <= SUPPORTED[1]:
        raise UnsupportedVllm(
            f"vllm {version} is installed; this version of teacher-server serves with vllm "
            f"{low_major}.{low} to {high_major}.{high}: pip install 'stillhouse[vllm]'"
        )
