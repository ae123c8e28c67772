"""The contract between teachers and trainers, and its client: numpy and grpcio, nothing else."""

__version__ = "0.1.0"
