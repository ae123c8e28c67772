"""What `benchmarks.teacher_throughput` measures, one way of getting scores out of a teacher a module."""
