"""Train 784-256-10 on MNIST with Octavo's engine, its gradients written by hand: no framework underneath.

python examples/engine_mnist/train_manual.py
"""

import argparse
import time

import numpy as np

from octavo import engine
from octavo.lab.data import Source, batches, load
from octavo.lab.models import ModelName, initial_weights

WARM_UP, LOG = 5, 100  # batches before time is taken, and between two log lines


class Mlp:
    """Two linear layers, ReLU between them.  PyTorch's weights lie [out, in], the engine's [in, out]."""

    def __init__(self, weights):
        self.w1, self.w2 = (engine.from_numpy(weights[f"fc{i}.weight"].T.copy()) for i in (1, 2))
        self.b1, self.b2 = (engine.from_numpy(weights[f"fc{i}.bias"].copy()) for i in (1, 2))

    def __call__(self, x):
        """x: [batch, 784] -> logits [batch, 10]."""
        return engine.linear(engine.linear_relu(x, self.w1, self.b1), self.w2, self.b2)

    def step(self, x, labels, lr):
        """Forward, backward, SGD; returns the mean loss and the class found for each image, both of before the update."""
        hidden = engine.linear_relu(x, self.w1, self.b1)
        logits = engine.linear(hidden, self.w2, self.b2)
        loss, grad_logits = engine.cross_entropy_both(logits, labels)
        grad_hidden = engine.masked_matmul(grad_logits, self.w2.T, hidden)  # 0 where ReLU was
        engine.add_matmul_(self.w2, hidden.T, grad_logits, -lr)  # gradient and update in one product
        engine.sgd_(self.b2, grad_logits.sum(0), None, lr)
        engine.add_matmul_(self.w1, x.T, grad_hidden, -lr)
        engine.sgd_(self.b1, grad_hidden.sum(0), None, lr)
        return loss, engine.argmax(logits)


def prepare(weights, images, labels, args):
    """A network with these weights, what trains it on int64 [steps, batch] of row numbers, and the bytes that keeps."""
    model = Mlp(weights)

    def step(rows):
        return model.step(engine.take_rows(images, rows), engine.take_rows(labels, rows), args.lr)

    def run(order):
        losses, classes = np.empty(len(order), np.float32), np.empty(order.shape, np.int64)
        for i, rows in enumerate(order):
            loss, found = step(engine.from_numpy(rows))
            losses[i], classes[i] = loss.item(), found.numpy()
        return losses, classes

    if not args.graph:
        return model, run, 0
    graph = engine.capture(step, engine.zeros((args.batch_size,), np.int64))
    return model, lambda order: [x.numpy() for x in graph.run(order)], graph.memory


def accuracy(model, images, labels):
    classes = [engine.argmax(model(images[i : i + 1000])).numpy() for i in range(0, len(labels), 1000)]
    return (np.concatenate(classes) == labels).mean()


def train(args):
    """The whole run: warm-up, then from the first weights again, with a test after each epoch."""
    data = load(Source(args.data))
    count, labels = len(data.train_labels), data.train_labels.astype(np.int64)
    if not (0 < args.batch_size <= count and args.epochs > 0 and 0 < args.lr < float("inf")):
        raise ValueError(f"--batch-size is 1 to {count}, --epochs 1 or more, --lr above 0 and finite; correct them")
    images, tests = (x.reshape(-1, 784).astype(np.float32) / 255 for x in (data.train_images, data.test_images))
    start_of = initial_weights(ModelName.MLP, args.seed), engine.from_numpy(images), engine.from_numpy(labels), args
    orders = [np.stack([*batches(count, args.batch_size, epoch=i, seed=args.seed)]) for i in range(args.epochs)]
    start, training = time.perf_counter(), 0.0
    prepare(*start_of)[1](orders[0][:WARM_UP])
    warm_up = time.perf_counter() - start
    model, run, kept = prepare(*start_of)
    print(f"data: {data.source}")
    for epoch, order in enumerate(orders, 1):
        print(f"Epoch {epoch}/{args.epochs}")
        allocated, losses, hits = engine.pool().allocated, [], []
        for i in range(0, len(order), LOG):
            part = order[i : i + LOG]
            start = time.perf_counter()
            found, classes = run(part)
            training += time.perf_counter() - start
            losses, hits = [*losses, *found], [*hits, *(classes == labels[part]).mean(1)]
            text = f"Loss: {np.mean(losses):.4f}, Acc: {np.mean(hits):.4f}"
            print(f"  Batch {i + LOG}/{len(order)}, {text}\n" if len(part) == LOG else "", end="", flush=True)
        tested = accuracy(model, engine.from_numpy(tests), data.test_labels)
        print(f"  Train {text.replace('Acc', 'Train Acc')}, Test Acc: {tested:.4f}", flush=True)
    print(f"\nFinal test accuracy: {tested:.2%}\nWarm-up: {warm_up:.2f} s ({WARM_UP} batches)")
    print(f"Training: {training:.2f} s, tests apart\nAverage epoch: {training / args.epochs:.3f} s")
    held = engine.pool().peak + kept + sum(one.nbytes for one in start_of[0].values())
    print(f"Peak memory of tensors: {held / 1e6:.1f} MB, weights included, images apart")
    print(f"Allocated in the last epoch: {engine.pool().allocated - allocated} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # without the usage
    parser.add_argument("--batch-size", type=int, default=128, help="training batch")
    parser.add_argument("--epochs", type=int, default=50, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and batches")
    help = "capture a step once and run it without Python; else call its operators one by one"
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help=help)
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    try:
        train(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))
