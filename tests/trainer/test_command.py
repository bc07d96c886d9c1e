"""The command line: bad input is one line and exit code 2; a small run on two Gloo ranks leaves all its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ringattn.errors import CheckpointError, TransportError
from ringattn.profile import Profile
from ringattn.trainer.config import Config, run_command
from ringattn.trainer.meter import Cost
from ringattn.trainer.model import Decoder
from ringattn.trainer.recorder import Recorder
from ringattn.trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
MODEL = ("--layers", "1", "--width", "16", "--heads", "2", "--kv-heads", "1")

BAD = {
    "--length 0": "--length",
    "--length many": "--length",
    "--data nowhere": "no file or folder nowhere",
    "--layout zigzig": "zigzig",
    "--schedule rign": "rign",
    "--kernel magic": "magic",
    "--optimizer adam": "adam",
    "--positions local": "local",
    "--dtype float8": "float8",
    "--heads 4 --kv-heads 3": "--kv-heads 3 does not divide --heads 4",
    "--heads 5 --kv-heads 5": "--heads 5",
    "--width 12 --heads 4": "--width 12",
    "--steps 0": "--steps 0",
    "--steps -1": "--steps",
    "--lr 0": "--lr",
    "--ranks 0": "--ranks",
    "--ranks 4 --replicas 3": "--replicas 3",
    "--ranks 4 --ulysses 3": "--ulysses 3 does not divide the 4 ranks",
    "--ranks 8 --replicas 2 --batch 2 --ulysses 8": "--ulysses 8 does not divide the 4 ranks",
    "--schedule route(lookahed=1)": "lookahed",
    "--replicas 2": "--batch 1",
    "--check 1 --dtype bfloat16": "--check",
    "--lenght 5": "--lenght",
    "surplus": "surplus",
    "--wrap zero": "--wrap",
    "--wrap ddp --ranks 1": "for several ranks",
    "--zero 4": "--zero",
    "--save-every 5": "--folder",
    "--save-every -1": "--save-every",
    "--resume auto": "--folder",
    "--resume nowhere": "no checkpoint at nowhere",
    "--resume auto --folder x --overwrite": "--overwrite begins anew",
    "--sample x": "--folder",
    "--sample x --folder nowhere": "nowhere",
}


@pytest.mark.parametrize(("line", "says"), BAD.items())
def test_bad_input_is_one_line_and_exit_code_2(
    trainer: ModuleType, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(trainer.main, line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and says in err and "Traceback" not in err


@pytest.mark.parametrize("rank", ["0", "3"])
def test_every_rank_of_a_launcher_refuses_before_it_connects(
    trainer: ModuleType, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, text)
    assert run_command(trainer.main, ["--data", "nowhere"]) == 2
    assert run_command(trainer.main, ["--ranks", "2"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [f"rank {rank}"] * 2


def test_a_run_is_not_replaced_unasked(
    trainer: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    line = ["--ranks", "1", "--data", str(texts), "--length", "32", "--steps", "1", *MODEL, "--folder", str(folder)]
    assert run_command(trainer.main, line) == 0
    before = (folder / "metrics.jsonl").read_text()
    assert run_command(trainer.main, line) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_text() == before
    assert run_command(trainer.main, [*line, "--overwrite"]) == 0
    assert (folder / "metrics.jsonl").read_text() != before


def test_a_folder_that_cannot_be_made(trainer: ModuleType, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(trainer.main, ["--folder", str(texts / "long.txt" / "run")]) == 2
    assert "no folder that can be written to" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    trainer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert run_command(trainer.main, []) == 2
    assert "pip install 'ringattn[train]'" in capsys.readouterr().err


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`ringattn train ARGUMENTS`, as a shell would start it."""
    start = "from ringattn.cli.train import PASS_ON, train; import typer; app = typer.Typer(); "
    start += "app.callback()(lambda: None); app.command('train', context_settings=PASS_ON)(train); app()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", start, "train", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_replicas_of_two_axes_train_like_one_rank(
    trainer: ModuleType, texts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two sequences a step, one on each of two replicas of two ranks: gradients are summed over the world."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = ["--data", str(texts), "--length", "40", "--steps", "0", "--check", "2", *MODEL]
    code = run_command(trainer.main, [*line, *["--ranks", "4", "--replicas", "2", "--ulysses", "2", "--batch", "2"]])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "on 4 ranks and on 1 are equal" in out


def test_bad_input_ends_the_command_with_2() -> None:
    done = command("--length", "0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--length" in done.stderr


def test_two_ranks_train_check_and_sample(
    trainer: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--data", str(texts), "--length", "101", "--steps", "4", "--eval-every", "2", *MODEL]
    done = command(*options, "--ranks", "2", "--folder", str(folder), "--check", "2")
    assert done.returncode == 0, done.stderr
    assert "2 SGD steps of 101 tokens on 2 ranks and on 1 are equal" in " ".join(done.stdout.split())

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 2, 4]
    assert all(line["sent_bytes"] > 0 and 0 <= line["waited"] <= 1 for line in lines if "loss" in line)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["length"] == 101
    weights = load_file(folder / "model.safetensors")
    Decoder(Config(layers=1, width=16, heads=2, kv_heads=1).shape, seed=0).load_state_dict(weights)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "loss.png", "model.safetensors",
    }  # fmt: skip

    sampling = ["--sample", "abc", "--folder", str(folder), "--sample-bytes", "9"]
    assert run_command(trainer.main, sampling) == run_command(trainer.main, sampling) == 0
    text = capsys.readouterr().out
    assert text.startswith("abc") and text[: len(text) // 2] * 2 == text


def test_a_stopped_run_ends_in_one_line(texts: Path, tmp_path: Path) -> None:
    line = ["--ranks", "2", "--data", str(texts), "--length", "32", "--steps", "100000", *MODEL]
    with subprocess.Popen(
        [sys.executable, "-m", "ringattn.cli", "train", *line, "--folder", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if "held-out loss" in text:
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "stopped\n"


def measured(folder: Path) -> list[tuple[float, ...]]:
    """Steps and what was computed in them, not what it cost."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "gradient_norm", "learning_rate", "held_out_loss")
    return [tuple(line[name] for name in names if name in line) for line in lines]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(trainer: ModuleType, texts: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    line = ["--ranks", "1", "--data", str(texts), "--length", "40", "--steps", "6", "--eval-every", "3", *MODEL]
    line += ["--save-every", "2"]
    assert (
        run_command(trainer.main, [*line, "--folder", str(whole), "--resume", "auto"]) == 0
    )  # there is none: it begins
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    expected = measured(whole)
    shutil.rmtree(whole / "checkpoints" / "step-00000006")
    with (whole / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "loss"')  # as the run was killed
    assert run_command(trainer.main, [*line, "--folder", str(whole), "--resume", "auto"]) == 0
    assert measured(whole) == expected
    shutil.rmtree(whole / "checkpoints" / "step-00000006")
    assert run_command(trainer.main, [*line, "--folder", str(parts), "--resume", str(whole)]) == 0
    assert measured(parts) == [each for each in expected if each[0] > 4]
    weights = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    first, second = weights
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_model_is_one_line(
    trainer: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--ranks", "1", "--data", str(texts), "--length", "40", "--steps", "1", *MODEL, "--save-every", "1"]
    assert run_command(trainer.main, [*line, "--folder", str(tmp_path / "run")]) == 0
    other = [*line, "--width", "8", "--folder", str(tmp_path / "other"), "--resume", str(tmp_path / "run")]
    capsys.readouterr()
    assert run_command(trainer.main, other) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "is of another model" in err


def test_a_killed_run_goes_on_as_if_nothing_had_been(trainer: ModuleType, texts: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    line = ["--ranks", "1", "--data", str(texts), "--length", "41", "--steps", "40", *MODEL]
    line += ["--save-every", "2", "--resume", "auto", "--folder"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # as here: the same bits
    with subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), *line, str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
    ) as process:
        while not (killed / "checkpoints" / "step-00000004").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert len(measured(killed)) < 40
    for folder in (killed, whole):
        assert run_command(trainer.main, [*line, str(folder)]) == 0
    assert measured(killed) == measured(whole)


def test_where_there_is_no_bar_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ringattn.trainer.recorder.QUIET", 5.0)
    now = [0.0]
    monkeypatch.setattr("ringattn.trainer.recorder.time.monotonic", lambda: now[0])
    recorder = Recorder(RunFolder(tmp_path / "run", {}), 20)
    for step in range(1, 21):
        now[0] += 1
        recorder.step(step, 100, Cost(1.0, 10, 0.5, 1000), loss=1.0, gradient_norm=1.0, learning_rate=1.0)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["step", "6"],
        ["step", "12"],
        ["step", "18"],
    ]


def test_a_profile_is_read_or_refused_in_one_line(
    trainer: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.profile"
    line = ["--ranks", "1", "--data", str(texts), "--length", "40", "--steps", "0", "--check", "1", *MODEL]
    assert run_command(trainer.main, [*line, "--profile", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: The profile {path} cannot be read: No such file or directory.")
    Profile("local", np.zeros((1, 1)), np.zeros((1, 1)), ()).write(path)
    assert run_command(trainer.main, [*line, "--profile", str(path)]) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransportError("Rank 0 of 2 lost rank 1 in the loss."), 1),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore"), 1),
        (torch.distributed.DistBackendError("NCCL watchdog"), 1),
        (CheckpointError("runs/x could not be written."), 2),
    ],
)
def test_what_ends_a_run_under_way_is_one_line(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def run(_: Config, __: Sequence[str]) -> int:
        raise error

    assert run_command(run, ["--ranks", "1", "--data", str(texts), "--length", "40", *MODEL]) == code
    _, said = capsys.readouterr()
    assert said.count("\n") == 1 and said.startswith("error: ")


def test_what_nobody_expects_shows_where_it_was(texts: Path) -> None:
    def run(_: Config, __: Sequence[str]) -> int:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_command(run, ["--ranks", "1", "--data", str(texts), "--length", "40", *MODEL])
