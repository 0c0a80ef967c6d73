"""FC-MNIST from a YAML file, with the flags of the Cerebras runner: train, evaluate, validate, compile, alone or in replicas.

python examples/fc_mnist/run.py --mode train_and_eval --params examples/fc_mnist/configs/params.yaml
python examples/fc_mnist/run.py --mode eval --params examples/fc_mnist/configs/params.yaml
python examples/fc_mnist/run.py --params examples/fc_mnist/configs/params.yaml --validate_only
python examples/fc_mnist/run.py --params examples/fc_mnist/configs/params.yaml --num_replicas 2 optimizer.learning_rate 0.05
"""

from __future__ import annotations

import argparse
import sys

from octavo.lab import commands
from octavo.lab.runner import Mode


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--params", required=True, help="the YAML file")
    parser.add_argument("-m", "--mode", choices=[mode.value for mode in Mode], default="train", help="default: train")
    parser.add_argument("-o", "--model_dir", help="where the run is kept; default: what the file says")
    parser.add_argument("--checkpoint_path", help="the checkpoint to evaluate, or to begin from")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--validate_only", action="store_true", help="say which kernels the network matches, and stop")
    only.add_argument("--compile_only", action="store_true", help="write the compiled graphs into model_dir, and stop")
    parser.add_argument(
        "--target", default="cpu", help="the chip that --validate_only looks at: cpu, sm80, sm89, sm90, sm100, gfx942"
    )
    parser.add_argument(
        "--multireplica", action="store_true", help="train in replicas: two, unless --num_replicas says"
    )
    parser.add_argument("--num_replicas", type=int, help="how many processes train together")
    parser.add_argument("-cs", "--cs_ip", help="the address of a Cerebras system: there is none here")
    parser.add_argument("overrides", nargs="*", metavar="section.key value", help="for example: model.depth 4")
    return parser.parse_args()


def run(flags: argparse.Namespace) -> int:
    if flags.cs_ip:
        raise ValueError(
            f"--cs_ip {flags.cs_ip}: no Cerebras system can be reached from here; leave the flag out to run on this machine"
        )
    replicas = flags.num_replicas or (2 if flags.multireplica else None)
    config = commands.configured(flags.params, flags.overrides, model_dir=flags.model_dir, num_replicas=replicas)
    if flags.validate_only:
        print(commands.validated(config, flags.target))
        return 0
    if flags.compile_only:
        print(commands.compiled(config))
        return 0
    return commands.run(config, Mode(flags.mode), checkpoint_path=flags.checkpoint_path, command=sys.argv)


if __name__ == "__main__":
    sys.exit(commands.guarded(lambda: run(parsed())))
