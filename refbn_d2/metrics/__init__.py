"""Measure detections: COCO's average precision, the bootstrap over images, study statistics."""

from refbn_d2.metrics.coco_ap import evaluate, format_table, to_coco_results, verify_results

__all__ = ["evaluate", "format_table", "to_coco_results", "verify_results"]
