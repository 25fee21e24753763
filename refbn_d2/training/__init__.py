"""Run a training: the loop, the log and metrics, and OUTPUT_DIR."""
