"""One launch of several processes, by torchrun or srun: one run, ended together, gone on with on any number."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch.distributed import TCPStore

from lab import Run, api, fit, nodes, registry, stages, stopping
from lab.batching import settled
from lab.cli import main
from lab.document import RecipeError
from lab.errors import UserError
from lab.following import Hand
from lab.launch import Order, free_port
from lab.link import Gone, Link
from lab.nodes import Here, Width
from lab.run import folders
from lab.types import check_types

RECIPE = """\
seed: 1
data: {{name: digits, drop_last: true}}
global_batch_size: 96
trainer: {{max_epochs: {epochs}, precision: 64-true, accelerator: cpu, log_every_n_steps: 1}}
callbacks: {{progress: null, profile: null, checkpoints: {{every_seconds: 0.2}}}}
logger: csv
module:
  name: supervised
  network: {{name: mlp, hidden: [16], activation: tanh}}
  optimizer: {{name: adamw, lr: 0.01}}
"""
STEPS = 14
"""In an epoch of 96 samples each."""
EPOCHS = 12
"""So many that a training can be left in the middle."""
PROGRAM = """\
import sys
from lab import link
from lab.cli import main
link.SILENCE = 6.0
sys.exit(main(sys.argv[1:]))
"""
SECONDS = 90
"""That a launch may take to end, at most."""


@pytest.fixture(autouse=True)
def own_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test claims of a launch is forgotten after it."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGUSR1)
    for name in ("here", "width", "link"):
        monkeypatch.setattr(nodes._Now, name, None)
    monkeypatch.setattr(stopping._Asked, "signals", stopping.SIGNALS)
    yield
    signal.signal(signal.SIGUSR1, before)


def recipe(epochs: int = 2) -> str:
    Path("tiny.yaml").write_text(RECIPE.format(epochs=epochs), encoding="utf-8")
    return "tiny.yaml"


class Launch:
    """Processes that are started together, and what they say."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
        self.processes = []
        for number, (command, own) in enumerate(zip(commands, environments, strict=True)):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
            with Path(f"said-{number}.txt").open("w") as said:
                self.processes.append(
                    subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, env=environment)
                )

    def codes(self) -> list[int]:
        """Their exit codes, once all have ended."""
        try:
            return [process.wait(SECONDS) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self, number: int) -> str:
        return Path(f"said-{number}.txt").read_text()


def torchrun(*arguments: str) -> Launch:
    """Two agents of one worker each, as on two machines."""
    Path("program.py").write_text(PROGRAM)
    agent = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
    ]  # fmt: skip
    return Launch([[*agent, "--node-rank", str(node), "program.py", *arguments] for node in (0, 1)], [{}, {}])


