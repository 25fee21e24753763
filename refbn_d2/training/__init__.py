"""A training run: its loop, its log and metrics, and its OUTPUT_DIR."""
