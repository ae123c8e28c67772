"""What a real Prometheus says of a small pool and its runs. The stack runs while the tests of this folder do."""