def srun(*arguments: str, tasks: int = 2, **environment: str) -> Launch:
    """Tasks of a step, one a machine, as srun starts them; a cluster whose `scontrol` notes what it is told."""
    Path("program.py").write_text(PROGRAM)
    tool = Path("tools", "scontrol")
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\necho "$@" >> {Path("scontrol.txt").absolute()}\n')
    tool.chmod(0o700)
    shared = {
        "PATH": f"{tool.parent.absolute()}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0",
        "SLURM_JOB_NAME": "tiny", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(tasks), "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment,
    }  # fmt: skip
    each = [{**shared, "SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in range(tasks)]
    return Launch([[sys.executable, "program.py", *arguments]] * tasks, each)


def only_run() -> Run:
    (folder,) = folders()
    return Run(folder)


def once_training(launch: Launch) -> Run:
    """The run, once it has a state to go on from."""
    while not (states := list(Path("runs").glob("*/*/main/checkpoints/last.ckpt"))):
        assert all(process.poll() is None for process in launch.processes), launch.said(0) + launch.said(1)
        time.sleep(0.05)
    time.sleep(0.2)
    return Run(states[0].parents[2])


def ask_for_a_stop() -> None:
    """Once a training in this process has a state to go on from."""
    while not list(Path("runs").glob("*/*/main/checkpoints/last.ckpt")):
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def apart(one: Run, other: Run) -> float:
    """The largest difference of two runs' weights, to each tensor's largest."""
    found, expected = (load_file(run.stage("main") / "network.safetensors") for run in (one, other))
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)


def steps(run: Run) -> list[int]:
    with (run.stage("main") / "metrics.csv").open(encoding="utf-8") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


# --- whole launches --------------------------------------------------------------------------------------------------


def test_two_machines_go_on_with_a_run_of_one_process_and_end_as_it_would_have() -> None:
    asking = threading.Thread(target=ask_for_a_stop)
    asking.start()
    with pytest.raises(stages.Terminated):
        fit(recipe(EPOCHS))
    asking.join()
    run = only_run()
    assert 0 < len(steps(run)) < EPOCHS * STEPS
    launch = torchrun("resume", str(run.folder))
    assert launch.codes() == [0, 0], launch.said(0) + launch.said(1)
    alone = fit("tiny.yaml", out="alone", fresh=True)
    assert apart(run, alone) <= 1e-9
    assert steps(run) == steps(alone)
    assert only_run().results["stages"]["main"]["devices"] == 2
    assert "num_nodes" not in run.recipe.read_text()  # so that it can be gone on with on any number
    assert launch.said(0).strip().splitlines()[-1] == str(run.folder)
    assert "tiny/main" not in launch.said(1)  # the first machine shows how far it is
    assert [path.name for path in (run.stage("main") / "logs").iterdir()] == ["rank-1.txt"]


def test_a_machine_that_is_lost_ends_the_other_and_the_run_goes_on_on_one_process() -> None:
    launch = torchrun("fit", recipe(EPOCHS))
    run = once_training(launch)
    agent = launch.processes[1].pid
    (worker,) = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for process in (agent, int(worker)):
        os.kill(process, signal.SIGKILL)
    assert launch.codes() == [1, -signal.SIGKILL]
    assert f"process 1 on {socket.gethostname()} is gone: nothing heard for 6 seconds" in launch.said(0)
    assert (run.status, "lab resume" in launch.said(0)) == ("failed", True)
    assert 0 < len(steps(run)) < EPOCHS * STEPS
    with pytest.warns(UserWarning, match="left with 2 processes and goes on with 1"):
        stages.resume(run)
    assert apart(run, fit("tiny.yaml", out="alone", fresh=True)) <= 1e-9


def test_a_wrong_recipe_ends_all_and_is_told_once() -> None:
    text = RECIPE.format(epochs=1).replace("max_epochs", "devices: 3, num_nodes: 4, max_epochs")
    Path("tiny.yaml").write_text(text)
    launch = srun("fit", "tiny.yaml")
    assert launch.codes() == [2, 2]
    said = launch.said(0)
    assert "tiny.yaml:4:20: trainer.devices: the recipe says 3, but 1 on each machine were launched" in said
    assert "tiny.yaml:4:34: trainer.num_nodes: the recipe says 4, but 2 machines were launched" in said
    assert launch.said(1) == ""
    assert not Path("runs").exists()


def test_a_stop_asked_of_any_process_stops_all_and_the_requeued_job_goes_on_with_its_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = srun("fit", recipe(EPOCHS))
    run = once_training(launch)
    launch.processes[1].send_signal(signal.SIGUSR1)
    assert launch.codes() == [143, 143], launch.said(0)
    assert (run.status, run.manifest["job"]) == ("stopped", "slurm:42")
    assert Path("scontrol.txt").read_text() == "requeue 42\n"
    assert "lab: job 42 is requeued" in launch.said(0)
    assert 0 < len(steps(run)) < EPOCHS * STEPS
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.warns(UserWarning, match="left with 2 processes and goes on with 1"):
        assert main(["fit", "tiny.yaml"]) == 0
    assert f"lab: goes on with {run.folder}" in capsys.readouterr().err
    assert only_run() == run
    assert apart(run, fit("tiny.yaml", out="alone", fresh=True)) <= 1e-9
    assert main(["fit", "tiny.yaml"]) == 0  # it has ended: another is made
    assert len(folders()) == 2


# --- who is who ------------------------------------------------------------------------------------------------------

SRUN = {
    "SLURM_JOB_ID": "1007", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_NAME": "train",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1",
    "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07", "MASTER_PORT": "1234",
}  # fmt: skip


def claimed(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Here | None:
    monkeypatch.setattr(nodes.launch, "die_with_parent", lambda: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return nodes.claim()


def test_srun_says_who_this_is_and_where_all_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    here = claimed(monkeypatch, SRUN)
    assert here == Here(
        "srun", rank=3, size=4, node=1, nodes=2, local=1, address="gpu07", port=16209, name="lab/slurm:1007/2/0",
        job="slurm:1007",
    )  # fmt: skip
    assert not {"SLURM_NTASKS", "SLURM_PROCID"} & set(os.environ)  # so that Lightning doesn't take over


def test_torchrun_says_who_this_is_and_where_all_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    here = claimed(monkeypatch, TORCHRUN)
    assert here == Here(
        "torchrun", rank=3, size=4, node=1, nodes=2, local=1, address="gpu07", port=1234, served=True,
        name="lab/torchrun/mine",
    )  # fmt: skip
    assert not {*TORCHRUN} & set(os.environ)


def test_a_jobs_own_script_is_one_process_and_a_shell_in_a_job_no_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert claimed(monkeypatch, script | {"SLURM_RESTART_COUNT": "2"}) == Here("srun", job="slurm:1007", restarted=True)
    assert "without srun" in capsys.readouterr().err
    assert claimed(monkeypatch, SRUN | {"SLURM_JOB_NAME": "bash"}) is None


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"devices": 4}, "trainer.devices: the recipe says 4, but 2 on each machine were launched"),
        ({"devices": [0, 1, 2]}, "the recipe says 3, but 2"),
        ({"num_nodes": 1}, "trainer.num_nodes: the recipe says 1, but 3 machines were launched"),
        ({"strategy": "ddp_spawn"}, "trainer.strategy: ddp_spawn starts its processes itself"),
        ({"devices": 2, "num_nodes": 3}, None),
        ({"devices": "auto"}, None),
        ({}, None),
    ],
)
def test_a_recipe_may_leave_the_width_to_the_launch_but_not_contradict_it(
    trainer: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.set_width("3x2")
    plan = api.load_recipe(
        {
            "data": "digits", "module": {"name": "supervised", "network": "mlp"}, "global_batch_size": 96,
            "trainer": {"accelerator": "cpu", **trainer},
        }
    )  # fmt: skip
    if said is not None:
        with pytest.raises(RecipeError, match=said):
            check_types(plan)
        return
    check_types(plan)
    stage = settled(plan.stages["main"])
    assert stage.trainer.mapping["num_nodes"].value == 3
    assert stage.data is not None
    assert stage.data.arguments["batch_size"].plain() == 16  # type: ignore[union-attr]
    assert "num_nodes" not in plan.resolved()["trainer"] or "num_nodes" in trainer


def test_several_machines_that_nobody_started_are_an_error_that_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tiny.yaml").write_text(RECIPE.format(epochs=1).replace("max_epochs", "num_nodes: 2, max_epochs"))
    assert main(["fit", "tiny.yaml"]) == 2
    said = capsys.readouterr().err
    assert "tiny.yaml:4:22: trainer.num_nodes: 2 machines need a launcher; on each: torchrun --nnodes 2" in said
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [["fit", "tiny.yaml", "--seeds", "2"], ["sweep", "tiny.yaml"]])
def test_one_launch_makes_one_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    recipe()
    assert main(arguments) == 2
    assert "is not for several processes: start it without srun" in capsys.readouterr().err


