"""What ResNet-20 reaches on CIFAR-10 in five passes of plain PyTorch, to hold `fp32` at size cpu to.

    python experiments/plain_baseline.py --data-dir DIR [--seeds 3] [--epochs 5]

The files are read by the library. Everything else is written here again, on purpose: the network, the moving and
mirroring, the order, the loop. A mistake there would make every row of the results better or worse alike, which no
comparison of recipes shows. Prints a row of a table for each seed. Weights and order are not those of the library's
runs, so what is expected is a mean that is the same but for the luck of a seed, a point or two after five passes.

Network and training: He et al., CVPR 2016, section 4.2, with batches of 128, SGD with momentum 0.9, weight decay
1e-4, rate 0.1. First weights: He et al., ICCV 2015, by fan out. As in size cpu a cosine takes the place of the two
drops. As in section 4.2 the mean is subtracted before a picture is moved, so the mean color moves in; in the library
black does.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.lab.data import cifar10


class Plain(nn.Module):
    """ResNet-20: 3 stages of 3 blocks of 2 convolutions, 16, 32 and 64 channels, shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 3 + [32] * 3 + [64] * 3
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        before = 16
        for width in widths:
            stride = 1 if width == before else 2
            self.convs += [
                nn.Conv2d(before, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
            ]
            self.norms += [nn.BatchNorm2d(width), nn.BatchNorm2d(width)]
            before = width
        self.head = nn.Linear(64, 10)
        for conv in (self.stem, *self.convs):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * conv.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        for k in range(0, len(self.convs), 2):
            y = F.relu(self.norms[k](self.convs[k](x)))
            y = self.norms[k + 1](self.convs[k + 1](y))
            if y.shape != x.shape:
                x = F.pad(F.avg_pool2d(x, 1, 2), (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            x = F.relu(x + y)
        return self.head(x.mean((2, 3)))


def changed(pictures: Tensor) -> Tensor:
    """Each picture cut at random out of itself with 4 pixels of the mean color around it, and half of them mirrored."""
    wide = F.pad(pictures, (4, 4, 4, 4))
    cut = []
    for picture in wide:
        top, left = torch.randint(9, (2,)).tolist()
        piece = picture[:, top : top + 32, left : left + 32]
        cut.append(piece.flip(2) if torch.rand(()) < 0.5 else piece)
    return torch.stack(cut)


def accuracy(network: nn.Module, pictures: Tensor, classes: Tensor) -> float:
    """In percent."""
    network.eval()
    with torch.no_grad():
        right = [network(x).argmax(1) == y for x, y in zip(pictures.split(500), classes.split(500), strict=True)]
    return 100 * float(torch.cat(right).float().mean())


def trained(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, seed: int, epochs: int) -> float:
    """The accuracy on the test after a run."""
    torch.manual_seed(seed)
    network = Plain()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batches = math.ceil(len(train[0]) / 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        network.train()
        for rows in torch.randperm(len(train[0])).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(changed(train[0][rows])), train[1][rows]).backward()
            optimizer.step()
            schedule.step()
    return accuracy(network, *test)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    asked = parser.parse_args()
    data = cifar10.load(asked.data_dir)
    sides = [(side.inputs.float() / 255, side.targets) for side in (data.train, data.test)]
    mean, deviation = (f(sides[0][0], dim=(0, 2, 3)).view(3, 1, 1) for f in (torch.mean, torch.std))
    train, test = [(x.sub_(mean).div_(deviation), y) for x, y in sides]
    print("| seed | test accuracy, % |")
    print("|---|---|")
    for seed in range(asked.seeds):
        print(f"| {seed} | {trained(train, test, seed=seed, epochs=asked.epochs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
