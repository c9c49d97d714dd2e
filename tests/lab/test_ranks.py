"""Several processes train one network as one would; where one of them fails the job does, and nothing is lost."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.lab import ranks, record
from halfbyte.lab.compare import compare
from halfbyte.lab.data.source import Batch
from halfbyte.lab.trainer import train
from workers import lab_ranks

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs a torch with gloo")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

MLP = {"task": "digits", "recipe": "ibm2020", "seed": 0, "model": "mlp"}
TRANSFORMER = {"task": "multi30k", "recipe": "ibm2020", "seed": 0}
RUNS = {"mlp": MLP, "transformer": TRANSFORMER, "tuned": {**MLP, "fine_tune": 1}}
EXACT_STEPS = {"mlp": 23, "transformer": 4, "tuned": 23}


def start(folder: Path, count: int, questions: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
    """The worker in so many processes; what each complains of is in ``errors0.txt`` and so on."""
    (folder / "questions.json").write_text(json.dumps(questions))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        with (folder / f"errors{rank}.txt").open("w") as errors:
            environment = ENVIRONMENT | shared | {"RANK": str(rank)}
            command = [sys.executable, lab_ranks.__file__, str(folder)]
            children.append(subprocess.Popen(command, env=environment, stderr=errors))
    return children


def answer(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def state(folder: Path) -> dict[str, torch.Tensor]:
    """What a network ended with."""
    saved: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["model"]
    return saved


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One process's runs: the folder with what came of them. One is interrupted, for others to go on with."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        lab_ranks.prepare(folder / "data0", patch)
        for name, question in RUNS.items():
            found = lab_ranks.run({**question, "out_dir": f"{name}-run"}, folder)
            (folder / f"{name}.json").write_text(json.dumps(found))
        lab_ranks.run({**MLP, "out_dir": "cut", "stop": 30}, folder)
        yield folder


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes' runs, in one go because processes start slowly: the folder with what came of them."""
    folder = tmp_path_factory.mktemp("together")
    (alone / "cut").rename(folder / "cut")
    questions: dict[str, Any] = {
        f"{name}-{strategy}": {**question, "strategy": strategy, "out_dir": f"{name}-{strategy}-run"}
        for name, question in RUNS.items()
        for strategy in ranks.STRATEGIES
    }
    questions["cut-by-two"] = {**MLP, "strategy": "fsdp2", "out_dir": "cut-by-two-run", "stop": 30}
    questions["go-on"] = {**MLP, "strategy": "fsdp2", "resume": "cut"}
    for strategy in ranks.STRATEGIES:
        whole = {**TRANSFORMER, "size": "cpu", "strategy": strategy}
        questions[f"whole-{strategy}"] = {**whole, "out_dir": f"whole-{strategy}-run"}
        questions[f"cut-{strategy}"] = {**whole, "out_dir": f"cut-{strategy}-run", "stop": 3}
        questions[f"go-on-{strategy}"] = {**whole, "resume": f"cut-{strategy}-run"}
    questions["silent"] = {**MLP, "out_dir": "silent-run", "sleep": 30}
    children = start(folder, 2, questions)
    try:
        status = children[0].wait(timeout=240)
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert status == 2, (folder / "errors0.txt").read_text()  # The last question ends so.
    return folder


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_run_of_one(name: str, strategy: str, alone: Path, together: Path) -> None:
    """At equal batches two ranks have one's losses, to float32's error, and end with its layer scales exactly."""
    one, two = answer(alone, name), answer(together, f"{name}-{strategy}")
    assert len(one["losses"]) == len(two["losses"])
    steps = EXACT_STEPS[name]
    assert two["losses"][:steps] == pytest.approx(one["losses"][:steps], rel=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert two["saved_bytes"] == one["saved_bytes"]
    own, theirs = state(alone / f"{name}-run"), state(together / f"{name}-{strategy}-run")
    assert own.keys() == theirs.keys()
    scales = [key for key in own if key.endswith("log2_scale")]
    assert bool(scales) == (name != "tuned")  # Fine-tuning has no scales.
    for key in scales:
        assert torch.equal(own[key], theirs[key]), key
    for key in own:
        if not key.endswith(("_extra_state", "nonfinite")):
            assert own[key].shape == theirs[key].shape
            assert own[key].dtype == theirs[key].dtype


@needs_gloo
@pytest.mark.slow
def test_the_record_says_how_many_and_how(alone: Path, together: Path) -> None:
    """The machine of a record has the number of ranks and the strategy, and its command starts as many."""
    two = answer(together, "mlp-fsdp2")
    assert two["machine"] == answer(alone, "mlp")["machine"] | {"world_size": 2, "strategy": "fsdp2"}
    assert two["command"][:5] == ["torchrun", "--nproc-per-node=2", "-m", "halfbyte", "train"]
    assert two["command"][-2:] == ["--strategy", "fsdp2"]
    written = record.read(together / "mlp-fsdp2-run" / "record.json")
    assert (written.machine, written.value, written.command) == (two["machine"], two["value"], two["command"])


@needs_gloo
@pytest.mark.slow
def test_two_ranks_go_on_with_a_checkpoint_of_one(alone: Path, together: Path) -> None:
    """An interrupted run of one process goes on in two, sharded, with a warning and the unbroken run's losses."""
    one, two = answer(alone, "mlp"), answer(together, "go-on")
    (warning,) = two["warnings"]
    assert "goes on, but may end in other bits" in warning
    assert "the processes are 2, not 1" in warning
    assert two["losses"] == pytest.approx(one["losses"][30:], rel=1e-2)
    assert two["losses"][:3] == pytest.approx(one["losses"][30:33], rel=1e-5)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ranks.STRATEGIES)
