"""Bad input: exit code 2, one line that says what to do, no traceback, no run directory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from catch import make_catch
from small_network import SmallNetwork

import dqn_atari
import evaluate
from dqn_atari import Args, QNetwork

REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(script, *flags):
    """As a user does; importing torch takes seconds, so most cases are tried in process."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *flags], capture_output=True, text=True, timeout=120
    )


def refused(capsys, words, function, *args):
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    output, error = capsys.readouterr()
    assert stopped.value.code == 2
    (line,) = error.splitlines()
    for word in words:
        assert word in line
    return output


def train(flags):
    return dqn_atari.train(tyro.cli(Args, args=flags.split()))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id ALE/Brekout-v5", ["--env-id", "ALE/Brekout-v5", "ALE/Breakout-v5"]),
        ("--env-id BreakoutNoFrameskip-v4", ["--env-id", "ALE/Breakout-v5"]),
        ("--env-id CartPole-v1", ["--env-id", "ALE/"]),
        ("--env-id Nowhere/Breakout-v5", ["--env-id", "ALE/Breakout-v5"]),
        ("--env-id ALE/Breakout-v6", ["--env-id", "ALE/Breakout-v5"]),
        ("--total-timesteps 0", ["--total-timesteps", "0", "from 1 to"]),
        ("--num-envs -1", ["--num-envs", "-1", "from 1 to"]),
        ("--batch-size 0", ["--batch-size", "from 1 to"]),
        ("--train-frequency 0", ["--train-frequency", "from 1 to"]),
        ("--learning-starts 0", ["--learning-starts", "from 1 to"]),
        ("--buffer-size 0", ["--buffer-size", "from 50080 to"]),
        ("--target-network-frequency 0", ["--target-network-frequency", "from 1 to"]),
        ("--checkpoint-frequency 0", ["--checkpoint-frequency", "from 64 to"]),
        ("--exploration-steps 0", ["--exploration-steps", "from 1 to"]),
        ("--buffer-size 5000", ["--buffer-size", "5000", "from 50080 to"]),
        ("--repeat-action-probability 1.5", ["--repeat-action-probability", "1.5", "0 to 1"]),
        ("--end-e -0.1", ["--end-e", "-0.1", "0 to 1"]),
        ("--start-e 2", ["--start-e", "0 to 1"]),
        ("--learning-rate -1", ["--learning-rate", "0 to 1"]),
        ("--gamma nan", ["--gamma", "nan", "0 to 1"]),
        ("--seed -3", ["--seed", "-3"]),
        ("--seed 18446744073709551616", ["--seed", "2**32 - 1"]),
        ("--checkpoint-frequency 63", ["--checkpoint-frequency", "63", "from 64 to"]),
        ("--total-timesteps 10000 --buffer-size 1079", ["--buffer-size", "1079", "from 1080 to"]),
        (
            "--buffer-size 4000000000 --total-timesteps 4000000000",
            ["--buffer-size", "cpu has memory for"],
        ),
        pytest.param(
            "--device cuda",
            ["--device", "cuda", "best here is cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("--device toaster", ["--device", "toaster", "cpu"]),
        ("--resume nowhere", ["nowhere/latest.pt", "FileNotFoundError"]),
    ],
)
def test_bad_training_input(capsys, flags, words):
    assert refused(capsys, words, train, flags) == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", ["--epochs 3", "--total-timesteps many", "--optimizer sgd"])
def test_an_unknown_flag_and_a_word_for_a_number_are_tyros_to_refuse(flags):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Args, args=flags.split())
    assert stopped.value.code == 2


def test_the_scripts_refuse_as_the_functions_do():
    for script, *flags in (
        ("dqn_atari.py", "--env-id", "ALE/Brekout-v5"),
        ("dqn_atari.py", "--resume", ""),
        ("evaluate.py", "nothing.pt"),
    ):
        result = run(script, *flags)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert not Path("runs").exists()


def test_output_that_cannot_be_encoded_is_no_traceback(monkeypatch):
    torch.save(checkpoint(), "model.pt")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run("evaluate.py", "model.pt", "--episodes", "1")
    assert result.returncode == 0 and "mean ? std" in result.stdout, result.stderr


@pytest.fixture
def trained(monkeypatch):
    """The directory of a tiny run."""
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    return train("--device cpu --total-timesteps 64 --num-envs 4 --save-replay")


def test_bad_resumptions(capsys, trained):
    for flags, words in (
        ("--env-id ALE/Pong-v5", ["--env-id", "ALE/Pong-v5", "ALE/Breakout-v5"]),
        ("--optimizer adam", ["--optimizer", "rmsprop"]),
        ("--num-envs 8", ["--num-envs", "has 4"]),
        ("--num-envs 4 --total-timesteps 64", ["--total-timesteps", "64", "done already"]),
    ):
        if "--num-envs" not in flags:
            flags += " --num-envs 4"
        refused(capsys, words, train, f"--resume {trained} {flags}")
    assert len(list(Path("runs").iterdir())) == 1


