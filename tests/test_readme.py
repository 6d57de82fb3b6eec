"""The README's promises: its code runs, its paths and flags exist."""

import contextlib
import io
import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_block_distils_a_gaussian():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(code, "README.md", "exec"), {})
    figures = [
        float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", printed.getvalue())
    ]
    expected = [1.0, -1.0, 0.8, 0.5]
    assert len(figures) == 4
    assert all(abs(a - b) < 0.05 for a, b in zip(figures, expected, strict=True)), (
        figures
    )


def test_paths_exist():
    names = re.findall(r"`((?:boot_jax|configs)/[\w/.]*)`", README)
    names += re.findall(r"\]\(((?:examples|docs)/[\w.]+)\)", README)
    assert len(names) > 10
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_flags_exist():
    from boot_jax.config import default_config

    config = default_config()
    fields = re.findall(r"--config\.([\w.]+)=", README)
    assert fields
    for field in fields:
        value = config
        for part in field.split("."):
            assert part in value, field
            value = value[part]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
