"""What is fast and how fast, measured. Each is a program; none is imported by the library."""
