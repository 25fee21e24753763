"""What a norm does for generalization: many runs, their metrics, statistics and a report."""
