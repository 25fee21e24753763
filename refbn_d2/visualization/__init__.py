"""Draw a run: curves of its metrics, and images with predictions beside the ground truth."""
