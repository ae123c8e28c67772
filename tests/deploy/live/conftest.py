"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.deploy.live.live_stack import LiveStack, live_stack


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """The live stack, one for all tests that ask Prometheus, and none while others run: its callers never rest."""
    with live_stack(tmp_path_factory.mktemp("live")) as running:
        yield running
