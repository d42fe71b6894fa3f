"""Bad input: exit code 2, one line that says what to do, no traceback, no run directory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from catch import make_catch
from script import REPO, run_script
from small_network import SmallNetwork

import dqn_atari
import evaluate
from dqn_atari import PAPER, Args, QNetwork


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
        ("--buffer-size 0", ["--buffer-size", "from 20256 to"]),
        ("--target-network-frequency 0", ["--target-network-frequency", "from 1 to"]),
        ("--checkpoint-frequency 0", ["--checkpoint-frequency", "from 64 to"]),
        ("--exploration-steps 0", ["--exploration-steps", "from 1 to"]),
        ("--buffer-size 5000", ["--buffer-size", "5000", "from 20256 to"]),
        ("--repeat-action-probability 1.5", ["--repeat-action-probability", "1.5", "0 to 1"]),
        ("--end-e -0.1", ["--end-e", "-0.1", "0 to 1"]),
        ("--start-e 2", ["--start-e", "0 to 1"]),
        ("--learning-rate -1", ["--learning-rate", "0 to 1"]),
        ("--gamma nan", ["--gamma", "nan", "0 to 1"]),
        ("--seed -3", ["--seed", "-3"]),
        ("--seed 18446744073709551616", ["--seed", "2**32 - 1"]),
        ("--checkpoint-frequency 63", ["--checkpoint-frequency", "63", "from 64 to"]),
        ("--total-timesteps 10000 --buffer-size 1255", ["--buffer-size", "1255", "from 1256 to"]),
        (
            "--buffer-size 4000000000 --total-timesteps 4000000000",
            ["--buffer-size", "there is memory for"],
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
        result = subprocess.run(
            [sys.executable, REPO / script, *flags], capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert not Path("runs").exists()


def test_output_that_cannot_be_encoded_is_no_traceback():
    torch.save(checkpoint(), "model.pt")
    code, output, error = run_script("evaluate.py", "model.pt", "--episodes", "1", encoding="ascii")
    assert code == 0 and "mean ? std" in output, error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_and_errors_in_any_encoding(encoding):
    for script, flag in (("dqn_atari.py", "--paper"), ("evaluate.py", "--watch")):
        code, output, error = run_script(script, "--help", encoding=encoding)
        assert code == 0 and flag in output, error
    code, _, error = run_script("evaluate.py", "κ→.pt", encoding=encoding)
    assert code == 2 and len(error.splitlines()) == 1


def test_the_papers_flags_and_a_name_that_the_terminal_cannot_show():
    """--paper sets the defaults, --help shows them, and flags beside it win."""
    code, output, _ = run_script("dqn_atari.py", "--paper", "--help")
    assert code == 0 and "(default: rmsprop)" in output
    flags = "--paper --device cpu --total-timesteps 64 --num-envs 4 --end-e 0.2 --exp-name ü"
    code, output, error = run_script("dqn_atari.py", *flags.split(), encoding="ascii")
    assert code == 0 and "__?__" in output, error
    (latest,) = Path("runs").glob("*__ü__*/latest.pt")
    given = {"device": "cpu", "total_timesteps": 64, "num_envs": 4, "end_e": 0.2, "exp_name": "ü"}
    assert dqn_atari.load_checkpoint(latest)["args"] == dataclasses.replace(PAPER, **given)


@pytest.fixture
def trained(monkeypatch):
    """The directory of a tiny run."""
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    return train("--device cpu --total-timesteps 64 --num-envs 4 --save-replay")


def test_bad_resumptions(capsys, trained):
    for flags, words in (
        ("--env-id ALE/Pong-v5", ["--env-id", "ALE/Pong-v5", "ALE/Breakout-v5"]),
        ("--paper", ["--paper", "has False"]),
        ("--optimizer rmsprop", ["--optimizer", "rmsprop", "has adam"]),
        ("--num-envs 8", ["--num-envs", "has 4"]),
        ("--total-timesteps 64", ["--total-timesteps", "64", "done already"]),
    ):
        short = "--num-envs 4 --total-timesteps 128"  # ends soon, should it not be refused
        refused(capsys, words, train, f"--resume {trained} {short} {flags}")
    assert len(list(Path("runs").iterdir())) == 1


def test_no_directory_is_the_one_that_one_is_in(trained, monkeypatch):
    monkeypatch.chdir(trained)
    flags = ["--resume", "", "--num-envs", "4", "--total-timesteps", "128"]
    assert dqn_atari.train(tyro.cli(Args, args=flags)) == Path()
    assert Path("model_128.pt").exists() and not Path("runs").exists()


def checkpoint(**changes):
    """What a model_<step>.pt holds."""
    model = QNetwork(4).state_dict()
    saved = {"model": model, "args": dataclasses.asdict(Args()), "global_step": 100}
    return saved | changes


DAMAGED = {
    "no model": ({k: v for k, v in checkpoint().items() if k != "model"}, ["model"]),
    "no step": ({k: v for k, v in checkpoint().items() if k != "global_step"}, ["global_step"]),
    "step": (checkpoint(global_step="many"), ["many"]),
    "other": ({"weights": torch.zeros(3)}, ["args"]),
    "tensor": (torch.zeros(3), []),
    "model a list": (checkpoint(model=[1]), ["model.pt"]),
}


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


def test_flags_that_came_or_went_since_a_checkpoint_was_saved(trained):
    """A missing one takes its default, one that is unknown is passed over."""
    latest = torch.load(trained / "latest.pt", weights_only=True)
    assert "resume" not in latest["args"] and latest["args"]["num_envs"] == 4
    del latest["args"]["gamma"], latest["args"]["paper"]
    latest["args"] |= {"beta": 1, "batch_size": 16}
    torch.save(latest, trained / "latest.pt")
    args = dqn_atari.load_checkpoint(trained / "latest.pt")["args"]
    given = {"device": "cpu", "total_timesteps": 64, "num_envs": 4, "save_replay": True}
    assert args == Args(**given, batch_size=16)
    dqn_atari.train(dataclasses.replace(args, resume=str(trained), total_timesteps=128))
    assert (trained / "model_128.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_half_a_gigabyte_is_left_for_the_process(capsys, monkeypatch):
    monkeypatch.setattr(dqn_atari, "make_vec_env", make_catch)
    kilobytes = int(5e8 + 500.5 * 7063) // 1024
    text = f"MemTotal: 9 kB\nMemFree: 9 kB\nMemAvailable: {kilobytes} kB\nBuffers: 9 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    flags = "--device cpu --total-timesteps 600 --num-envs 4 --train-frequency 500 --buffer-size"
    refused(capsys, ["--buffer-size 501", "memory for 500"], train, f"{flags} 501")
    assert not Path("runs").exists()
    train(f"{flags} 500")


def test_a_checkpoint_of_another_action_set_or_network_or_with_values_that_do_not_exist(capsys):
    torch.save(checkpoint(args=dataclasses.asdict(Args(env_id="ALE/Pong-v5"))), "pong.pt")
    torch.save(checkpoint(model=SmallNetwork(4).state_dict()), "small.pt")
    torch.save(checkpoint(args=dataclasses.asdict(Args(env_id="ALE/Gone-v5"))), "gone.pt")
    torch.save(checkpoint(args=dataclasses.asdict(Args(gamma=5.0))), "gamma.pt")
    sticky = dataclasses.asdict(Args(repeat_action_probability="x"))
    torch.save(checkpoint(args=sticky), "sticky.pt")
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
        ({"episodes": -1}, ["--episodes", "-1", "from 0 to"]),
        ({"epsilon": 2.0}, ["--epsilon", "0 to 1"]),
        ({"repeat_action_probability": -1.0}, ["--repeat-action-probability"]),
        ({"json": "no/where.json"}, ["--json", "no/where.json"]),
        ({"json": "."}, ["--json", "."]),
        ({"video": "no/where.mp4"}, ["--video", "no/where.mp4"]),
        ({"video": "game.avi"}, ["--video", "game.avi", ".webm"]),
        ({"seed": -1}, ["--seed", "-1"]),
        ({"seed": 2**32}, ["--seed", "from 0 to 4294967295"]),
    ],
)
def test_bad_evaluation_input(capsys, flags, words):
    torch.save(checkpoint(), "model.pt")
    options = evaluate.Options(**{"checkpoints": ("model.pt",)} | flags)
    assert "game 1" not in refused(capsys, words, evaluate.main, options)
