"""Two real processes over gloo: amaxes are reduced over ranks, so the scales of all ranks agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
import octavo.torch as ot
from octavo.recipes import delayed_scaling

rank, store, reduce = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "reduce"
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
layer = ot.Linear(4, 4, recipe=None)
alone = ot.Linear(4, 4, recipe=delayed_scaling(amax_history_len=4, reduce_amax=reduce))
sometimes = ot.Linear(4, 4, recipe=delayed_scaling(amax_history_len=4, reduce_amax=reduce))
unused = ot.Linear(4, 4, recipe=delayed_scaling())
for step in range(3):
    with ot.autocast(recipe=delayed_scaling(amax_history_len=4, reduce_amax=reduce)):
        y = layer(torch.full((2, 4), 1.0 + step + 10 * rank))
        if rank == 1:
            sometimes(torch.full((2, 4), 7.0))
    y.backward(torch.full((2, 4), 2.0 + rank))
    alone(torch.full((2, 4), 1.0 + rank))
layer.state_dict()  # by then the scales have moved
print(json.dumps([layer.scale_forward.tolist(), layer.scale_backward.tolist(), layer.amax_history_forward[:, 0].tolist(),
    alone.scale_forward.tolist(), sometimes.amax_history_forward[:1].tolist()]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("reduce", [True, False], ids=["reduced", "local"])
def test_amaxes_over_two_ranks(tmp_path: Path, reduce: bool) -> None:
    command = [sys.executable, "-c", SCRIPT]
    mode = "reduce" if reduce else "local"
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), mode], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    one, two = results
    if reduce:
        assert one == two
        assert one[2] == [0, 11, 12, 13]
    else:
        assert one[2] == [0, 1, 2, 3]
        assert two[2] == [0, 11, 12, 13]
        assert one[3] != two[3]
        assert one[0] != two[0]