def test_one_process_of_a_launch_that_is_no_command_makes_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start `lab fit` by it"):
        fit("tiny.yaml")


class Asked(Callback):
    """Sends the process SIGUSR1 in a step."""

    watches_only = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_job_that_cannot_be_requeued_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.callbacks.register("asked")(Asked)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("PATH", "")
    assert main(["fit", recipe(), "callbacks.asked={}"]) == 143
    said = capsys.readouterr().err
    assert "lab resume" in said
    assert "job 42 could not be requeued: [Errno 2] No such file or directory: 'scontrol'" in said
    assert main(["show", "no-such-run"]) == 2
    assert "requeued" not in capsys.readouterr().err


# --- what they say to each other -------------------------------------------------------------------------------------


@pytest.fixture
def store() -> TCPStore:
    """As torchrun's agent has one."""
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


@pytest.fixture
def process(store: TCPStore) -> Iterator[Callable[..., Link]]:
    links = []

    def start(rank: int, name: str = "lab/one", **changes: Any) -> Link:
        place = {"size": 2, "nodes": 2, "node": rank, "port": store.port, "served": True, **changes}
        links.append(Link(Here("torchrun", rank=rank, name=name, **place)))
        return links[-1]

    yield start
    for link in links:
        link.close()


def both(lead: Link, other: Link) -> None:
    while not (lead._joined() and other._joined()):
        time.sleep(0.02)
    lead.join()
    other.join()


