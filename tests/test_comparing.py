"""The comparison bench by its command, on tiny teachers."""

import fcntl
import json
import pathlib
import runpy
import subprocess
import sys
from typing import Any

import pytest
from command import DIGITS, MIXTURE, command, write_config

from boot_jax import interruption, validation
from boot_jax.comparing import budget, methods
from boot_jax.config import ConfigError, default_config, differences
from boot_jax.run import Run
from boot_jax.sharding import create_mesh
from boot_jax.training import logs

TINY = (
    "--mode=compare",
    "--config.teacher.training.num_steps=10",
    "--config.distill.num_steps=10",
    "--config.distill.warmup_steps=2",
    "--config.run.checkpoint_every=10",
    "--config.run.tensorboard=False",
    "--config.run.steps_per_dispatch=5",
    "--config.evaluation.num_images=32",
    "--config.evaluation.num_real=64",
    "--config.evaluation.ode_steps=3",
    "--config.evaluation.error_times=1",
    "--config.evaluation.error_images=8",
    "--config.evaluation.ddim_steps=(1,2)",
)
# Flags of tuples add up, so these are apart.
ALL = ("--config.compare.kinds=ddim,continuous",)
ALL += ("--config.compare.amounts=1,2", "--config.compare.seeds=0,1")
VARIANTS = """
    config.compare.variants = {
        "ddim": ("objective.kind=boot", "objective.solver=ddim"),
        "diverges": ("distill.learning_rate=1e38", "distill.warmup_steps=0"),
    }
    return config
"""


def with_variants(text: str) -> str:
    return text.replace("    return config\n", VARIANTS.lstrip("\n"))


def compared(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "comparison.json").read_text())


def results_of(workdir: pathlib.Path) -> dict[str, int]:
    """When each cell was finished."""
    cells = workdir / "cells"
    return {
        str(path.parent.relative_to(cells)): path.stat().st_mtime_ns
        for path in cells.rglob("cell.json")
    }


