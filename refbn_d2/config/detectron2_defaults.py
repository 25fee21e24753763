"""List all of Detectron2's config keys with Detectron2's defaults (config VERSION 2).

Keys of heads that only Detectron2 supports are included, so that each engine loads the configs
that the other writes. `engines/torchvision/supported.py` says which values the torchvision engine
supports. A test compares this file with Detectron2's.
"""

# Shapes in comments: H, W image height and width; K number of classes.


def add_detectron2_defaults(cfg) -> None:
    """Add Detectron2's keys to the empty config node `cfg`, in place."""
    CN = type(cfg)

    cfg.VERSION = 2  # of the key names
    cfg.OUTPUT_DIR = "./output"  # logs, checkpoints and results go here
    cfg.SEED = -1  # negative: a new seed in each run
    cfg.CUDNN_BENCHMARK = False  # let cuDNN time its algorithms; worth it for images of one size
    cfg.FLOAT32_PRECISION = ""  # "highest", "high" or "medium"; "": torch's own
    cfg.VIS_PERIOD = 0  # steps between pictures of training batches; 0: none
    cfg.GLOBAL = CN()
    cfg.GLOBAL.HACK = 1.0  # for experiments in Detectron2

    _add_model(cfg, CN)
    _add_data(cfg, CN)
    _add_solver(cfg, CN)


