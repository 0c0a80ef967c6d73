"""Train a small convolutional network on MNIST in float32, in BF16, or in FP8, and test it in FP8 after calibration.

python examples/torch_mnist.py --use-fp8 --epochs 1
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import octavo.torch as octavo
from octavo.lab.data import Dataset, Source, batches, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    """Two convolutions and three linear layers; Octavo's Linear computes fc1 and fc2 where `use_te` is set."""

    def __init__(self, use_te: bool) -> None:
        super().__init__()
        linear = octavo.Linear if use_te else nn.Linear
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2, self.fc3 = linear(9216, 128), linear(128, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 1, 28, 28] -> log-probabilities [batch, 10]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc3(F.relu(self.fc2(x))).float(), dim=1)


def forward(args: argparse.Namespace, model: nn.Module, x: torch.Tensor, *, fp8: bool):
    """The model's output in FP8, or else in BF16 where --use-te alone asks for it, or in float32."""
    bf16 = args.use_te and not (args.use_fp8 or args.use_fp8_infer)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16), octavo.autocast(enabled=fp8):
        return model(x)


def batch(images, labels, index):
    """One batch as the network takes it: normalised pixels [batch, 1, 28, 28] and labels [batch]."""
    x = torch.from_numpy(images[index]).to(DEVICE).float().div(255).sub(0.1307).div(0.3081).unsqueeze(1)
    return x, torch.from_numpy(labels[index]).to(DEVICE).long()


def train(args: argparse.Namespace, model: nn.Module, data: Dataset, optimizer: torch.optim.Optimizer, epoch: int):
    """One epoch of training."""
    model.train()
    count = len(data.train_labels)
    order = list(batches(count, args.batch_size, epoch=epoch, seed=args.seed, drop_last=False))
    for i, index in enumerate(order):
        x, y = batch(data.train_images, data.train_labels, index)
        optimizer.zero_grad()
        loss = F.nll_loss(forward(args, model, x, fp8=args.use_fp8), y)
        loss.backward()
        optimizer.step()
        if i % args.log_interval == 0:
            place = f"[{i * len(index)}/{count} ({100 * i / len(order):.0f}%)]"
            print(f"Train Epoch: {epoch} {place}\tLoss: {loss.item():.6f}")
        if args.dry_run:
            break


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: nn.Module, data: Dataset, *, fp8: bool) -> None:
    """Prints the loss and the accuracy over the test images."""
    model.eval()
    count, loss, correct = len(data.test_labels), 0.0, 0
    for index in batches(count, args.test_batch_size, epoch=0, seed=0, drop_last=False):
        x, y = batch(data.test_images, data.test_labels, index)
        output = forward(args, model, x, fp8=fp8)
        loss += F.nll_loss(output, y, reduction="sum").item()
        correct += int((output.argmax(1) == y).sum())
    print(f"\nTest set: Average loss: {loss / count:.4f}, Accuracy: {correct}/{count} ({100 * correct / count:.0f}%)\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="training batch")
    parser.add_argument("--test-batch-size", type=int, default=1000, help="test batch")
    parser.add_argument("--epochs", type=int, default=14, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=1.0, help="learning rate")
    parser.add_argument("--gamma", type=float, default=0.7, help="factor on the learning rate after each epoch")
    parser.add_argument("--seed", type=int, default=1, help="of the weights, batches and dropout")
    parser.add_argument("--log-interval", type=int, default=10, help="steps between two log lines")
    parser.add_argument("--dry-run", action="store_true", help="one batch, one epoch")
    parser.add_argument("--save-model", action="store_true", help="write mnist_cnn.pt and test the reloaded model")
    parser.add_argument("--use-te", action="store_true", help="Octavo's Linear, in BF16")
    parser.add_argument("--use-fp8", action="store_true", help="train and test in FP8; implies --use-te")
    parser.add_argument("--use-fp8-infer", action="store_true", help="train in float32, calibrate, test in FP8")
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    args = parser.parse_args()
    args.use_te = args.use_te or args.use_fp8 or args.use_fp8_infer
    torch.manual_seed(args.seed)
    data = load(Source(args.data))
    model = Net(args.use_te).to(DEVICE)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, 2 if args.dry_run else args.epochs + 1):
        train(args, model, data, optimizer, epoch)
        evaluate(args, model, data, fp8=args.use_fp8)
        scheduler.step()
    if args.use_fp8_infer and not args.use_fp8:
        order = batches(len(data.test_labels), args.test_batch_size, epoch=0, seed=0, drop_last=False)
        octavo.calibrate(model, (batch(data.test_images, data.test_labels, index)[0] for index in order))
    if args.save_model or args.use_fp8_infer:
        torch.save(model.state_dict(), "mnist_cnn.pt")
        fp8 = args.use_fp8 or args.use_fp8_infer
        print(f"Eval with reloaded checkpoint : fp8={fp8}")
        model = Net(args.use_te).to(DEVICE)
        model.load_state_dict(torch.load("mnist_cnn.pt", weights_only=True))
        evaluate(args, model, data, fp8=fp8)


if __name__ == "__main__":
    main()