def checkpoint(**changes):
    """What a model_<step>.pt holds."""
    model = QNetwork(4).state_dict()
    saved = {"model": model, "args": dataclasses.asdict(Args()), "global_step": 100}
    return saved | changes


WITHOUT_GAMMA = {k: v for k, v in dataclasses.asdict(Args()).items() if k != "gamma"}
DAMAGED = {
    "nan": (checkpoint(), ["not finite"]),
    "no model": ({k: v for k, v in checkpoint().items() if k != "model"}, ["model"]),
    "no step": ({k: v for k, v in checkpoint().items() if k != "global_step"}, ["global_step"]),
    "step": (checkpoint(global_step="many"), ["many"]),
    "missing arg": (checkpoint(args=WITHOUT_GAMMA), ["without", "gamma"]),
    "unknown arg": (
        checkpoint(args=dataclasses.asdict(Args()) | {"beta": 1}),
        ["unexpected", "beta"],
    ),
    "other": ({"weights": torch.zeros(3)}, ["args"]),
    "tensor": (torch.zeros(3), []),
    "model a list": (checkpoint(model=[1]), ["model.pt"]),
}
DAMAGED["nan"][0]["model"]["network.9.bias"][0] = torch.nan


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints(capsys, name):
    damaged, words = DAMAGED[name]
    torch.save(damaged, "model.pt")
    options = evaluate.Options(("model.pt",))
    refused(capsys, ["model.pt", "checkpoint", *words], evaluate.main, options)


def test_cut_and_foreign_files(capsys, trained):
    good = (trained / "latest.pt").read_bytes()
    for content in (good[: len(good) // 2], b"", b"hello"):
        (trained / "latest.pt").write_bytes(content)
        refused(capsys, ["latest.pt", "checkpoint"], train, f"--resume {trained}")
        options = evaluate.Options((str(trained / "latest.pt"),))
        refused(capsys, ["latest.pt", "checkpoint"], evaluate.main, options)


def test_what_evaluates_but_does_not_resume(capsys, trained):
    """A model is no latest.pt, and neither is that of an older version, which named the target
    network otherwise, had another RMSprop and stored where games began."""
    latest = torch.load(trained / "latest.pt", weights_only=True)
    older = latest | {"target_network": latest["target"]}
    del older["target"]
    torch.save(older, trained / "latest.pt")
    words = ["of this version", "without", "target"]
    refused(capsys, words, train, f"--resume {trained}")
    dqn_atari.load_checkpoint(trained / "latest.pt")


def test_a_checkpoint_of_another_action_set_or_network_or_with_values_that_do_not_exist(capsys):
    torch.save(checkpoint(args=dataclasses.asdict(Args(env_id="ALE/Pong-v5"))), "pong.pt")
    torch.save(checkpoint(model=SmallNetwork(4).state_dict()), "small.pt")
    torch.save(checkpoint(args=dataclasses.asdict(Args(env_id="ALE/Gone-v5"))), "gone.pt")
    torch.save(checkpoint(args=dataclasses.asdict(Args(gamma=5.0))), "gamma.pt")
    torch.save(checkpoint(args=dataclasses.asdict(Args(repeat_action_probability="x"))), "sticky.pt")
    for path, word in (
        ("pong.pt", "ALE/Pong-v5"),
        ("small.pt", "network"),
        ("gone.pt", "Gone"),
        ("gamma.pt", "gamma is not from 0 to 1"),
        ("sticky.pt", "TypeError"),
    ):
        refused(capsys, [path, word], evaluate.main, evaluate.Options((path,)))


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"checkpoints": ("nothing.pt",)}, ["nothing.pt", "FileNotFoundError"]),
        ({"checkpoints": ()}, ["CHECKPOINT"]),
        ({"episodes": 0}, ["--episodes", "at least 1"]),
        ({"epsilon": 2.0}, ["--epsilon", "0 to 1"]),
        ({"repeat_action_probability": -1.0}, ["--repeat-action-probability"]),
        ({"json": "no/where.json"}, ["--json", "no/where.json"]),
        ({"json": "."}, ["--json", "."]),
        ({"video": "no/where.mp4"}, ["--video", "no/where.mp4"]),
        ({"video": "game.avi"}, ["--video", "game.avi", ".webm"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"seed": 2**31 - 1}, ["--seed", "2**31 - 17"]),
        ({"seed": 2**32}, ["--seed", "2**31 - 17"]),
    ],
)
def test_bad_evaluation_input(capsys, flags, words):
    torch.save(checkpoint(), "model.pt")
    options = evaluate.Options(**{"checkpoints": ("model.pt",)} | flags)
    assert "game 1" not in refused(capsys, words, evaluate.main, options)