def _add_model(cfg, CN) -> None:
    model = cfg.MODEL = CN()
    model.META_ARCHITECTURE = "GeneralizedRCNN"  # the detector as a whole
    model.DEVICE = "cuda"  # "cuda", "cuda:1", "cpu", ...
    model.WEIGHTS = ""  # checkpoint to start from
    model.MASK_ON = False  # mask head, as in Mask R-CNN
    model.KEYPOINT_ON = False  # keypoint head
    model.LOAD_PROPOSALS = False  # read boxes from a file instead of running an RPN
    model.PIXEL_MEAN = [103.53, 116.28, 123.675]  # of 0-255 values, in INPUT.FORMAT's order
    model.PIXEL_STD = [1.0, 1.0, 1.0]  # 1: already folded into the first convolution's weights

    model.BACKBONE = CN()
    model.BACKBONE.NAME = "build_resnet_backbone"  # the function that builds it
    model.BACKBONE.FREEZE_AT = 2  # frozen stages: 0 none, 1 stem, 2 stem and res2, ...

    resnets = model.RESNETS = CN()
    resnets.DEPTH = 50  # 18, 34, 50, 101 or 152
    resnets.OUT_FEATURES = ["res4"]  # stages returned
    resnets.NORM = "FrozenBN"  # name of the norm in every block
    resnets.NUM_GROUPS = 1  # of the 3x3 convolutions; > 1: ResNeXt
    resnets.WIDTH_PER_GROUP = 64  # bottleneck channels per group in res2
    resnets.STRIDE_IN_1X1 = True  # stride in the 1x1 convolution (MSRA) or the 3x3 (torchvision)
    resnets.RES5_DILATION = 1  # 2: res5 at stride 16 (DC5)
    resnets.RES2_OUT_CHANNELS = 256  # doubles each stage; 64 for depth 18 and 34
    resnets.STEM_OUT_CHANNELS = 64  # channels of the stem
    resnets.DEFORM_ON_PER_STAGE = [False, False, False, False]  # deformable 3x3 in res2..res5
    resnets.DEFORM_MODULATED = False  # deformable convolution, version 2
    resnets.DEFORM_NUM_GROUPS = 1  # groups of offsets

    fpn = model.FPN = CN()
    fpn.IN_FEATURES = []  # stages merged; each has twice the stride of the one before
    fpn.OUT_CHANNELS = 256  # of each level
    fpn.NORM = ""  # of its convolutions; "": none, and a bias
    fpn.FUSE_TYPE = "sum"  # top-down and lateral are added, or averaged ("avg")

    model.PROPOSAL_GENERATOR = CN()
    model.PROPOSAL_GENERATOR.NAME = "RPN"  # or "RRPN", "PrecomputedProposals"
    model.PROPOSAL_GENERATOR.MIN_SIZE = 0  # smaller proposals are dropped, pixels

    anchors = model.ANCHOR_GENERATOR = CN()
    anchors.NAME = "DefaultAnchorGenerator"  # axis-aligned
    anchors.SIZES = [[32, 64, 128, 256, 512]]  # square roots of areas in pixels, a list per level
    anchors.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]  # H/W; one list per level, or one for all
    anchors.ANGLES = [[-90, 0, 90]]  # degrees, for rotated boxes
    anchors.OFFSET = 0.0  # of the first anchor's center, in strides

    rpn = model.RPN = CN()
    rpn.HEAD_NAME = "StandardRPNHead"  # one 3x3 convolution and two 1x1 predictors
    rpn.IN_FEATURES = ["res4"]  # levels it reads
    rpn.CONV_DIMS = [-1]  # channels of its hidden convolutions; -1: those of the input
    rpn.BOUNDARY_THRESH = -1  # drop anchors that leave the image by more; -1: none
    rpn.IOU_THRESHOLDS = [0.3, 0.7]  # below the first: background; the second or more: object
    rpn.IOU_LABELS = [0, -1, 1]  # labels of the three ranges; -1: ignored
    rpn.BATCH_SIZE_PER_IMAGE = 256  # anchors drawn for the loss
    rpn.POSITIVE_FRACTION = 0.5  # largest share of objects among them
    rpn.BBOX_REG_LOSS_TYPE = "smooth_l1"  # or "giou", "diou", "ciou"
    rpn.BBOX_REG_LOSS_WEIGHT = 1.0  # of the box loss
    rpn.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # scales of dx, dy, dw, dh
    rpn.SMOOTH_L1_BETA = 0.0  # error at which L2 becomes L1; 0: L1
    rpn.LOSS_WEIGHT = 1.0  # of both RPN losses
    rpn.PRE_NMS_TOPK_TRAIN = 12000  # best proposals per level before NMS
    rpn.PRE_NMS_TOPK_TEST = 6000
    rpn.POST_NMS_TOPK_TRAIN = 2000  # best proposals per image after NMS
    rpn.POST_NMS_TOPK_TEST = 1000
    rpn.NMS_THRESH = 0.7  # IoU

    heads = model.ROI_HEADS = CN()
    heads.NAME = "Res5ROIHeads"  # C4; "StandardROIHeads" for FPN and DC5
    heads.NUM_CLASSES = 80  # K, without background
    heads.IN_FEATURES = ["res4"]  # levels pooled from
    heads.IOU_THRESHOLDS = [0.5]  # this or more: object
    heads.IOU_LABELS = [0, 1]  # labels of the two ranges
    heads.BATCH_SIZE_PER_IMAGE = 512  # proposals drawn for the loss
    heads.POSITIVE_FRACTION = 0.25  # largest share of objects among them
    heads.SCORE_THRESH_TEST = 0.05  # lower scores are dropped
    heads.NMS_THRESH_TEST = 0.5  # IoU, within a class
    heads.PROPOSAL_APPEND_GT = True  # ground-truth boxes join the proposals in training

    box = model.ROI_BOX_HEAD = CN()
    box.NAME = ""  # "FastRCNNConvFCHead"; not used by Res5ROIHeads
    box.NUM_CONV = 0  # 3x3 convolutions before the linear layers
    box.CONV_DIM = 256  # their channels
    box.NUM_FC = 0  # linear layers
    box.FC_DIM = 1024  # their width
    box.NORM = ""  # of the convolutions
    box.POOLER_TYPE = "ROIAlignV2"  # aligned to pixel centers
    box.POOLER_RESOLUTION = 14  # pooled to this side
    box.POOLER_SAMPLING_RATIO = 0  # samples per side of a bin; 0: as many as the box needs
    box.BBOX_REG_LOSS_TYPE = "smooth_l1"  # or "giou", "diou", "ciou"
    box.BBOX_REG_LOSS_WEIGHT = 1.0  # of the box loss
    box.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # scales of dx, dy, dw, dh
    box.SMOOTH_L1_BETA = 0.0  # error at which L2 becomes L1; 0: L1
    box.CLS_AGNOSTIC_BBOX_REG = False  # one box for all classes
    box.TRAIN_ON_PRED_BOXES = False  # the mask head trains on refined boxes
    box.USE_FED_LOSS = False  # federated loss (LVIS)
    box.USE_SIGMOID_CE = False  # a sigmoid per class instead of softmax
    box.FED_LOSS_FREQ_WEIGHT_POWER = 0.5  # power of image counts, for drawing classes
    box.FED_LOSS_NUM_CLASSES = 50  # classes in a federated loss

    mask = model.ROI_MASK_HEAD = CN()
    mask.NAME = "MaskRCNNConvUpsampleHead"  # convolutions, one upsampling, one predictor
    mask.NUM_CONV = 0  # 3x3 convolutions
    mask.CONV_DIM = 256  # their channels
    mask.NORM = ""  # of the convolutions
    mask.POOLER_TYPE = "ROIAlignV2"  # aligned to pixel centers
    mask.POOLER_RESOLUTION = 14  # pooled to this side; the mask's side is twice that
    mask.POOLER_SAMPLING_RATIO = 0  # samples per side of a bin; 0: as many as the box needs
    mask.CLS_AGNOSTIC_MASK = False  # one mask for all classes

    cascade = model.ROI_BOX_CASCADE_HEAD = CN()  # Cascade R-CNN
    cascade.BBOX_REG_WEIGHTS = (  # scales of dx, dy, dw, dh per stage
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    cascade.IOUS = (0.5, 0.6, 0.7)  # this or more: object; per stage

    keypoint = model.ROI_KEYPOINT_HEAD = CN()  # Keypoint R-CNN
    keypoint.NAME = "KRCNNConvDeconvUpsampleHead"
    keypoint.POOLER_TYPE = "ROIAlignV2"
    keypoint.POOLER_RESOLUTION = 14
    keypoint.POOLER_SAMPLING_RATIO = 0
    keypoint.CONV_DIMS = (512,) * 8  # channels of its convolutions
    keypoint.NUM_KEYPOINTS = 17  # COCO's person
    keypoint.MIN_KEYPOINTS_PER_IMAGE = 1  # images with fewer are left out of training
    keypoint.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = True  # False: by all keypoints
    keypoint.LOSS_WEIGHT = 1.0

    semantic = model.SEM_SEG_HEAD = CN()  # semantic and panoptic FPN
    semantic.NAME = "SemSegFPNHead"
    semantic.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    semantic.IGNORE_VALUE = 255  # label without loss
    semantic.NUM_CLASSES = 54
    semantic.CONVS_DIM = 128  # channels of its convolutions
    semantic.COMMON_STRIDE = 4  # all levels are resized to it
    semantic.NORM = "GN"
    semantic.LOSS_WEIGHT = 1.0

    panoptic = model.PANOPTIC_FPN = CN()  # panoptic FPN
    panoptic.INSTANCE_LOSS_WEIGHT = 1.0
    panoptic.COMBINE = CN()
    panoptic.COMBINE.ENABLED = True
    panoptic.COMBINE.OVERLAP_THRESH = 0.5
    panoptic.COMBINE.STUFF_AREA_LIMIT = 4096  # pixels
    panoptic.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.5

    retina = model.RETINANET = CN()  # RetinaNet
    retina.NUM_CLASSES = 80
    retina.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    retina.NUM_CONVS = 4  # of each tower
    retina.IOU_THRESHOLDS = [0.4, 0.5]
    retina.IOU_LABELS = [0, -1, 1]
    retina.PRIOR_PROB = 0.01  # of an object, at initialization
    retina.SCORE_THRESH_TEST = 0.05
    retina.TOPK_CANDIDATES_TEST = 1000
    retina.NMS_THRESH_TEST = 0.5
    retina.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    retina.FOCAL_LOSS_GAMMA = 2.0
    retina.FOCAL_LOSS_ALPHA = 0.25
    retina.SMOOTH_L1_LOSS_BETA = 0.1
    retina.BBOX_REG_LOSS_TYPE = "smooth_l1"
    retina.NORM = ""  # of the towers


def _add_data(cfg, CN) -> None:
    cfg.INPUT = CN()
    cfg.INPUT.FORMAT = "BGR"  # channel order of images, PIXEL_MEAN and PIXEL_STD; or "RGB"
    cfg.INPUT.MASK_FORMAT = "polygon"  # masks in training as polygons, or "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)  # shorter edge in pixels: one of these, or in a range
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"  # or "range": from the first to the second
    cfg.INPUT.MAX_SIZE_TRAIN = 1333  # longer edge at most, pixels
    cfg.INPUT.MIN_SIZE_TEST = 800  # shorter edge, pixels; 0: no resize
    cfg.INPUT.MAX_SIZE_TEST = 1333  # longer edge at most, pixels
    cfg.INPUT.RANDOM_FLIP = "horizontal"  # every second image; or "vertical", "none"
    cfg.INPUT.CROP = CN()
    cfg.INPUT.CROP.ENABLED = False  # random crop before the resize
    cfg.INPUT.CROP.TYPE = "relative_range"  # or "relative", "absolute", "absolute_range"
    cfg.INPUT.CROP.SIZE = [0.9, 0.9]  # (H, W): fractions or pixels; "absolute_range": (min, max)

    cfg.DATASETS = CN()
    cfg.DATASETS.TRAIN = ()  # names; several are joined
    cfg.DATASETS.TEST = ()  # names; each is evaluated separately
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ()  # with MODEL.LOAD_PROPOSALS, one per dataset
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN = 2000
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 1000

    cfg.DATALOADER = CN()
    cfg.DATALOADER.NUM_WORKERS = 4  # processes per GPU that read images; 0: no extra ones
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True  # a batch is all portrait or all landscape
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"  # endless shuffled epochs
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.0  # of RepeatFactorTrainingSampler
    cfg.DATALOADER.REPEAT_SQRT = True  # of RepeatFactorTrainingSampler
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True  # leave images without objects out


def _add_solver(cfg, CN) -> None:
    solver = cfg.SOLVER = CN()
    solver.LR_SCHEDULER_NAME = "WarmupMultiStepLR"  # or "WarmupCosineLR"
    solver.MAX_ITER = 40000  # steps
    solver.IMS_PER_BATCH = 16  # images per step, over all workers
    solver.REFERENCE_WORLD_SIZE = 0  # scale batch and rate from this number of GPUs; 0: no scaling
    solver.BASE_LR = 0.001  # after the warmup
    solver.BASE_LR_END = 0.0  # at the end of WarmupCosineLR
    solver.MOMENTUM = 0.9  # of SGD
    solver.NESTEROV = False  # Nesterov momentum
    solver.WEIGHT_DECAY = 0.0001
    solver.WEIGHT_DECAY_NORM = 0.0  # for weights and biases of norms
    solver.WEIGHT_DECAY_BIAS = None  # for other biases; None: WEIGHT_DECAY
    solver.BIAS_LR_FACTOR = 1.0  # factor on the rate of biases
    solver.GAMMA = 0.1  # factor on the rate at each of STEPS
    solver.STEPS = (30000,)
    solver.NUM_DECAYS = 3  # of WarmupStepWithFixedGammaLR
    solver.WARMUP_FACTOR = 1.0 / 1000  # share of the rate at the first step
    solver.WARMUP_ITERS = 1000  # steps until the full rate
    solver.WARMUP_METHOD = "linear"  # or "constant"
    solver.RESCALE_INTERVAL = False  # rescale the schedule to the steps after the warmup
    solver.CHECKPOINT_PERIOD = 5000  # steps
    solver.CLIP_GRADIENTS = CN()
    solver.CLIP_GRADIENTS.ENABLED = False
    solver.CLIP_GRADIENTS.CLIP_TYPE = "value"  # clip each element; "norm": each parameter
    solver.CLIP_GRADIENTS.CLIP_VALUE = 1.0  # the largest value or norm
    solver.CLIP_GRADIENTS.NORM_TYPE = 2.0  # p of the norm
    solver.AMP = CN()
    solver.AMP.ENABLED = False  # automatic mixed precision in training

    test = cfg.TEST = CN()
    test.EXPECTED_RESULTS = []  # [[task, metric, value, tolerance], ...], checked at the end
    test.EVAL_PERIOD = 0  # steps between evaluations; 0: only at the end
    test.DETECTIONS_PER_IMAGE = 100  # the best by score
    test.KEYPOINT_OKS_SIGMAS = []  # [] : COCO's
    test.AUG = CN()  # test-time augmentation
    test.AUG.ENABLED = False
    test.AUG.MIN_SIZES = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    test.AUG.MAX_SIZE = 4000
    test.AUG.FLIP = True
    test.PRECISE_BN = CN()  # recompute running statistics before evaluation
    test.PRECISE_BN.ENABLED = False
    test.PRECISE_BN.NUM_ITER = 200  # batches
