"""The clients of `benchmarks.pool_floor`, with answers parsed into our message."""

from benchmarks.pool_floor import main
from stillhouse.v1 import teacher_pb2 as pb

if __name__ == "__main__":
    main(pb.ScoreResponse.FromString)
