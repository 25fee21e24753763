"""Labeled images in folders, tar files or WebDataset shards, and the batches made of them."""
