# faster_rcnn_R_50_FPN_1x_refbn.yaml as a LazyConfig for tools/lazyconfig_train_net.py.
from .mask_rcnn_R_50_FPN_1x_refbn import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    refbn,
    train,
)

for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_key)
dataloader.train.mapper.use_instance_mask = False
train.output_dir = "./output/faster_rcnn_R_50_FPN_1x_refbn"
