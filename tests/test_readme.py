"""Every command and every flag of the README exists, and the commands run."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from script import REPO, run_script

import dqn_atari
from dqn_atari import Args
from evaluate import RANDOM_AND_HUMAN, Options

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python ((?:dqn_atari|evaluate)\.py[^;&|:'\n`)]*)", README)


def flags(dataclass):
    return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(dataclass)}


def test_the_table_of_flags_holds_the_defaults():
    rows = re.findall(r"^\| `--([\w-]+)` \| `(.*?)` \|", README, re.M)
    assert len(rows) == 6
    fields = {field.name: field.default for field in dataclasses.fields(Args)}
    for flag, written in rows:
        default = fields[flag.replace("-", "_")]
        assert written == "off" if default is False else type(default)(written) == default


def test_it_is_short_enough_to_be_read():
    assert len(re.sub(r"^```.*?^```", "", README, flags=re.S | re.M).split()) <= 1300


def test_every_flag_that_is_mentioned_exists():
    other_programs = {"--delay", "--logdir", "--array", "--gres", "--mem", "--wrap"}
    known = flags(Args) | flags(Options) | other_programs | {"--help"}
    known |= {"--against-sb3", "--turns", "--steps", "--held"}  # tests/benchmark.py
    known |= {"--index-url"}  # pip
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


def test_everything_in_the_reading_guide_exists():
    guide = README.split("## How to read the file")[1].split("\n## ")[0]
    source = (REPO / "dqn_atari.py").read_text()
    names = re.findall(r"`([^`]+)`", guide.split("```")[2])
    assert len(names) > 12
    for name in names:
        assert name in source or name == "dqn_atari.py"


def test_files_that_are_mentioned_exist():
    for name in set(re.findall(r"\b(?:tests|results)/[\w./-]+\.\w+|LICENSE", README)):
        assert (REPO / name).exists(), name
    for name in set(re.findall(r"`(test_\w+\.py)`", README)):
        assert (REPO / "tests" / name).exists()


def test_the_scores_are_those_of_the_evaluations():
    """A row of the table per agent in results/, no other; the weights are those that played."""
    section = README.split("## Results")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row and "(results/" in row[0]}
    evaluations = sorted((REPO / "results").rglob("evaluation.json"))
    assert len(rows) == len(evaluations) > 0
    for path in evaluations:
        checkpoint = dqn_atari.load_checkpoint(path.parent / "model.pt")
        scores = {0.0: [], 0.05: []}
        for result in json.loads(path.read_text()):
            assert checkpoint["global_step"] == result["global_step"]
            assert result["env_id"] == "ALE/Breakout-v5"
            assert result["repeat_action_probability"] == 0.25 and result["capped"] == 0
            scores[result["epsilon"]] += [game["return"] for game in result["games"]]
        greedy, exploring = scores[0.0], scores[0.05]
        assert len(greedy) == 300 and len(exploring) == 100
        random, human = RANDOM_AND_HUMAN["Breakout"]
        assert [
            str(checkpoint["args"].seed),
            f"{checkpoint['global_step']:,}",
            f"{np.mean(greedy):.1f} ± {np.std(greedy):.1f}",
            f"{np.median(greedy):g}",
            f"{max(greedy):g}",
            f"{(np.mean(greedy) - random) / (human - random):.0%}",
            f"{np.mean(exploring):.1f} ± {np.std(exploring):.1f}",
        ] == next(rows[name] for name in rows if f"({path.parent.relative_to(REPO)})" in name)


def test_install_commands_are_those_of_the_repository():
    text = "\n".join(BLOCKS)
    assert "pip install -r requirements.txt && python dqn_atari.py --env-id ALE/Breakout-v5" in text
    assert "pip install -r requirements.txt && python -m pytest" in text
    assert "python -m pytest" in (REPO / ".ci/run").read_text()
    lines = (REPO / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[<>=]", line)[0] for line in lines if not line.startswith("#")}
    assert names == {
        "torch",
        "gymnasium",
        "ale-py",
        "numpy",
        "opencv-python",
        "tyro",
        "tensorboard",
        "pytest",
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with a run in it that left two models. One stands for that of the results, whose
    games are long (test_evaluate.py loads those)."""
    directory = tmp_path_factory.mktemp("readme")
    run(directory, ["dqn_atari.py", "--checkpoint-frequency", "32", *TINY])
    (model,) = directory.glob("runs/*/model_64.pt")
    agent = directory / "results/ALE-Breakout-v5"
    agent.mkdir(parents=True)
    (agent / "model.pt").symlink_to(model)
    return directory


TINY = ["--total-timesteps", "64", "--num-envs", "4", "--device", "cpu"]


def run(directory, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        code, _, error = run_script(*words)
        assert code == 0, error


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_run(directory, command):
    """The README's commands, made short: few steps, one episode, a run that is there."""
    for name, value in (
        ("{1}", "Breakout"),
        ("{2}", "1"),
        ("$SLURM_ARRAY_TASK_ID", "3"),
    ):
        command = command.replace(name, value)
    runs = sorted(path.parent for path in directory.glob("runs/*/model_64.pt"))
    command = command.replace("runs/<run>", str(runs[0])).replace("model_<step>", "model_64")
    words = [
        str(found)
        for word in shlex.split(command)
        for found in (sorted(Path(word).parent.glob(Path(word).name)) if "*" in word else [word])
    ]
    if words[0] == "dqn_atari.py":
        words += TINY[2:] + ["--total-timesteps", "96" if "--resume" in words else "64"]
    else:  # a window needs a screen; test_evaluate.py stands in for one
        words = [word for word in words if word != "--watch"] + ["--episodes", "1"]
    run(directory, words)


def test_names_that_others_rely_on():
    for name in (
        "Args",
        "PAPER",
        "Lives",
        "make_env",
        "make_vec_env",
        "ReplayBuffer",
        "QNetwork",
        "linear_schedule",
        "select_actions",
        "td_loss",
        "train",
    ):
        assert hasattr(dqn_atari, name)
