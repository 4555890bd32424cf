"""The SLURM scripts under a real SLURM of two nodes: what becomes of jobs that are taken away or fail."""

import re
import sys
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
MODEL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 512
    --max-position-embeddings 512 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --micro-batch-size 1 --global-batch-size 64 --lr 1e-3
    --lr-decay-style constant --calculate-per-token-loss --eval-iters 0 --eval-interval 1000 --log-interval 1
    --mock-data --flexsp-mock-lengths lognormal:mean=200,sigma=1,min=2,max=512 --flexsp-max-tokens-per-rank 2048
    --train-iters 14 --ckpt-format torch
"""
JOB = MODEL.split()
ON_THE_CPU = {
    "FLEXSP_DEVICE": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}

# Called as torchrun, it starts a rank, and ends it on TERM; called as the rank, it has a helper, as Megatron does for
# its checkpoints, and saves if that is still there.
TORCHRUN_AND_RANKS = """
if [ "$2" = torch.distributed.run ]; then
    while [ "$1" != --no-python ]; do shift; done
    shift
    "$@" & rank=$!
    trap 'kill -TERM $rank; wait $rank; exit 1' TERM
    wait $rank
else
    sleep 60 & helper=$!
    trap 'kill -KILL $helper && touch saved-$SLURM_RESTART_COUNT; exit 0' USR2
    touch ready-$SLURM_RESTART_COUNT
    wait
fi
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(
    cluster: Cluster, folder: Path, *arguments: str, python: Path | str = sys.executable, **environment: str
) -> str:
    """The id of a job of two nodes, one rank each, that runs in a folder."""
    folder.mkdir(exist_ok=True)
    environment = {**ON_THE_CPU, "FLEXSP_PYTHON": str(python), **environment}
    return cluster.submit("--nodes=2", str(SLURM / "train.sbatch"), *arguments, env=environment, cwd=folder)


def said(folder: Path, job: str) -> str:
    return (folder / f"flexsp-train-{job}.out").read_text()


def losses(logs: Path) -> dict[int, float]:
    """The losses that the ranks of one start printed to their files."""
    text = "".join(file.read_text() for file in logs.glob("node*/*/attempt_0/*/stdout.log"))
    return {int(step): float(loss) for step, loss, _ in LOSS.findall(text)}


def wait_for_step(cluster: Cluster, job: str, logs: Path, step: int) -> None:
    cluster.wait(job, lambda shown: max(losses(logs), default=0) >= step)