def events_of(cell: pathlib.Path, name: str) -> list[dict]:
    lines = (cell / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two methods, amounts and seeds on the digits; stopped once, and gone on."""
    folder = tmp_path_factory.mktemp("digits")
    workdir = folder / "run"
    flags = (
        write_config(folder, with_variants(DIGITS)),
        f"--workdir={workdir}",
        *TINY,
        "--config.compare.budget=steps",
    )
    with pytest.MonkeyPatch.context() as patch:
        polls = []

        def poll(self):
            polls.append(None)
            # The teacher's 2, the first cell's 2, and the first of the second cell.
            return len(polls) == 5

        patch.setattr(interruption.Interruption, "poll", poll)
        assert command(*flags, *ALL) == interruption.EXIT_PREEMPTED
    finished = results_of(workdir)
    assert list(finished) == ["ddim/steps_1/0"]
    stopped = workdir / "cells" / "continuous" / "steps_1" / "0"
    assert [row["step"] for row in logs.read_metrics(stopped)] == [5]
    assert command(*flags, *ALL) == 0
    again = results_of(workdir)
    assert again["ddim/steps_1/0"] == finished["ddim/steps_1/0"]
    assert [event["step"] for event in events_of(stopped, "start")] == [0, 5]
    return flags, workdir


def test_every_cell_is_there_with_its_costs(digits):
    _, workdir = digits
    found = compared(workdir)
    assert found["budget"] == {"by": "steps", "amounts": [1, 2]}
    places = [(c["seed"], c["amount"], c["method"]) for c in found["cells"]]
    assert places == [
        (seed, amount, method)
        for seed in (0, 1)
        for amount in (1, 2)
        for method in ("ddim", "continuous")
    ]
    for cell in found["cells"]:
        steps = 10 * cell["amount"]
        per_step = {"ddim": (1, 2), "continuous": (1, 2)}[cell["method"]]
        assert cell["steps"] == steps
        assert cell["calls"] == {
            "teacher": 16 * steps * per_step[0],
            "student": 16 * steps * per_step[1],
            "images": 0,
            "auxiliary": 0,
        }
        assert cell["failed"] is None and cell["needs_data"] is False
        assert cell["seconds"] > 0 and cell["memory"]["bytes"] > 100_000
        assert cell["scores"]["frechet_distance"] > 0
        assert set(cell["scores"]["intervals"]) >= {"frechet_distance", "recall"}
    assert found["cells"][0]["settings"] == [
        "objective.kind=boot",
        "objective.solver=ddim",
    ]
    distances = [cell["scores"]["frechet_distance"] for cell in found["cells"]]
    assert len(set(distances)) == 8
    assert set(found["teacher"]["ddim"]) == {"1", "2"}
    assert "digits" in found["data"] and found["distance_name"] == "Fréchet distance"


def test_methods_are_means_over_seeds(digits):
    found = compared(digits[1])
    assert [(m["method"], m["amount"]) for m in found["methods"]] == [
        ("ddim", 1),
        ("continuous", 1),
        ("ddim", 2),
        ("continuous", 2),
    ]
    for method in found["methods"]:
        figure = method["figures"]["frechet_distance"]
        per_seed = [
            cell["scores"]["frechet_distance"]
            for cell in found["cells"]
            if (cell["method"], cell["amount"]) == (method["method"], method["amount"])
        ]
        assert figure["per_seed"] == per_seed
        assert figure["mean"] == pytest.approx(sum(per_seed) / 2)
        assert method["num_seeds"] == 2 and method["failed"] == 0


def test_it_leaves_a_table_a_plot_and_a_grid(digits):
    workdir = digits[1]
    table = (workdir / "comparison.md").read_text()
    assert "| ddim | 1 |" in table and "| teacher, 2 DDIM steps |" in table
    for name in ("comparison.png", "samples/comparison.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_comparison_only_collects(digits, capsys, monkeypatch):
    flags, workdir = digits
    before = results_of(workdir), compared(workdir)

    def no_logger(*args, **kwargs):
        raise AssertionError("something was trained")

    monkeypatch.setattr(logs.Logger, "__init__", no_logger)
    assert command(*flags, *ALL) == 0
    assert (results_of(workdir), compared(workdir)) == before
    # A part of it: only that is told.
    assert command(*flags, "--config.compare.kinds=ddim", *ALL[1:]) == 0
    assert {cell["method"] for cell in compared(workdir)["cells"]} == {"ddim"}
    assert f"comparison: {workdir / 'comparison.html'}" in capsys.readouterr().out


def test_a_cell_is_scored_as_by_evaluate(digits):
    flags, workdir = digits
    cell = workdir / "cells" / "ddim" / "steps_2" / "1"
    evaluation = [flag for flag in flags if "evaluation" in flag or "run." in flag]
    assert (
        command(
            flags[0],
            f"--workdir={cell}",
            "--mode=evaluate",
            *evaluation,
            "--config.seed=1",
            "--config.teacher.source=checkpoint",
            f"--config.teacher.path={workdir / 'teacher'}",
            "--config.teacher.training.num_steps=10",
            "--config.objective.kind=boot",
            "--config.objective.solver=ddim",
            "--config.distill.num_steps=20",
            "--config.distill.warmup_steps=2",
        )
        == 0
    )
    alone = json.loads((cell / "results.json").read_text())
    found = json.loads((cell / "cell.json").read_text())["scores"]
    equivalent = found.pop("ddim_equivalent_steps")
    assert equivalent == alone["ddim_equivalent_steps"]
    for scores in (alone["student"], found):
        assert scores.pop("seconds_per_image") > 0
    assert found == alone["student"]


@pytest.mark.slow
def test_other_figures_are_taken_without_training(digits, monkeypatch):
    flags, workdir = digits
    monkeypatch.setattr(logs.Logger, "__init__", None)
    one = ("--config.compare.kinds=ddim", "--config.compare.seeds=0,")
    one += ("--config.compare.amounts=1,", "--config.evaluation.num_images=24")
    old = (workdir / "cells" / "ddim" / "steps_1" / "0" / "cell.json").read_text()
    assert command(*flags, *one) == 0
    found = compared(workdir)
    assert found["num_images"] == 24
    before = json.loads(old)["scores"]["frechet_distance"]
    assert found["cells"][0]["scores"]["frechet_distance"] != before


def test_a_changed_cell_is_refused_before_anything_is_run(digits, capsys):
    flags, workdir = digits
    before = results_of(workdir)
    longer = "--config.distill.num_steps=15"
    line = refusal(capsys, *flags, *ALL, longer)
    assert "cells/ddim/steps_1/0 was run with another config" in line
    assert "distill.num_steps: 10 -> 15" in line and "move it away" in line
    assert results_of(workdir) == before


@pytest.fixture
def mixture(tmp_path):
    """A comparison whose teacher is exact; no method is named yet."""
    config = write_config(tmp_path, with_variants(MIXTURE))
    workdir = tmp_path / "run"
    return (config, f"--workdir={workdir}", *TINY, "--config.compare.seeds=0,"), workdir


def test_a_cell_that_diverges_is_a_row_of_its_own(mixture):
    flags, workdir = mixture
    flags = (*flags, "--config.compare.kinds=diverges,continuous")
    assert command(*flags) == 0
    lost, sound = compared(workdir)["cells"]
    assert lost["method"] == "diverges" and lost["scores"] == {}
    assert lost["failed"].startswith("step ") and "nan" in lost["failed"]
    assert sound["failed"] is None
    table = (workdir / "comparison.md").read_text()
    assert "| diverges (1 of 1 failed) | – |" in table
    assert f"Failed: diverges, 1, seed 0: {lost['failed']}" in table
    # Nor is it tried again.
    before = results_of(workdir)
    assert command(*flags) == 0
    assert results_of(workdir) == before


def test_a_cell_of_another_process_is_left_to_it(mixture):
    flags, workdir = mixture
    assert command(*flags, "--config.compare.kinds=continuous") == 0
    done = results_of(workdir)
    both = "--config.compare.kinds=ddim,continuous"
    lock = workdir / "cells" / "ddim" / "calls_1" / "0.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert command(*flags, both) == 0
    found = compared(workdir)
    assert [cell["method"] for cell in found["cells"]] == ["continuous"]
    assert "1 of 2 cells are being run by other processes" in found["warnings"][-1]
    assert command(*flags, both) == 0
    assert [cell["method"] for cell in compared(workdir)["cells"]] == [
        "ddim",
        "continuous",
    ]
    again = results_of(workdir)
    assert {name: again[name] for name in done} == done


def test_two_processes_share_the_cells(mixture):
    flags, workdir = mixture
    flags = (*flags, "--config.compare.kinds=ddim,continuous")
    program = [sys.executable, "-m", "boot_jax.main", *flags]
    both = [
        subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    cells = [workdir / "cells" / name for name in results_of(workdir)]
    assert len(cells) == 2
    # Each was run by one of them, once.
    assert [len(events_of(cell, "start")) for cell in cells] == [1, 1]
    assert command(*flags) == 0
    assert len(compared(workdir)["cells"]) == 2


@pytest.mark.slow
def test_seconds_are_timed_once_and_kept(mixture):
    flags, workdir = mixture
    flags = (*flags, "--config.compare.kinds=ddim", "--config.compare.budget=seconds")
    flags += ("--config.compare.amounts=0.3,",)
    assert command(*flags) == 0
    of_method = workdir / "cells" / "ddim"
    kept = json.loads((of_method / "timing.json").read_text())
    (cell,) = compared(workdir)["cells"]
    assert cell["steps"] == pytest.approx(
        0.3 / kept["seconds_per_step"], rel=0.02, abs=1
    )
    assert not (of_method / "timing").exists()
    # Whatever the machine is like now, its number of steps stays.
    kept["seconds_per_step"] /= 3
    (of_method / "timing.json").write_text(json.dumps(kept))
    before = results_of(workdir)
    assert command(*flags) == 0
    assert results_of(workdir) == before
    assert compared(workdir)["cells"][0]["steps"] == cell["steps"]


def test_a_misspelt_method_is_one_line(mixture, capsys):
    line = refusal(capsys, *mixture[0], "--config.compare.kinds=ddin")
    assert "compare.kinds is 'ddin', but must be one of boot, " in line
    assert line.endswith("; did you mean 'ddim'?") and " diverges," in line


def configured(**compare):
    config = default_config()
    config.compare.update(compare)
    return config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "hours"}, "compare.budget is 'hours'; calls, seconds, steps"),
        ({"amounts": ()}, "compare.amounts is (); positive numbers"),
        ({"amounts": (1.0, -2)}, "positive numbers"),
        ({"amounts": (1.0, 1)}, "must have each once"),
        ({"seeds": (0, 0)}, "compare.seeds is (0, 0); each once"),
        ({"seeds": (0.5,)}, "whole numbers from 0"),
        ({"kinds": ()}, "compare.kinds is empty; --config.compare.kinds=boot,"),
        ({"kinds": ("bott",)}, "compare.kinds is 'bott'; did you mean 'boot'"),
        ({"variants": {"a b": ()}}, "compare.variants has 'a b'; letters"),
        (
            {"variants": {"a": ("objective.delta",)}},
            "a: 'objective.delta'; field=value",
        ),
        (
            {"variants": {"a": ("objective.detla=0.1",)}},
            "compare.variants, a: there is no field 'objective.detla'; did you mean "
            "'objective.delta'?",
        ),
        (
            {"variants": {"a": ("objective.delta=short",)}},
            "objective.delta is 'short', but must be of type float",
        ),
        ({"variants": {"a": ("distill.num_steps=3",)}}, "the same for all methods"),
        ({"variants": {"a": ("teacher.path=x",)}}, "teacher.path is the same for all"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(changes, words):
    config = configured(**changes)
    with pytest.raises(ConfigError) as refused:
        methods.check_section(config)
        for method in methods.methods_of(config):
            method.config(config)
    for word in words.split("; "):
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_settings_make_a_config_and_leave_the_other_as_it_was():
    variants = {"mine": ("objective.delta=0.1", "student.time_conditioning=reused")}
    config = configured(variants=variants, kinds=("boot, mine", "boot"))
    boot, mine = methods.methods_of(config)
    assert boot.settings == ("objective.kind=boot",) and mine.name == "mine"
    changed = mine.config(config)
    assert changed.objective.delta == 0.1
    assert changed.student.time_conditioning == "reused"
    assert config.objective.delta == 0.04 and changed.is_locked


def run_of(config) -> Run:
    return Run(config, pathlib.Path("unused"), create_mesh())


def test_equal_calls_make_equal_budgets():
    config = configured(budget="calls")
    config.objective.update(kind="continuous", boundary_weight=0.0)
    config.distill.update(num_steps=5000, batch_size=128)
    heun = methods.Method(
        "heun", ("objective.kind=boot", "objective.boundary_weight=1.0")
    )
    base, run = run_of(config), run_of(heun.config(config))
    # 1 + 2 evaluations against 2 + 2 and one of either for the boundary.
    assert budget.calls_per_step(base).total == 3 * 128
    assert budget.calls_per_step(run).total == 6 * 128
    assert budget.steps_within(base, base, 1.0) == 5000
    assert budget.steps_within(base, run, 1.0) == 2500
    assert budget.steps_within(base, run, 0.2) == 500
    stored = methods.Method(
        "stored",
        (
            "objective.kind=direct",
            "objective.solver=ddim",
            "objective.teacher_steps=16",
            "objective.stored_samples=20000",
        ),
    )
    run = run_of(stored.config(config))
    # 16 evaluations for each sample before the first step, then one of the student.
    assert budget.steps_within(base, run, 1.0) == (15_000 * 128 - 320_000) / 128
    spent = budget.calls_of_training(run, 12_500)
    assert (spent.teacher, spent.student) == (320_000, 12_500 * 128)
    with pytest.raises(ConfigError, match="stored samples take 320,000 network calls"):
        budget.steps_within(base, run, 0.1)
    config.compare.budget = "steps"
    assert budget.steps_within(base, run, 2.0) == 10_000


@pytest.mark.parametrize("steps", [1, 7, 49.6, 333.3, 1234.5, 98_765.4])
def test_steps_are_rounded_so_that_they_divide_into_dispatches(steps):
    section = default_config().run
    rounded = budget.rounded_steps(steps, section)
    assert rounded >= 1 and abs(rounded - steps) <= max(0.5, 0.01 * steps)
    if steps > 1000:
        assert rounded % 20 == 0


def checked_variants(name: str) -> tuple[Any, dict[str, Any]]:
    """A config, and those of its variants, as the comparison checks them first."""
    path = pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"
    config = runpy.run_path(str(path))["get_config"]()
    methods.check_section(config)
    found = methods.methods_of(config)
    configs = {method.name: method.config(config) for method in found}
    for changed in configs.values():
        validation.validate(changed)
    chosen = {
        (repr(changed.objective.to_dict()), repr(changed.student.to_dict()))
        for changed in configs.values()
    }
    assert len(chosen) == len(found)
    return config, configs


def test_every_ablation_is_a_run_that_makes_sense():
    config, configs = checked_variants("digits_ablations")
    assert len(configs) >= 18
    base = configs["continuous"]
    assert base.objective == config.objective and base.student == config.student
    # Each turns one choice of the one that it is named after.
    for name, changed in configs.items():
        if name not in ("continuous", "boot", "boot_signal", "boot_noisy_image"):
            other = configs[name.split("_")[0]]
            turned = differences(other.to_dict(), changed.to_dict())
            assert len(turned) == 1, (name, turned)


def test_every_ablation_of_the_correction_turns_one_choice():
    config, configs = checked_variants("digits_correction")
    assert "diversity" in config.evaluation.metrics
    assert configs["corrected"].objective == config.objective
    for name, changed in configs.items():
        if name not in ("continuous", "corrected"):
            other = configs["corrected"]
            turned = differences(other.to_dict(), changed.to_dict())
            assert len(turned) == 1, (name, turned)
            assert "objective.correction" in str(turned)
