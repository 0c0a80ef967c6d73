"""Train a plain PyTorch network on MNIST as an 8-bit machine would, by emulation: three lines, and no change to the network.

python examples/emulate_mnist.py --method direct --epochs 1
python examples/emulate_mnist.py --method hybrid --exempt conv1 fc3 --loss-scale 1024 --stats-every 100
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from octavo.diagnose.records import Memory, table, worst
from octavo.formats import FLOAT16
from octavo.lab.data import Dataset, Source, batches, load
from octavo.recipes import NAMED
from octavo.torch import Emulation, emulate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    """Two convolutions and three linear layers: nothing here knows of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(9216, 128), nn.Linear(128, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 1, 28, 28] -> scores [batch, 10]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        return self.fc3(F.relu(self.fc2(self.dropout2(F.relu(self.fc1(x))))))


def batch(images, labels, index):
    """One batch as the network takes it: normalised pixels [batch, 1, 28, 28] and labels [batch]."""
    x = torch.from_numpy(images[index]).to(DEVICE).float().div(255).sub(0.1307).div(0.3081).unsqueeze(1)
    return x, torch.from_numpy(labels[index]).to(DEVICE).long()


def train(args: argparse.Namespace, model: nn.Module, emulation: Emulation, data: Dataset, optimizer, epoch: int):
    """One epoch of training."""
    model.train()
    count = len(data.train_labels)
    order = list(batches(count, args.batch_size, epoch=epoch, seed=args.seed, drop_last=False))
    for i, index in enumerate(order):
        x, y = batch(data.train_images, data.train_labels, index)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        emulation.scale(loss).backward()
        emulation.step(optimizer)
        if i % args.log_interval == 0:
            place = f"[{i * len(index)}/{count} ({100 * i / len(order):.0f}%)]"
            print(f"Train Epoch: {epoch} {place}\tLoss: {loss.item():.6f}")
        if args.dry_run:
            break


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: nn.Module, data: Dataset) -> None:
    """Prints the loss and the accuracy over the test images, in the recipe."""
    model.eval()
    count, loss, correct = len(data.test_labels), 0.0, 0
    for index in batches(count, args.test_batch_size, epoch=0, seed=0, drop_last=False):
        x, y = batch(data.test_images, data.test_labels, index)
        output = model(x)
        loss += F.cross_entropy(output, y, reduction="sum").item()
        correct += int((output.argmax(1) == y).sum())
    print(f"\nTest set: Average loss: {loss / count:.4f}, Accuracy: {correct}/{count} ({100 * correct / count:.2f}%)\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="hybrid", choices=list(NAMED), help="direct, hybrid or any other recipe")
    parser.add_argument("--exempt", nargs="*", default=[], help="layers left in float32, by name or pattern")
    parser.add_argument("--output-fused", nargs="*", default=[], help="layers whose output stays in float32")
    parser.add_argument("--loss-scale", default="dynamic", help="dynamic, or a number")
    parser.add_argument("--stats-every", type=int, default=0, help="steps between two looks at every tensor")
    parser.add_argument("--batch-size", type=int, default=64, help="training batch")
    parser.add_argument("--test-batch-size", type=int, default=1000, help="test batch")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=1.0, help="learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the weights, batches and dropout")
    parser.add_argument("--log-interval", type=int, default=100, help="steps between two log lines")
    parser.add_argument("--dry-run", action="store_true", help="one batch, one epoch")
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    data, model = load(Source(args.data)), Net().to(DEVICE)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=args.lr)
    with emulate(
        model,
        args.method,
        exempt=args.exempt,
        output_fused=args.output_fused,
        optimizer=optimizer,
        loss_scale=args.loss_scale if args.loss_scale == "dynamic" else float(args.loss_scale),
        master=FLOAT16 if args.method in ("direct", "hybrid") else None,
    ) as emulation:
        seen = Memory()
        if args.stats_every:
            emulation.observe(seen, every=args.stats_every)
        for epoch in range(1, 2 if args.dry_run else args.epochs + 1):
            train(args, model, emulation, data, optimizer, epoch)
            evaluate(args, model, data)
        if seen.records:
            print("Tensors that lost most:\n" + table(worst(seen.records)))


if __name__ == "__main__":
    main()
