"""Train 784-256-10 on MNIST with PyTorch: what the engine's two scripts are measured against.

python examples/engine_mnist/train_pytorch.py --compile
"""

import argparse
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from octavo.lab.data import Source, batches, load
from octavo.lab.models import ModelName, initial_weights

WARM_UP, LOG = 5, 100  # batches before time is taken, and between two log lines


class Mlp(nn.Module):
    """Two linear layers, ReLU between them."""

    def __init__(self, weights):
        super().__init__()
        (hidden, inputs), classes = weights["fc1.weight"].shape, len(weights["fc2.bias"])
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})

    def forward(self, x):
        """x: [batch, 784] -> logits [batch, 10]."""
        return self.fc2(F.relu(self.fc1(x)))


def prepare(weights, images, labels, args):
    """A network with these weights, and what trains it on int64 [steps, batch] of row numbers."""
    model = Mlp(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    def forward(x, labels):
        logits = model(x)
        return F.cross_entropy(logits, labels), logits.argmax(1)

    update = optimizer.step
    if args.compile:
        forward, update = torch.compile(forward), torch.compile(update)

    def run(order):
        losses, classes = np.empty(len(order), np.float32), np.empty(order.shape, np.int64)
        for i, rows in enumerate(torch.from_numpy(order)):
            loss, found = forward(images[rows], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            update()
            losses[i], classes[i] = loss.item(), found.numpy()
        return losses, classes

    return model, run


@torch.no_grad()
def accuracy(model, images, labels):
    classes = [model(images[i : i + 1000]).argmax(1).numpy() for i in range(0, len(labels), 1000)]
    return (np.concatenate(classes) == labels).mean()


def train(args):
    """The whole run: warm-up, then from the first weights again, with a test after each epoch."""
    data = load(Source(args.data))
    count, labels = len(data.train_labels), data.train_labels.astype(np.int64)
    if not (0 < args.batch_size <= count and args.epochs > 0 and 0 < args.lr < float("inf")):
        raise ValueError(f"--batch-size is 1 to {count}, --epochs 1 or more, --lr above 0 and finite; correct them")
    images, tests = (x.reshape(-1, 784).astype(np.float32) / 255 for x in (data.train_images, data.test_images))
    start_of = initial_weights(ModelName.MLP, args.seed), torch.from_numpy(images), torch.from_numpy(labels), args
    orders = [np.stack([*batches(count, args.batch_size, epoch=i, seed=args.seed)]) for i in range(args.epochs)]
    start, training = time.perf_counter(), 0.0
    prepare(*start_of)[1](orders[0][:WARM_UP])
    warm_up = time.perf_counter() - start
    model, run = prepare(*start_of)
    print(f"data: {data.source}")
    for epoch, order in enumerate(orders, 1):
        print(f"Epoch {epoch}/{args.epochs}")
        losses, hits = [], []
        for i in range(0, len(order), LOG):
            part = order[i : i + LOG]
            start = time.perf_counter()
            found, classes = run(part)
            training += time.perf_counter() - start
            losses, hits = [*losses, *found], [*hits, *(classes == labels[part]).mean(1)]
            text = f"Loss: {np.mean(losses):.4f}, Acc: {np.mean(hits):.4f}"
            print(f"  Batch {i + LOG}/{len(order)}, {text}\n" if len(part) == LOG else "", end="", flush=True)
        tested = accuracy(model, torch.from_numpy(tests), data.test_labels)
        print(f"  Train {text.replace('Acc', 'Train Acc')}, Test Acc: {tested:.4f}", flush=True)
    print(f"\nFinal test accuracy: {tested:.2%}\nWarm-up: {warm_up:.2f} s ({WARM_UP} batches)")
    print(f"Training: {training:.2f} s, tests apart\nAverage epoch: {training / args.epochs:.3f} s")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"Peak memory of the process: {resident / 1e3:.0f} MB (of its CPU tensors PyTorch keeps no count)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # without the usage
    parser.add_argument("--batch-size", type=int, default=128, help="training batch")
    parser.add_argument("--epochs", type=int, default=50, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and batches")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass and the update")
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    try:
        train(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
