"""Train a classifier with RefBN in Lightning (`pip install lightning`), on FakeData's noise.

python examples/lightning_classifier.py
"""

import argparse

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

from refbn_d2 import ReferenceBatch, convert_to_refbn


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = convert_to_refbn(resnet18(num_classes=4))
        self.losses = []

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=0.9)


class KeepReference(L.Callback):
    """Keep the reference batch up to date, and save its position in Lightning's checkpoints."""

    def __init__(self, reference: ReferenceBatch) -> None:
        self.state_dict, self.load_state_dict = reference.state_dict, reference.load_state_dict
        self.on_train_batch_start = lambda *args: reference.before_step()
        self.on_after_backward = lambda *args: reference.after_step()


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--resume", metavar="CKPT", help="a checkpoint in lightning_logs/")
    args = p.parse_args(argv)
    L.seed_everything(0)
    train = FakeData(256, (3, 64, 64), num_classes=4, transform=ToTensor())
    classifier = Classifier()
    reference = ReferenceBatch(classifier.model, [train[i][0] for i in range(32)])
    trainer = L.Trainer(max_steps=args.steps, callbacks=[KeepReference(reference)])
    trainer.fit(classifier, DataLoader(train, batch_size=16, shuffle=True), ckpt_path=args.resume)
    first, *_, last = classifier.losses
    print(f"{trainer.global_step} steps: loss {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
