import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from boot_jax.evaluation import plots

# --- images -----------------------------------------------------------------------


def test_uint8_rounds_to_nearest_and_clips():
    levels = np.arange(256)
    np.testing.assert_array_equal(plots.to_uint8(levels / 127.5 - 1.0), levels)
    near = (levels + 0.49) / 127.5 - 1.0
    np.testing.assert_array_equal(plots.to_uint8(near), levels)
    np.testing.assert_array_equal(plots.to_uint8([-1.5, 1.01, 9.0]), [0, 255, 255])


def test_images_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        plots.to_uint8([0.0, np.nan])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_image_enlarged(channels):
    rng = np.random.default_rng(0)
    rows = {
        "teacher, 50 steps": rng.uniform(-1, 1, (5, 8, 8, channels)),
        "student": rng.uniform(-1, 1, (5, 8, 8, channels)),
    }
    grid = np.asarray(plots.image_grid(rows))
    assert grid.shape[0] == 4 + 2 * (64 + 4)
    margin = grid.shape[1] - 5 * (64 + 4)
    for row, images in enumerate(rows.values()):
        for column in range(5):
            top, left = 4 + row * 68, margin + column * 68
            tile = grid[top : top + 64, left : left + 64]
            # Each pixel is a block of one colour: corner and middle of it agree.
            expected = np.broadcast_to(plots.to_uint8(images[column]), (8, 8, 3))
            np.testing.assert_array_equal(tile[::8, ::8], expected)
            np.testing.assert_array_equal(tile[7::8, 7::8], expected)
            assert (grid[top + 64 : top + 68, left : left + 64] == 255).all()
    label = grid[:, : margin - 4]
    assert (label[4:68] < 128).any() and (label[72:136] < 128).any()
    assert (label[:, :4] == 255).all()  # the longest label is not cut off


def test_grid_scale_and_png():
    image = plots.image_grid({"a": np.zeros((1, 96, 64, 3))})
    assert image.height == 4 + 96 + 4
    doubled = plots.image_grid({"a": np.zeros((1, 96, 64, 3))}, scale=2)
    assert doubled.height == 4 + 192 + 4
    decoded = Image.open(io.BytesIO(plots.encode_png(image)))
    assert decoded.format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"a": np.zeros((2, 8, 8, 4))},
        {"a": np.zeros((8, 8, 1))},
        {"a": np.zeros((2, 8, 8, 1)), "b": np.zeros((3, 8, 8, 1))},
    ],
)
def test_grid_refuses_rows_that_do_not_fit(rows):
    with pytest.raises(ValueError, match=r"a grid needs rows \[N, H, W, C\]"):
        plots.image_grid(rows)


# --- plots ------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are drawn, besides their PNG bytes; warnings are errors."""
    seen: list[Figure] = []
    render = plots._render

    def spy(figure: Figure) -> bytes:
        seen.append(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return render(figure)

    monkeypatch.setattr(plots, "_render", spy)
    return seen


def assert_drawn(data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.width >= 600
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_quality_plot_marks_students_and_what_they_are_worth(figures):
    students = {1: 4.0, 2: 0.25, 4: 20.0}
    data = plots.quality_against_steps([4, 1, 16], [2.0, 8.0, 0.5], students, "pixels")
    assert_drawn(data)
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "pixels" in axes.get_title(loc="left")
    lines = {marker: [] for marker in ("o", "*", "D", "None")}
    for line in axes.lines:
        lines[line.get_marker()].append(np.asarray(line.get_xydata()))
    np.testing.assert_array_equal(lines["o"][0], [[1, 8], [4, 2], [16, 0.5]])
    np.testing.assert_array_equal(np.concatenate(lines["*"])[:, 0], [1, 2, 4])
    np.testing.assert_array_equal(np.concatenate(lines["*"])[:, 1], [4, 0.25, 20])
    (diamond,) = lines["D"]  # only where it is not censored
    np.testing.assert_allclose(diamond, [[2.0, 4.0]])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[1:] == [
        "student, 1 step: 4 (2 DDIM steps)",
        "student, 2 steps: 0.25 (> 16 DDIM steps)",
        "student, 4 steps: 20 (< 1 DDIM steps)",
    ]


def test_error_plot_runs_from_noise_to_data(figures):
    curves = {"student": [0.05, 0.02, 0.0], "teacher": [0.01, 0.005, 0.0]}
    assert_drawn(plots.error_over_time([0.0, 0.5, 1.0], curves))
    (axes,) = figures[0].axes
    left, right = axes.get_xlim()
    assert left > 1.0 and right < 0.0 and axes.get_yscale() == "log"
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.05, 0.02, np.nan])
    assert len(axes.lines) == 2


def test_loss_plot_smooths_and_counts_what_has_no_logarithm(figures):
    losses = np.r_[np.tile([1.0, 3.0], 200), 0.0, np.inf, np.nan]
    assert_drawn(plots.loss_curve(range(len(losses)), losses, "Loss"))
    (axes,) = figures[0].axes
    assert "3 of 403" in axes.get_title(loc="left")
    raw, smooth = (np.asarray(line.get_ydata()) for line in axes.lines)
    np.testing.assert_array_equal(raw, losses[:400])
    np.testing.assert_allclose(smooth, 2.0, rtol=0.15)
    assert smooth[200] == pytest.approx(2.0)


@pytest.mark.parametrize("losses", [[], [np.nan, 0.0], [0.5]])
def test_loss_plot_of_next_to_nothing(figures, losses):
    plots.loss_curve(range(len(losses)), losses)
    assert len(figures) == 1


def test_map_scatter_joins_the_ends_of_each_noise(figures):
    rng = np.random.default_rng(0)
    noise, exact, student = rng.normal(size=(3, 20, 2))
    assert_drawn(plots.map_scatter(noise, exact, student))
    left, right = figures[0].axes
    np.testing.assert_array_equal(left.collections[0].get_offsets(), noise)
    ends = [np.asarray(points.get_offsets()) for points in right.collections]
    np.testing.assert_array_equal(ends[0], exact)
    np.testing.assert_array_equal(ends[1], student)
    for n, line in enumerate(right.lines):
        np.testing.assert_array_equal(line.get_xydata(), [exact[n], student[n]])
    assert len(right.lines) == 20
    colours = [points.get_array() for points in (*left.collections, *right.collections)]
    for colour in colours:
        np.testing.assert_allclose(colour, np.angle(noise[:, 0] + 1j * noise[:, 1]))


def test_plots_leave_pyplot_alone():
    code = (
        "import sys; from boot_jax.evaluation import plots;"
        "plots.loss_curve([0, 1], [1.0, 0.5]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
