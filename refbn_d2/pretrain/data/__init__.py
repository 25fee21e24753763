"""Read labeled images from folders, tar files or WebDataset shards, and make batches of them."""
