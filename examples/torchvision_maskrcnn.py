"""Train torchvision's Mask R-CNN R-50-FPN (0.16 or newer) with RefBN on data in COCO's format.

python examples/torchvision_maskrcnn.py annotations.json images/ --pretrained
"""

import argparse

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.transforms.functional import to_tensor

from refbn_d2 import ReferenceBatch, convert_to_refbn


def transforms(image, target):
    return to_tensor(image), target


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("json_file")
    p.add_argument("images", help="folder of the images")
    p.add_argument("--pretrained", action="store_true", help="download an ImageNet backbone")
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--size", type=int, default=800, help="shorter side of the images")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = CocoDetection(args.images, args.json_file, transforms=transforms)
    num_classes = max(data.coco.getCatIds()) + 1  # 0 is the background
    with_objects = [i for i, image in enumerate(data.ids) if data.coco.getAnnIds(image)]
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", "masks"))
    train = Subset(data, with_objects)
    loader = DataLoader(train, batch_size=2, shuffle=True, collate_fn=lambda samples: samples)

    backbone = {"weights_backbone": None}
    if args.pretrained:  # train all of it: RefBN does not need to be frozen
        backbone = {"weights_backbone": "DEFAULT", "trainable_backbone_layers": 5}
    model = maskrcnn_resnet50_fpn(**backbone, num_classes=num_classes, min_size=args.size)
    model = convert_to_refbn(model).to(device).train()  # its FrozenBatchNorm2d or BatchNorm2d
    reference = ReferenceBatch(model, [train[i] for i in range(min(16, len(train)))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(args.epochs):
        for samples in loader:
            images = [image.to(device) for image, _ in samples]
            targets = [{k: v.to(device) for k, v in target.items()} for _, target in samples]
            with reference.step():
                loss = sum(model(images, targets).values())
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"{len(losses)} steps: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
