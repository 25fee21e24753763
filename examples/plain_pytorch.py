"""Train a classifier with RefBN in a plain PyTorch loop, on the embedded shapes.

python examples/plain_pytorch.py --epochs 4
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from refbn_d2 import ReferenceBatch, convert_to_refbn
from refbn_d2.data.shapes import make_classification


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--num-train", type=int, default=2000, help="images to draw")
    p.add_argument("--root", default="datasets/example", help="folder of the images")
    p.add_argument("--checkpoint", type=Path, default="output/plain_pytorch.pth")
    args = p.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = make_classification(args.root, num_train=args.num_train, num_val=1)
    train = ImageFolder(folder / "train", ToTensor())
    loader = DataLoader(train, batch_size=16, shuffle=True)

    # The reference: a random batch of the training set, the same one whenever the run is resumed.
    model = convert_to_refbn(resnet18(num_classes=len(train.classes))).to(device)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:32]
    reference = ReferenceBatch(model, torch.stack([train[i][0] for i in chosen]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    saved = {"model": model, "optimizer": optimizer, "reference": reference}
    if args.checkpoint.exists():
        for name, state in torch.load(args.checkpoint, map_location=device).items():
            saved[name].load_state_dict(state)
        print(f"Resumed after {reference.iteration} steps.")
    losses = []
    for _ in range(args.epochs):
        for images, labels in loader:
            with reference.step():
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    print(f"{reference.iteration} steps: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: part.state_dict() for name, part in saved.items()}, args.checkpoint)


if __name__ == "__main__":
    main()
