"""Train a timm model with RefBN, and save it as a plain timm model.

python examples/timm_model.py resnet50 --pretrained

The images are noise (torchvision's FakeData): put your own data set in its place.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData

from refbn_d2 import ReferenceBatch, convert_from_refbn, convert_to_refbn


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", nargs="?", default="resnet18", help="a timm model with BatchNorm2d")
    p.add_argument("--pretrained", action="store_true", help="download timm's weights")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--output", type=Path, default="output/timm_model.pth")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=10)
    transform = create_transform(**resolve_data_config({}, model=model))
    train = FakeData(size=8 * args.steps, num_classes=10, transform=transform)
    loader = DataLoader(train, batch_size=8, shuffle=True)

    model = convert_to_refbn(model).to(device)  # keeps weights and statistics
    reference = ReferenceBatch(model, [train[i][0] for i in range(min(16, len(train)))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for images, labels in loader:
        with reference.step():
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{len(losses)} steps: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    model = convert_from_refbn(model)  # nn.BatchNorm2d again: the same outputs in eval mode
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.output)
    print(f'{args.output} loads into timm.create_model("{args.model}", num_classes=10).')


if __name__ == "__main__":
    main()
