"""Find the configs that come with the package.

    cfg.merge_from_file(get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x_refbn.yaml"))

A wheel has the files of configs/ here; in a checkout they stay at its top.
"""

from refbn_d2.utils.config_files import config_names, get_config_file

__all__ = ["config_names", "get_config_file"]
