"""Compiling a training step ahead of time for TPUs that are not there, and judging the program."""
