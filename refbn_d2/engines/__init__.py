"""What runs a detector's config: torchvision's operators, or Detectron2 itself."""

# Keys, or beginnings of them, that a resumed run may change without becoming another run.
FREE_ON_RESUME = (
    "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "DATASETS.TEST",
    "DATASETS.REGISTER", "TEST.", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "VIS_PERIOD",
    "CUDNN_BENCHMARK",
)  # fmt: skip
