"""Train a small convolutional network on MNIST with Flax in BF16, or its dense layers in FP8, on any device that JAX has.

python examples/jax_mnist.py --use-fp8 --epochs 5
"""

import argparse
import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import octavo.jax as te
from octavo import recipes
from octavo.lab.data import Source, batches, load
from octavo.lab.flax_models import convolution

IMAGE, CLASSES = (28, 28, 1), 32  # ten digits, in as many columns as FP8 units like
LINE = "Epoch: {:>2} Train Loss: {:.6f} Train Accuracy: {:.6f} Test Loss: {:.6f} Test Accuracy: {:.6f}"
RECIPES = {
    "DelayedScaling": recipes.delayed_scaling,
    "Float8CurrentScaling": recipes.current_scaling,
    "MXFP8BlockScaling": recipes.mxfp8,
    **recipes.NAMED,
}


class Net(nn.Module):
    """Two convolutions and three dense layers in BF16; Octavo's DenseGeneral computes the dense ones where `use_te` is set."""

    use_te: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, disable_dropout: bool = False) -> jax.Array:
        """x: [batch, 28, 28, 1] -> logits, float32 [batch, 32]."""
        dense = te.DenseGeneral if self.use_te else nn.Dense
        dropout = functools.partial(nn.Dropout, deterministic=disable_dropout)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=jnp.bfloat16, conv_general_dilated=convolution)
        x = nn.relu(conv(64)(nn.relu(conv(32)(x))))
        x = dropout(0.25)(nn.max_pool(x, (2, 2), strides=(2, 2)))
        x = x.reshape(x.shape[0], -1)
        x = dropout(0.5)(nn.relu(dense(128, dtype=jnp.bfloat16)(x)))
        x = dense(CLASSES, dtype=jnp.bfloat16)(x)
        return nn.Dense(CLASSES, dtype=jnp.bfloat16)(x).astype(jnp.float32)


def get_datasets(source: Source = Source.AUTO):
    """The training and test images, float32 [N, 28, 28, 1] in 0 ... 1, with their labels, int32 [N]."""
    data = load(source)

    def part(images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
        return {"image": jnp.asarray(images[..., None] / np.float32(255)), "label": jnp.asarray(labels, jnp.int32)}

    return part(data.train_images, data.train_labels), part(data.test_images, data.test_labels)


def loss_and_accuracy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, CLASSES)).mean()
    return loss, (logits.argmax(-1) == labels).mean()


@jax.jit
def apply_model(state, images, labels, var_collect, key):
    """The gradients of all collections, those of `fp8_metas` being its next state, with the loss and the accuracy."""

    def loss_fn(var_collect):
        logits = state.apply_fn(var_collect, images, rngs={"dropout": key})
        return loss_and_accuracy(logits, labels)

    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)({**var_collect, "params": state.params})
    return grads, loss, accuracy


def update_model(state, grads, var_collect):
    """One step of the optimizer, and the next FP8 metadata."""
    grads = te.update_fp8_metas(dict(grads))
    state = state.apply_gradients(grads=grads["params"])
    return state, te.update_collections({**grads, "params": state.params}, var_collect)


@jax.jit
def train_epoch(state, dataset, order, var_collect, key):
    """An epoch as one loop on the device; order: int32 [steps, batch]."""

    def step(carry, index):
        state, var_collect, key = carry
        key, dropout = jax.random.split(key)
        images, labels = dataset["image"][index], dataset["label"][index]
        grads, loss, accuracy = apply_model(state, images, labels, var_collect, dropout)
        return (*update_model(state, grads, var_collect), key), (loss, accuracy)

    (state, var_collect, _), (losses, accuracies) = jax.lax.scan(step, (state, var_collect, key), order)
    return state, losses.mean(), accuracies.mean(), var_collect


@functools.partial(jax.jit, static_argnames="batch_size")
def eval_model(state, dataset, batch_size, var_collect):
    """The mean loss and the accuracy; a last batch that is not whole is left out."""

    def step(_, index):
        logits = state.apply_fn({**var_collect, "params": state.params}, dataset["image"][index], disable_dropout=True)
        return None, loss_and_accuracy(logits, dataset["label"][index])

    count = len(dataset["label"]) // batch_size * batch_size
    _, (losses, accuracies) = jax.lax.scan(step, None, jnp.arange(count).reshape(-1, batch_size))
    return losses.mean(), accuracies.mean()


def check_fp8(state, var_collect, images, labels) -> None:
    """Raises ValueError, naming the layer, unless every GEMM of the dense layers computes in float8."""
    assert te.check_fp8(
        lambda collections: apply_model(state, images, labels, collections, jax.random.key(0)), var_collect
    )


def train_and_evaluate(args: argparse.Namespace):
    """Trains, prints a line an epoch, and returns their figures: [train loss, train accuracy, test loss, test accuracy] of each."""
    train, test = get_datasets(Source(args.data))
    if args.batch_size > (images := len(train["label"])):
        raise SystemExit(f"--batch-size {args.batch_size} exceeds the {images} training images; give fewer")
    args.test_batch_size = min(args.test_batch_size, len(test["label"]))
    recipe = RECIPES[args.fp8_recipe]()
    fp8 = te.autocast(recipe=recipe) if args.use_fp8 else contextlib.nullcontext()
    with fp8:
        net = Net(args.use_te)
        dummy, labels = jnp.zeros((args.batch_size, *IMAGE)), jnp.zeros(args.batch_size, jnp.int32)
        init = jax.jit(functools.partial(net.init, disable_dropout=True))
        var_collect = init(jax.random.key(args.seed), dummy)
        optimizer = optax.sgd(args.lr, args.momentum)
        state = train_state.TrainState.create(apply_fn=net.apply, params=var_collect["params"], tx=optimizer)
        if args.use_fp8 and args.fp8_recipe in ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling"):
            check_fp8(state, var_collect, dummy, labels)
        if args.dry_run:
            apply_model(state, dummy, labels, var_collect, jax.random.key(args.seed))
            print("PASSED")
            return None
        history = []
        for epoch in range(1, args.epochs + 1):
            order = np.stack(list(batches(len(train["label"]), args.batch_size, epoch=epoch, seed=args.seed)))
            key = jax.random.fold_in(jax.random.key(args.seed), epoch)
            state, *found, var_collect = train_epoch(state, train, jnp.asarray(order, jnp.int32), var_collect, key)
            found += eval_model(state, test, args.test_batch_size, var_collect)
            history.append([float(value) for value in found])
            print(LINE.format(epoch, *history[-1]), flush=True)
    return history


def mnist_parser(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64, help="training batch")
    parser.add_argument("--test-batch-size", type=int, default=800, help="test batch")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    parser.add_argument("--dry-run", action="store_true", help="one forward and backward pass; prints PASSED")
    parser.add_argument("--seed", type=int, default=1, help="of the weights, batches and dropout")
    parser.add_argument("--use-te", action="store_true", help="Octavo's DenseGeneral, in BF16")
    parser.add_argument("--use-fp8", action="store_true", help="train and test its GEMMs in FP8; implies --use-te")
    parser.add_argument(
        "--fp8-recipe", choices=RECIPES, default="DelayedScaling", metavar="NAME", help=", ".join(RECIPES)
    )
    parser.add_argument("--data", choices=[s.value for s in Source], default="auto", help="which images")
    args = parser.parse_args(argv)
    args.use_te = args.use_te or args.use_fp8
    return args


if __name__ == "__main__":
    train_and_evaluate(mnist_parser())