def test_two_ranks_go_on_with_their_own_checkpoint(strategy: str, together: Path) -> None:
    """Resumed by as many, each with its own dropout: the unbroken run's losses, bit for bit, and nothing to warn of."""
    on = answer(together, f"go-on-{strategy}")
    assert on["losses"] == answer(together, f"whole-{strategy}")["losses"][3:]
    assert on["warnings"] == []


@needs_gloo
@pytest.mark.slow
def test_one_process_goes_on_with_a_checkpoint_of_two(alone: Path, together: Path, tmp_path: Path) -> None:
    """Ctrl-C on one of two ranks stops both with a checkpoint, from which one process goes on."""
    stopped = answer(together, "cut-by-two")
    folder = together / "cut-by-two-run"
    assert stopped["stopped"] == (
        "torchrun --nproc-per-node=2 -m halfbyte train digits --recipe ibm2020 --seed 0 --size smoke --model mlp "
        f"--data-dir {together / 'data0'} --resume {folder} --strategy fsdp2"
    )
    losses = []
    with pytest.warns(UserWarning, match="the processes are 1, not 2"):
        train(**MLP, size="smoke", resume=folder, progress=lambda step: losses.append(step.loss))
    assert losses[:3] == pytest.approx(answer(together, "mlp-fsdp2")["losses"][30:33], rel=1e-5)
    assert len(losses) == 16


@needs_gloo
@pytest.mark.slow
def test_a_silent_rank_is_an_error(together: Path) -> None:
    """A rank that answers no more is given up after a while, with the command that goes on, and no record is left."""
    lost = answer(together, "silent")["lost"]
    assert "Process 0 of 2 (counted from 0) has lost another one, which has ended or does not answer" in lost
    assert f"--resume {together / 'silent-run'}" in lost
    assert sorted(p.name for p in (together / "silent-run").iterdir()) == ["last.ckpt", "progress.json"]


@needs_gloo
@pytest.mark.slow
def test_a_killed_rank_fails_the_job(alone: Path, tmp_path: Path) -> None:
    """Where torchrun's second process is killed the job fails at once and says how; its checkpoint goes on in one."""
    (tmp_path / "questions.json").write_text(json.dumps({"mlp": {**MLP, "out_dir": "run", "kill": 30}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*command, lab_ranks.__file__, str(tmp_path)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    lost = answer(tmp_path, "mlp")["lost"]
    assert "has lost another one" in lost
    assert "GLHF" not in lost  # What gloo says to its own developers.
    losses = []
    with pytest.warns(UserWarning, match="the processes are 1, not 2"):
        train(**MLP, size="smoke", resume=tmp_path / "run", progress=lambda step: losses.append(step.loss))
    assert losses == pytest.approx(answer(alone, "mlp")["losses"][23:], rel=1e-2)


DYING = """
import os, signal, torch
from torch import nn
from halfbyte.lab.tasks import Settings, classification

x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()

class Network(nn.Sequential):
    calls = 0
    def forward(self, batch):
        self.calls += 1
        if self.calls == 10 and os.environ["RANK"] == os.environ.get("DYING"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)

task = classification(lambda: Network(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
                      train=(x, y), test=(x, y),
                      settings=Settings(epochs=8, batch_size=16, optimizer="sgd", learning_rate=0.1))
"""


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("dying", ["0", "1"])
def test_whichever_process_is_killed_the_command_says_how_to_go_on(dying: str, tmp_path: Path) -> None:
    """The one that is left says what happened and which command goes on, before torchrun ends it; that command does."""
    (tmp_path / "dying.py").write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    asked = ["-m", "halfbyte", "train", "dying:task", "--recipe", "ibm2020", "--out", "run", "--no-report"]
    how: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*launch, *asked], env=ENVIRONMENT | {"DYING": dying}, **how)
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("halfbyte: ")]
    assert f"Process {1 - int(dying)} of 2 (counted from 0) has lost another one" in said
    again = shlex.split(said.partition(" by: torchrun ")[2])
    done = subprocess.run([*launch, *again[1:], "--no-report"], env=ENVIRONMENT, **how)
    assert done.returncode == 0, done.stderr
    assert len(record.read(tmp_path / "run" / "record.json").curves["test_loss"]) == 8


