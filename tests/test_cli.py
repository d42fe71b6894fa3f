"""Bad input: exit code 2, one line that says what to do, no traceback, no run directory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent
TINY = ["--device", "cpu", "--total-timesteps", "64", "--num-envs", "4"]


def run(directory, script, *flags):
    return subprocess.run(
        [sys.executable, str(REPO / script), *flags],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a tiny run of Breakout, and that run's directory in it."""
    directory = tmp_path_factory.mktemp("trained")
    done = run(directory, "dqn_atari.py", *TINY)
    assert done.returncode == 0, done.stderr
    return directory, next((directory / "runs").iterdir())


def refused(result, *words):
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id ALE/Brekout-v5", ["--env-id", "ALE/Brekout-v5", "ALE/Breakout-v5"]),
        ("--env-id BreakoutNoFrameskip-v4", ["--env-id", "ALE/Breakout-v5"]),
        ("--env-id CartPole-v1", ["--env-id", "ALE/"]),
        ("--env-id Nowhere/Breakout-v5", ["--env-id", "ALE/Breakout-v5"]),
        ("--env-id ALE/Breakout-v6", ["--env-id", "ALE/Breakout-v5"]),
        ("--total-timesteps 0", ["--total-timesteps", "0", "at least 1"]),
        ("--num-envs -1", ["--num-envs", "-1", "at least 1"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--train-frequency 0", ["--train-frequency", "at least 1"]),
        ("--checkpoint-frequency 0", ["--checkpoint-frequency", "at least 1"]),
        ("--exploration-steps 0", ["--exploration-steps", "at least 1"]),
        ("--batch-size 2000000", ["--batch-size", "--buffer-size", "2000000"]),
        ("--buffer-size 5000", ["--buffer-size", "5000", "--learning-starts", "50080"]),
        ("--repeat-action-probability 1.5", ["--repeat-action-probability", "1.5", "0 to 1"]),
        ("--end-e -0.1", ["--end-e", "-0.1", "0 to 1"]),
        ("--gamma nan", ["--gamma", "nan", "0 to 1"]),
        ("--seed -3", ["--seed", "-3"]),
        ("--seed 18446744073709551616", ["--seed", "2**32 - 1"]),
        ("--checkpoint-frequency 16", ["--checkpoint-frequency", "16", "--num-envs"]),
        ("--total-timesteps 10000 --buffer-size 1079", ["--buffer-size", "1079", "1080"]),
        (
            "--buffer-size 900000000000 --total-timesteps 900000000000",
            ["--buffer-size", "cpu has memory for"],
        ),
        pytest.param(
            "--device cuda",
            ["--device", "cuda", "cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("--device toaster", ["--device", "toaster", "cpu"]),
        ("--resume nowhere", ["--resume", "nowhere/latest.pt", "FileNotFoundError"]),
    ],
)
def test_bad_training_input(tmp_path, flags, words):
    refused(run(tmp_path, "dqn_atari.py", *flags.split()), *words)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_flag_and_a_word_for_a_number_are_tyros_to_refuse(tmp_path):
    for flags in (["--epochs", "3"], ["--total-timesteps", "many"], ["--optimizer", "sgd"]):
        result = run(tmp_path, "dqn_atari.py", *flags)
        assert result.returncode == 2 and "Traceback" not in result.stderr


def test_bad_resumptions(trained):
    directory, run_dir = trained
    resume = ["--resume", str(run_dir)]
    refused(
        run(directory, "dqn_atari.py", *resume, "--env-id", "ALE/Pong-v5"),
        "--env-id",
        "ALE/Pong-v5",
        "ALE/Breakout-v5",
    )
    refused(
        run(directory, "dqn_atari.py", *resume, "--optimizer", "adam"), "--optimizer", "rmsprop"
    )
    refused(run(directory, "dqn_atari.py", *resume), "--total-timesteps", "64")
    assert len(list((directory / "runs").iterdir())) == 1


@pytest.mark.parametrize("script, flag", [("dqn_atari.py", "--resume"), ("evaluate.py", None)])
def test_bad_checkpoints(tmp_path, trained, script, flag):
    _, run_dir = trained
    good = (run_dir / "latest.pt").read_bytes()
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    for name, content in (
        ("cut", good[: len(good) // 2]),
        ("empty", b""),
        ("text", b"hello"),
        ("other", other.read_bytes()),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest.pt").write_bytes(content)
        words = [flag, name] if flag else [f"{name}/latest.pt"]
        refused(run(tmp_path, script, *words), f"{name}/latest.pt", "checkpoint")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_action_set(tmp_path, trained):
    _, run_dir = trained
    checkpoint = torch.load(run_dir / "model_64.pt", weights_only=True)
    checkpoint["args"]["env_id"] = "ALE/Pong-v5"
    torch.save(checkpoint, tmp_path / "model.pt")
    refused(run(tmp_path, "evaluate.py", "model.pt"), "model.pt", "6 actions", "ALE/Pong-v5")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["nothing.pt"], ["nothing.pt", "FileNotFoundError"]),
        ([], ["CHECKPOINT"]),
        (["MODEL", "--episodes", "0"], ["--episodes", "at least 1"]),
        (["MODEL", "--epsilon", "2"], ["--epsilon", "0 to 1"]),
        (["MODEL", "--repeat-action-probability", "-1"], ["--repeat-action-probability"]),
        (["MODEL", "--json", "no/where.json"], ["--json", "no/where.json"]),
        (["MODEL", "--video", "no/where.mp4"], ["--video", "no/where.mp4"]),
    ],
)
def test_bad_evaluation_input(tmp_path, trained, flags, words):
    _, run_dir = trained
    flags = [str(run_dir / "model_64.pt") if flag == "MODEL" else flag for flag in flags]
    refused(run(tmp_path, "evaluate.py", *flags), *words)
