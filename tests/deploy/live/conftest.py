"""What the tests of the deployment share: see `live_stack`."""

from tests.deploy.live.live_stack import stack

__all__ = ["stack"]
