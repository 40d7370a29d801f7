"""Ahead-of-time (AOT) compilation of a training step for TPUs, without a TPU, and checks of the program."""
