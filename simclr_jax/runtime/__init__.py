"""What keeps a run alive and records it: files, processes, signals, checkpoints, metrics."""