def test_a_job_goes_on_after_a_requeue_and_after_its_time_limit(
    cluster: Cluster, torchrun: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    job = submit(cluster, folder, PRETRAIN, *JOB, "--flexsp", "--save", "a checkpoint", "--save-interval", "4")
    logs = folder / "logs" / f"flexsp-train-{job}"
    wait_for_step(cluster, job, logs / "0", 5)
    cluster.call("scontrol", "requeue", job)
    wait_for_step(cluster, job, logs / "1", 8)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    ended = cluster.wait(job)
    told = said(folder, job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), told

    # Taken away in some step, it saved that step and went on with the next.
    runs = [losses(logs / str(restart)) for restart in range(3)]
    assert [step for run in runs for step in run] == list(range(1, 15)), told
    assert f"stopped by SLURM; the last checkpoint is of iteration {max(runs[0])}" in told
    assert f"the time limit is near; the last checkpoint is of iteration {max(runs[1])}" in told

    whole = torchrun(2, "-m", "megatron_flexsp.run", "--cpu", PRETRAIN, *JOB, "--flexsp", env=ON_THE_CPU)
    expected = {int(step): float(loss) for step, loss, _ in LOSS.findall(whole.stdout)}
    for run in runs:
        first, second, *_ = run
        if first > 1:  # the second loss that Megatron prints after a start is the mean of the first two
            run[second] = 2 * run[second] - run[first]
        assert list(run.values()) == pytest.approx([expected[step] for step in run], rel=1e-5)

    # A file for each rank and start, those of a node in its folder.
    assert len(list(logs.glob("[012]/node[01]/*/attempt_0/0/stderr.log"))) == 6


class TestDecisions:
    """Under the same SLURM, with a few lines of bash in place of the Python that starts torchrun."""

    @pytest.fixture
    def python(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(program: str) -> Path:
            path = tmp_path / "python"
            save = "save() { mkdir -p saved; echo $1 >saved/latest_checkpointed_iteration.txt; }"
            path.write_text(f'#!/bin/bash\n[ "$1" != -c ] || exit 0\n{save}\n{program}\n')
            path.chmod(0o755)
            return path

        return write

    def test_a_job_that_fails_at_once_is_given_up(self, cluster: Cluster, python: Callable, tmp_path: Path) -> None:
        job = submit(cluster, tmp_path, PRETRAIN, "--save", "saved", python=python("exit 3"))
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "3:0")
        assert "given up: no new checkpoint since iteration 0" in said(tmp_path, job)

    def test_a_failure_before_another_node_has_started_is_told_by_its_own_exit_code(
        self, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        starts_late = tmp_path / "starts_late"
        starts_late.write_text('[ "$SLURM_PROCID" != 1 ] || exec sleep 60\n')
        job = submit(cluster, tmp_path, PRETRAIN, python=python("exit 3"), BASH_ENV=str(starts_late))
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "3:0"), said(tmp_path, job)

    def test_a_job_that_fails_later_is_given_up_after_two_starts_without_a_checkpoint(
        self, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        program = python('[ -n "$SLURM_RESTART_COUNT" ] || save 10; exit 3')
        job = submit(cluster, tmp_path, PRETRAIN, "--save", "saved", python=program)
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), said(tmp_path, job)
        assert "given up: no new checkpoint since iteration 10" in said(tmp_path, job)

    def test_a_run_without_checkpoints_is_not_requeued(
        self, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        job = submit(cluster, tmp_path, PRETRAIN, python=python("exit 3"))
        assert (cluster.wait(job)["JobState"], cluster.show(job)["Restarts"]) == ("FAILED", "0")
        assert "no --save: this run can't be continued" in said(tmp_path, job)

    def test_a_run_that_became_complete_as_its_time_ended_is_not_requeued(
        self, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        program = python("save 20; touch ready; for _ in {1..300}; do [ -e go ] && exit 0; sleep 0.1; done")
        job = submit(cluster, tmp_path, PRETRAIN, "--save", "saved", "--train-iters=20", python=program)
        cluster.wait(job, lambda shown: (tmp_path / "ready").exists())
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        (tmp_path / "go").touch()
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), said(tmp_path, job)

    def test_preemption_with_a_grace_time_requeues_and_scancel_does_not(
        self, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        """Where partitions preempt, SLURM first sends TERM to the steps and leaves the job running."""
        program = python(TORCHRUN_AND_RANKS)
        job = submit(cluster, tmp_path, PRETRAIN, "--save", "saved", python=program)
        cluster.wait(job, lambda shown: (tmp_path / "ready-").exists())
        cluster.call("scancel", "--signal=TERM", job)
        cluster.wait(job, lambda shown: (tmp_path / "ready-1").exists())
        assert "stopped by SLURM: requeued" in said(tmp_path, job)
        assert (tmp_path / "saved-").exists(), "a rank is asked for a checkpoint, and what it needs for it still runs"
        cluster.call("scancel", job)
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), said(tmp_path, job)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "no arguments"),
            (("missing.py",), "missing.py: no such script"),
            ((PRETRAIN, "--save", "a", "--load", "b"), "--load b: a requeued run goes on from --save a"),
            ((PRETRAIN, "--save", "a", "--finetune"), "--finetune: every restart would begin there again"),
        ],
    )
    def test_refuses(
        self, arguments: tuple[str, ...], message: str, cluster: Cluster, python: Callable, tmp_path: Path
    ) -> None:
        job = submit(cluster, tmp_path, *arguments, python=python("exit 0"))
        assert (cluster.wait(job)["ExitCode"], cluster.show(job)["Restarts"]) == ("2:0", "0")
        assert message in said(tmp_path, job)


class TestProfileThenTrain:
    COMMAND = str(SLURM / "profile_then_train.sh")

    def test_the_second_job_waits_for_the_first(self, cluster: Cluster, tmp_path: Path) -> None:
        arguments = ("costs.json", "--hold", "--nodes=2", "--", PRETRAIN, "--num-layers", "2")
        submitted = cluster.call(self.COMMAND, *arguments, cwd=tmp_path).stdout
        measuring, training = re.findall(r"job (\d+)", submitted)
        first, second = cluster.show(measuring), cluster.show(training)
        assert second["Dependency"].startswith(f"afterok:{measuring}(")
        command = cluster.call("scontrol", "show", "job", measuring).stdout
        assert f"{PRETRAIN} --num-layers 2 --flexsp-profile costs.json" in command
        command = cluster.call("scontrol", "show", "job", training).stdout
        assert f"{PRETRAIN} --num-layers 2 --flexsp --flexsp-cost-model costs.json" in command
        assert first["NumNodes"] == second["NumNodes"] == "2-2"
        assert re.search(r"KillOInInvalidDependent=Yes", command), "it would wait for ever for a first job that fails"
        cluster.call("scancel", measuring, training)

    def test_refuses_to_overwrite_a_cost_model(self, cluster: Cluster, tmp_path: Path) -> None:
        (tmp_path / "costs.json").touch()
        done = cluster.call(self.COMMAND, "costs.json", "--", PRETRAIN, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert "costs.json is there already" in done.stderr
