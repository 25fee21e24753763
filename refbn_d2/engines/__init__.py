"""What runs a detector's config: torchvision's operators, or Detectron2 itself."""
