"""Run the quickstart: from no data to a trained Mask R-CNN and a report, in minutes."""
