"""The SLURM scripts under a real SLURM of two nodes: what becomes of a job that is taken away, and of one that fails."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import LOSS

from .slurm_cluster import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "scripts" / "slurm"
PRETRAIN = str(ROOT / "scripts" / "pretrain_gpt.py")
REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no SLURM here: {REASON}")

# Steps take a quarter of a second, so that a signal comes between them.
JOB = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 512
    --max-position-embeddings 512 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --micro-batch-size 1 --global-batch-size 64 --lr 1e-3
    --lr-decay-style constant --calculate-per-token-loss --eval-iters 0 --eval-interval 1000 --log-interval 1
    --mock-data --flexsp-mock-lengths lognormal:mean=200,sigma=1,min=2,max=512 --flexsp-max-tokens-per-rank 2048
    --train-iters 30
""".split()
ON_THE_CPU = {
    "FLEXSP_DEVICE": "cpu",
    "FLEXSP_PYTHON": sys.executable,
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_a_job_goes_on_after_a_requeue_and_after_its_time_limit(
    cluster: Cluster, torchrun: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    job = cluster.submit(
        *("--nodes=2", str(SLURM / "train.sbatch"), PRETRAIN, *JOB, "--flexsp", "--save", "a checkpoint"),
        *("--save-interval", "4"),
        env=ON_THE_CPU,
        cwd=folder,
    )
    logs = folder / "logs" / f"flexsp-train-{job}"
    wait_for_iteration(logs / "0", 6)
    cluster.call("scontrol", "requeue", job)
    cluster.start_again(job)
    wait_for_iteration(logs / "1", 13)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal has SLURM do before the time limit
    cluster.start_again(job)
    ended = cluster.wait(job)
    told = (folder / f"flexsp-train-{job}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), told

    # Taken away at some step, it saved that step and began with the next one.
    runs = [losses(logs / str(restart)) for restart in range(3)]
    assert [step for run in runs for step in run] == list(range(1, 31)), told
    whole = torchrun(2, "-m", "megatron_flexsp.run", "--cpu", PRETRAIN, *JOB, "--flexsp", env=ON_THE_CPU)
    expected = {int(step): float(loss) for step, loss, _ in LOSS.findall(whole.stdout)}
    for run in runs:
        # The second loss that Megatron prints after a start is the mean of the first two.
        first, second, *others = run
        assert run[first] == pytest.approx(expected[first], rel=1e-5)
        if first > 1:
            assert run[second] == pytest.approx((expected[first] + expected[second]) / 2, rel=1e-5)
        assert [run[step] for step in others] == pytest.approx([expected[step] for step in others], rel=1e-5)

    assert f"stopped by SLURM; the last checkpoint is of iteration {len(runs[0])}" in told
    assert "the time limit is near: requeued" in told
    # One file for each rank and restart, those of a node in its folder.
    assert len(list(logs.glob("[012]/node[01]/*/attempt_0/0/stderr.log"))) == 6


def test_a_job_that_fails_is_requeued_only_after_new_checkpoints(cluster: Cluster, tmp_path: Path) -> None:
    """It saves, fails, is requeued; fails twice more without saving, and is given up."""
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "first = os.environ['SLURM_RESTART_COUNT'] if 'SLURM_RESTART_COUNT' in os.environ else '0'\n"
        "if first == '0':\n"
        "    pathlib.Path('saved').mkdir(exist_ok=True)\n"
        "    pathlib.Path('saved', 'latest_checkpointed_iteration.txt').write_text('10')\n"
        "sys.exit(f'a reason of restart {first}')\n"
    )
    python = tmp_path / "python"
