"""Several ranks: training is refused in each of them, evaluation is what it is in one process."""

import json
import subprocess
import sys

import pytest

from tiny import environment

RANK = """
import json, os, sys
from torch import distributed
from tiny import changed, make_backbone, make_images, make_model, make_trainer, weights_of
import transferkit as tk
from transferkit.errors import DeviceError

rank, world, meeting, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
model = make_model(make_backbone(batch_norm=True), hidden=(16,))
images, targets = make_images(9)
trainer = make_trainer(model)
before = weights_of(model)
if world:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
mine = slice(None) if not world or world == 1 else slice(0, 5) if rank == 0 else slice(5, 9)
result = {"errors": []}
checkpoint = tk.Checkpoint(os.path.join(folder, f"runs-{rank}-{world}"))
for call in (
    lambda: trainer.fit((images[mine], targets[mine]), batch_size=1, callbacks=[checkpoint], verbose=0),
    lambda: trainer.fit(None),
    lambda: next(trainer.steps((images[mine], targets[mine]), batch_size=1)),
):
    if world > 1:
        try:
            call()
        except DeviceError as error:
            result["errors"].append(str(error))
result["same"] = not changed(before, model)
result["steps"] = trainer.global_step
result["figures"] = trainer.evaluate((images, targets), batch_size=4)
result["predictions"] = trainer.predict(images, batch_size=4).tolist()
if world < 2:
    trainer.fit((images, targets), epochs=2, batch_size=4, callbacks=[checkpoint], verbose=0)
    result["trained"] = trainer.evaluate((images, targets), batch_size=4)
result["files"] = sorted(os.listdir(checkpoint.folder))
if world:
    distributed.barrier()
    distributed.destroy_process_group()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process of a world of two, of a world of one, and one without a world, came to; all run at once."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = {
        (rank, world): subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world), str(folder / f"meeting-{world}"), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank, world in ((0, 2), (1, 2), (0, 1), (0, 0))
    }
    found = {}
    try:
        for key, process in processes.items():
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            found[key] = json.loads(output.splitlines()[-1])
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_training_is_refused_in_every_rank_before_a_step(results, rank):
    """`fit` and `steps` name the rank and the remedy, before data is looked at; nothing is changed or written."""
    result = results[rank, 2]
    assert len(result["errors"]) == 3
    for message in result["errors"]:
        assert f"rank {rank} of 2" in message
        assert "DistributedDataParallel" in message
    assert result["same"]
    assert result["steps"] == 0
    assert result["files"] == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_in_a_rank_is_that_of_one_process(results, rank):
    """Loss, accuracy and predictions over 9 images are the same to the bit."""
    alone = results[0, 0]
    assert results[rank, 2]["figures"] == alone["figures"]
    assert results[rank, 2]["predictions"] == alone["predictions"]


@pytest.mark.slow
def test_a_world_of_one_trains(results):
    """A process group of one rank changes nothing: the same figures after training, and checkpoints."""
    assert results[0, 1] == results[0, 0]
    assert results[0, 1]["trained"] != results[0, 1]["figures"]
    assert any(name.startswith("step-") for name in results[0, 1]["files"])
