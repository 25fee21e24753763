"""Pictures of a run: curves of its metrics, and samples of what the model sees."""
