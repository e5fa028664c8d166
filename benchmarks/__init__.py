"""What is fast and how fast, measured. Each is a program; none is imported by the library."""

CANNOT_RUN = 2  # exit status of a benchmark for which this machine lacks something
