"""Datasets: `catalog` finds them by Detectron2's names, `shapes` draws the synthetic ones."""
