"""Provide datasets: `catalog` finds them by Detectron2's names, `shapes` draws synthetic ones."""
