# mask_rcnn_R_50_FPN_1x_refbn.yaml as a LazyConfig for tools/lazyconfig_train_net.py.
from detectron2.model_zoo import get_config

_base = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
model, dataloader, train = _base.model, _base.dataloader, _base.train
optimizer, lr_multiplier = _base.optimizer, _base.lr_multiplier

_resnet = model.backbone.bottom_up
_resnet.freeze_at = 0
_resnet.stem.norm = _resnet.stages.norm = model.backbone.norm = "RefBN"
_resnet.stages.stride_in_1x1 = False
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]

refbn = dict(refresh="auto")  # more keys of MODEL.REFBN go here, in lower case
train.init_checkpoint = "output/pretrain/resnet50_refbn/backbone.pkl"
train.output_dir = "./output/mask_rcnn_R_50_FPN_1x_refbn"
