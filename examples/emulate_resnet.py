"""Train a CIFAR-style ResNet on MNIST by FP8 emulation, its first convolution, first norm and last layer left in float32.

python examples/emulate_resnet.py --method direct
python examples/emulate_resnet.py --method fp32 --dry-run
"""

import argparse
import contextlib
import time

import torch
import torch.nn.functional as F
from torch import nn

from octavo.formats import FLOAT16
from octavo.lab.data import Dataset, Source, batches, load
from octavo.recipes import NAMED
from octavo.torch import Emulation, emulate


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels_in, height, width] -> [batch, channels, height / stride, width / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out)


class ResNet(nn.Module):
    """He et al.'s network for small images (arXiv 1512.03385, section 4.2): 6 * depth + 2 layers in three stages."""

    def __init__(self, depth: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        stages = []
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            first = Block(max(width, channels // 2), channels, 2 if stage else 1)
            stages.append(nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(depth - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 28, 28] -> scores [batch, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def batch(images, labels, index):
    """Normalised pixels [batch, 1, 28, 28] and labels [batch]."""
    x = torch.from_numpy(images[index]).float().div(255).sub(0.1307).div(0.3081).unsqueeze(1)
    return x, torch.from_numpy(labels[index]).long()


def train(args: argparse.Namespace, model: nn.Module, data: Dataset, emulation: Emulation | None) -> None:
    """Steps of SGD with momentum under one cosine of learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    per_epoch = len(data.train_labels) // args.batch_size
    steps = 1 if args.dry_run else args.steps or args.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begun, step = time.perf_counter(), 0
    while step < steps:
        for index in batches(len(data.train_labels), args.batch_size, epoch=step // per_epoch, seed=args.seed):
            x, y = batch(data.train_images, data.train_labels, index)
            loss = F.cross_entropy(model(x), y)
            if emulation is None:
                loss.backward()
                optimizer.step()
            else:
                emulation.scale(loss).backward()
                emulation.step(optimizer)
            optimizer.zero_grad()
            schedule.step()
            if step % args.log_interval == 0:
                print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - begun:.0f} s")
            step += 1
            if step == steps:
                break


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """The share of the test images that the model names rightly."""
    model.eval()
    correct = 0
    for index in batches(len(data.test_labels), 500, epoch=0, seed=0, drop_last=False):
        x, y = batch(data.test_images, data.test_labels, index)
        correct += int((model(x).argmax(1) == y).sum())
    return correct / len(data.test_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="hybrid", choices=["fp32", *NAMED], help="float32, or a recipe")
    parser.add_argument("--exempt", nargs="*", default=["conv1", "bn1", "fc"], help="layers left in float32")
    parser.add_argument("--output-fused", nargs="*", default=[], help="layers whose output stays in float32")
    parser.add_argument("--depth", type=int, default=1, help="blocks a stage: 6 * depth + 2 layers")
    parser.add_argument("--batch-size", type=int, default=64, help="training batch")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training images")
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--lr", type=float, default=0.1, help="first learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and batches")
    parser.add_argument("--log-interval", type=int, default=50, help="steps between two log lines")
    parser.add_argument("--dry-run", action="store_true", help="one step")
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data, model = load(Source(args.data)), ResNet(args.depth)
    with contextlib.ExitStack() as stack:
        emulation = None
        if args.method != "fp32":
            master = FLOAT16 if args.method in ("direct", "hybrid") else None
            choices = {"exempt": args.exempt, "output_fused": args.output_fused}
            emulation = emulate(model, args.method, loss_scale="dynamic", master=master, **choices)
            stack.enter_context(emulation)
        train(args, model, data, emulation)
        print(f"test accuracy {100 * accuracy(model, data):.2f}%")


if __name__ == "__main__":
    main()