@needs_gloo
@pytest.mark.slow
def test_torchrun_trains_by_the_command(tmp_path: Path) -> None:
    """``torchrun -m halfbyte train`` writes one record, and only the first process speaks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "halfbyte"]
    words = ["train", "digits", "--recipe", "ibm2020", "--model", "mlp", "--size", "smoke", "--out", "run"]
    done = subprocess.run(
        [*command, *words], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Record: run/record.json") == 1
    assert record.read(tmp_path / "run" / "record.json").machine["world_size"] == 2


WRITES_TOLD = """
import sys
from pathlib import Path

from halfbyte import distributed
from halfbyte.cli import main
from halfbyte.lab import record

write = record.write


def told(done, path):
    with Path("writes.txt").open("a") as file:
        file.write(f"{distributed.rank()} {path}\\n")
    write(done, path)


record.write = told
sys.exit(main(sys.argv[1:]))
"""


def compared(folder: Path, start: list[str], recipes: str) -> subprocess.CompletedProcess[str]:
    """What two processes say of a comparison of small runs on the digits, started by torchrun in a folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["compare", "digits", "--recipes", recipes, "--seeds", "1", "--model", "mlp", "--size", "smoke"]
    done = subprocess.run(
        [*torchrun, *start, *words], env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done


@needs_gloo
@pytest.mark.slow
def test_torchrun_compares_by_the_command(tmp_path: Path) -> None:
    """Two processes share each run of a comparison and write its record once; a second call trains nothing."""
    (tmp_path / "told.py").write_text(WRITES_TOLD)
    records = [Path("runs") / f"digits-mlp-smoke-{name}-seed0" / "record.json" for name in ("fp32", "ibm2020")]
    written = []
    for start in (["told.py"], ["-m", "halfbyte"]):
        done = compared(tmp_path, start, "fp32,ibm2020")
        assert done.stdout.count("accuracy on the test data") == 1
        assert done.stdout.count("is done already; its record is used.") == (0 if start == ["told.py"] else 2)
        written.append([(path.stat().st_ino, path.read_bytes()) for path in map(tmp_path.joinpath, records)])
    assert (tmp_path / "writes.txt").read_text().splitlines() == [f"0 {path}" for path in records]
    assert written[0] == written[1]
    assert [record.read(tmp_path / path).machine["world_size"] for path in records] == [2, 2]


READS_LATE = """
import sys
import time

from halfbyte import distributed
from halfbyte.cli import main
from halfbyte.lab import checkpoint

content = checkpoint._content


def late(*given):
    time.sleep(3 * distributed.rank())
    return content(*given)


checkpoint._content = late
sys.exit(main(sys.argv[1:]))
"""


@needs_gloo
@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_when_all_have_read_it(tmp_path: Path) -> None:
    """A rank that finds the damage first does not take the file away from one that is about to open it."""
    (tmp_path / "late.py").write_text(READS_LATE)
    folder = tmp_path / "runs" / "digits-mlp-smoke-fp32-seed0"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"no checkpoint")
    compared(tmp_path, ["late.py"], "fp32")
    assert record.read(folder / "record.json").machine["world_size"] == 2


