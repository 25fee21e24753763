"""Train and evaluate a detector from a config: by torchvision's operators, or by Detectron2."""
