"""The folder of a run: whose it is. A refusal leaves every byte as it was."""

import contextlib
import json
import os
import pathlib

import pytest

from boot_jax.config import default_config, to_json
from boot_jax.workdir import WorkdirError, open_workdir, write_text


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def begun(tmp_path):
    """A workdir that has something to lose."""
    folder = open_workdir(tmp_path / "run", default_config())
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@contextlib.contextmanager
def refused(folder: pathlib.Path):
    """Expects a refusal in one line that names the folder, and no change in it."""
    before = contents(folder)
    with pytest.raises(WorkdirError) as refusal:
        yield refusal
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert contents(folder) == before


def test_a_new_folder_is_made_with_its_config(tmp_path):
    config = default_config()
    folder = open_workdir(tmp_path / "a" / "b", config)
    assert folder == (tmp_path / "a" / "b").absolute()
    assert contents(folder) == {"config.json": to_json(config).encode()}
    assert json.loads((folder / "config.json").read_text())["distill"]["b1"] == 0.9


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_workdir("here", default_config()) == tmp_path / "here"


def test_an_empty_folder_is_taken(tmp_path):
    assert open_workdir(tmp_path, default_config()) == tmp_path
    assert (tmp_path / "config.json").exists()


def test_the_same_config_goes_on(begun):
    before = contents(begun)
    assert open_workdir(begun, default_config()) == begun
    assert contents(begun) == before


def test_what_does_not_change_the_run_may_change(begun):
    config = default_config()
    config.evaluation.num_images, config.mesh.fsdp = 64, 2
    config.distill.num_steps = 99
    open_workdir(begun, config)
    assert json.loads((begun / "config.json").read_text())["mesh"]["fsdp"] == 2


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with refused(tmp_path) as refusal:
        open_workdir(tmp_path, default_config())
    assert "--workdir" in str(refusal.value)


def test_a_folder_that_another_process_opens_just_now_is_taken(tmp_path):
    (tmp_path / "config.json.123.partial").write_text("{")
    assert open_workdir(tmp_path, default_config()) == tmp_path
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_another_config_is_refused_with_the_field_and_both_values(begun):
    config = default_config()
    config.objective.t_min = 0.25
    with refused(begun) as refusal:
        open_workdir(begun, config)
    assert "objective.t_min: 0.01 -> 0.25" in str(refusal.value)
    assert "--workdir" in str(refusal.value)
    assert "--config.run.force=True" in str(refusal.value)


def test_many_differences_are_cut_short(begun):
    config = default_config()
    for name in ("b1", "b2", "ema_decay", "weight_decay"):
        config.distill[name] = 0.5
    with refused(begun) as refusal:
        open_workdir(begun, config)
    assert str(refusal.value).count("->") == 3 and "...)" in str(refusal.value)


def test_force_goes_on_all_the_same(begun):
    config = default_config()
    config.objective.t_min, config.run.force = 0.25, True
    open_workdir(begun, config)
    assert (begun / "config.json").read_text() == to_json(config)
    assert (begun / "metrics.jsonl").read_text() == "{}\n"


def test_a_run_that_never_began_holds_nobody_up(tmp_path):
    """So that a user can mend a config that was refused further on."""
    config = default_config()
    config.data.name = "digit"
    open_workdir(tmp_path, config)
    open_workdir(tmp_path, default_config())
    assert (tmp_path / "config.json").read_text() == to_json(default_config())


@pytest.mark.parametrize(
    "text", ["{", "[1, 2]", "", '"text"', '{"model_type": "bert"}', "\xff"]
)
def test_a_foreign_config_is_not_written_over(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with refused(tmp_path):
        open_workdir(tmp_path, default_config())


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            WorkdirError, match="cannot write to the workdir"
        ) as refusal:
            open_workdir(path, default_config())
        assert "\n" not in str(refusal.value) and "--workdir" in str(refusal.value)
    assert contents(tmp_path) == {"file": b"text"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_a_place_that_cannot_be_written_is_refused():
    """Not even by root, who is stopped by no permission."""
    with pytest.raises(WorkdirError, match="cannot write to the workdir /proc/run"):
        open_workdir("/proc/run", default_config())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WorkdirError, match="Permission denied"):
        open_workdir(tmp_path / "run", default_config())


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "first")

    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "second")
    assert path.read_text() == "first"
    write_text(path, "zweites, größer")
    assert contents(tmp_path) == {"file": "zweites, größer".encode()}


def test_a_bucket_is_refused_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError, match=r"gs://bucket/run is an address.*mount"):
        open_workdir("gs://bucket/run", default_config())
    assert not list(tmp_path.iterdir())