def test_a_strategy_without_company_is_refused() -> None:
    """One process alone cannot share its work, and a strategy that does not exist is named."""
    with pytest.raises(HalfbyteError, match=r"but this process trains alone.*Start several: torchrun"):
        train(**MLP, size="smoke", strategy="ddp")
    with pytest.raises(UnknownNameError, match=r"no strategy named 'fsdp'\. Did you mean 'fsdp2'"):
        train(**MLP, size="smoke", strategy="fsdp")


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process believe that it is one of several."""

    def become(rank: int, count: int) -> None:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "ranks", lambda: count)

    return become


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_shares_laid_end_to_end_are_the_batch(rows: int, count: int, as_rank: Any) -> None:
    """Each row is in one share, in its order; shares differ by one row at most; an empty one has a row of no weight."""
    batch = Batch((torch.arange(rows),), (torch.arange(rows) * 2,), rows)
    shares = []
    for rank in range(count):
        as_rank(rank, count)
        shares.append(ranks.share(batch))
    real = [one for one in shares if one.count]
    assert torch.cat([one.inputs[0] for one in real]).equal(batch.inputs[0])
    assert torch.cat([one.targets[0] for one in real]).equal(batch.targets[0])
    assert sum(one.count for one in shares) == rows
    assert max(one.count for one in shares) - min(one.count for one in shares) <= 1
    assert all(len(one.inputs[0]) >= 1 for one in shares)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_weighted_shares_have_the_mean_of_the_batch(count: int, as_rank: Any) -> None:
    """Where a loss is a mean over the symbols of sentences, long and short, shares weighted by theirs give its mean."""
    lengths = torch.tensor([5, 1, 2, 9])
    values = torch.randn(4, 9)
    there = torch.arange(9) < lengths.unsqueeze(1)
    batch = Batch((values,), (there, lengths), int(lengths.sum()))

    def loss(part: Batch) -> float:
        return float(part.inputs[0][part.targets[0]].mean())

    total = 0.0
    for rank in range(count):
        as_rank(rank, count)
        part = ranks.share(batch)
        total += loss(part) * part.count / batch.count
    assert total == pytest.approx(loss(batch), rel=1e-6)


def test_a_text_is_shared_by_readers(as_rank: Any) -> None:
    """Of a text that 3 readers read 4 symbols at a time, the first of two ranks has two readers and 8 symbols."""
    batch = Batch((torch.zeros(3, 4),), (torch.zeros(3, 4),), 12)
    for rank, count in ((0, 8), (1, 4)):
        as_rank(rank, 2)
        assert ranks.share(batch).count == count


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_what_is_carried_on_is_gathered_and_dealt(readers: int, as_rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent state of a whole batch, dealt to three ranks and gathered from them, is what it was."""
    carry = [torch.randn(2, readers, 3)]
    parts = []
    for rank in range(3):
        as_rank(rank, 3)
        monkeypatch.setattr(ranks, "_all", lambda mine: parts.append(mine) or [mine])
        ranks.gathered(ranks.dealt(carry), readers)
    monkeypatch.setattr(ranks, "_all", lambda _: parts)
    assert torch.equal(ranks.gathered(ranks.dealt(carry), readers)[0], carry[0])


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "[../gloo/pair.cc:510] Read error [::1]:4: reset by peer. This is typically caused by a GLHF",
            "reset by peer",
        ),
        ("The server socket has failed to listen. port: 29500, EADDRINUSE, address already in use", "already in use"),
    ],
)
def test_what_torch_says_is_kept_without_what_it_says_to_itself(
    said: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an error of an exchange the first line is told, but not the place in torch nor gloo's advice to its makers."""
    monkeypatch.setattr(ranks, "ranks", lambda: 2)
    with pytest.raises(ranks.LostRankError) as caught, ranks.noticing("Start it again."):
        raise dist.DistError(f"{said}\nException raised from ...")
    text = str(caught.value)
    assert text.endswith(f"{kept}). Start it again.")
    assert "pair.cc" not in text


def test_a_comparison_that_loses_a_process_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the processes only agree on what there is to do: the same command, with as many of them."""

    def lost(value: Any) -> Any:
        raise RuntimeError(f"gloo: connection closed by peer, {value}")

    monkeypatch.setattr(ranks, "ranks", lambda: 2)
    monkeypatch.setattr(ranks, "first", lost)
    with pytest.raises(ranks.LostRankError, match=r"The same command, with as many processes, goes on\.$"):
        compare("digits", ["fp32"], [0], model="mlp", out_dir=tmp_path)
