"""Measure what norms do for generalization: runs, their metrics, statistics and a report."""
