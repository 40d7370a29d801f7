"""Infrastructure of runs: files, processes, signals, checkpoints, logs."""