def lose(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a process say nothing any more."""
    monkeypatch.setattr(link, "_hear", lambda store: link._closing.wait())


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.02)


def test_each_hears_what_the_other_says(process: Callable[..., Link]) -> None:
    lead, other = process(0), process(1)
    both(lead, other)
    assert lead.even() == Width(2, 1)
    lead.say(stop=1)
    until(lambda: other.leader().get("stop") == 1)
    other.say(asked=int(signal.SIGTERM))
    until(lambda: lead.asked() == signal.SIGTERM)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_silent_is_gone(lost: int, process: Callable[..., Link], monkeypatch: pytest.MonkeyPatch) -> None:
    links = [process(0), process(1)]
    both(*links)
    links[1 - lost].check()
    monkeypatch.setattr("lab.link.SILENCE", 2.0)
    lose(links[lost], monkeypatch)
    with pytest.raises(Gone, match=f"^process {lost} on {socket.gethostname()} is gone: nothing heard for 2 seconds$"):
        until(lambda: links[1 - lost].check() is not None)


def test_another_launch_at_the_same_store_is_not_heard(
    process: Callable[..., Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    lead, other = process(0), process(1, name="lab/two")
    monkeypatch.setattr("lab.link.JOIN", 2.0)
    for link, missing in ((lead, 1), (other, 0)):
        with pytest.raises(Gone, match=f"^of 2 processes {missing} did not come to 127.0.0.1:"):
            link.join()


def test_what_was_said_before_a_restart_counts_for_nothing_but_the_run_that_was_begun(
    process: Callable[..., Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    lead, other = process(0), process(1)
    both(lead, other)
    assert lead.begun is None
    lead.say(run="runs/tiny/one", order={"number": 5}, end=1)
    other.say(number=1, code=7)
    until(lambda: other.leader().get("end") == 1 and lead.heard(1).get("code") == 7)
    for link in (lead, other):
        lose(link, monkeypatch)
    again = process(0)
    until(lambda: 1 in again._heard)
    assert not again._joined()  # it hears what the other one said before
    other_again = process(1)
    both(again, other_again)
    assert again.begun == "runs/tiny/one"
    assert "code" not in again.heard(1)
    assert "end" not in other_again.leader()
    lead._heard[1] = again._heard[1]
    with pytest.raises(Gone, match=r" is gone: another was started in its place$"):
        lead.check()


def test_machines_must_be_alike(process: Callable[..., Link]) -> None:
    links = [process(rank, size=3, nodes=2, node=min(rank, 1), local=max(rank - 1, 0)) for rank in range(3)]
    until(lambda: all(link._joined() for link in links))
    with pytest.raises(UserError, match=rf"there are 1 on {socket.gethostname()}, 2 on "):
        links[0].even()
    links[0]._heard.popitem()
    next(iter(links[0]._heard.values()))["versions"]["torch"] = "0.1"
    links[0]._heard = {1: next(iter(links[0]._heard.values()))}
    with pytest.raises(UserError, match=r"process 1 on \S+ has torch 0.1, process 0 on \S+ "):
        links[0].even()


def test_a_run_that_another_machine_does_not_see_is_told_with_host_and_path(
    process: Callable[..., Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.following.APPEAR", 0.2)
    lead, other = process(0), process(1)
    both(lead, other)
    order = Order([], "stage", 2, 1, "127.0.0.1", 1, {"runs/x/recipe.yaml": 10})
    (remote,) = lead.start(order)
    hand = Hand(other)

    def told() -> bool:
        hand.obey(other.leader())
        return remote.poll() is not None

    until(told)
    assert remote.returncode == 1
    assert remote.rank == 1
    assert remote.why is not None
    assert remote.why.startswith(f"runs/x/recipe.yaml does not appear on {socket.gethostname()} within 0 seconds")


def test_the_script_that_users_copy_is_sound() -> None:
    script = Path(__file__).parents[1] / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    said = script.read_text()
    assert all(line in said for line in ("#SBATCH --signal=USR1@", "#SBATCH --requeue\n", 'srun lab fit "$@"'))
