"""What is not finite is named, and skipped or not; spikes are recorded."""

import numpy as np
import pytest

from boot_jax.training.health import (
    GRADIENTS,
    PARAMETERS,
    SKIPPED,
    Health,
    finite_groups,
    group_names,
)

GROUPS = ["conv_in", "mid_block"]


def values(*losses, gradients=None, parameters=None, skipped=None):
    flags = np.ones((len(losses), 2), bool)
    metrics = {
        "loss": np.asarray(losses, np.float32),
        "grad_norm": np.ones(len(losses), np.float32),
        GRADIENTS: flags if gradients is None else np.asarray(gradients),
        PARAMETERS: flags if parameters is None else np.asarray(parameters),
    }
    if skipped is not None:
        metrics[SKIPPED] = np.asarray(skipped, np.int32)
    return metrics


def test_groups_are_the_first_level():
    tree = {
        "b": {"kernel": np.ones(3, np.float32), "bias": np.array([np.inf], np.float32)},
        "a": {"kernel": np.ones(2, np.float32)},
    }
    assert group_names(tree) == ["a", "b"]
    np.testing.assert_array_equal(finite_groups(tree), [True, False])


def test_sound_steps_all_count():
    given = values(1.0, 2.0)
    np.testing.assert_array_equal(Health(GROUPS).examine(given, 0), [True, True])
    assert set(given) == {"loss", "grad_norm"}


@pytest.mark.parametrize(
    "given, words",
    [
        (values(1.0, np.nan, 1.0), "step 12: loss = nan. "),
        (
            values(1.0, 1.0, gradients=[[True, True], [True, False]]),
            "step 12: not finite: gradients of mid_block. ",
        ),
        (
            values(np.inf, gradients=[[False, False]], parameters=[[False, True]]),
            "step 11: loss = inf; not finite: gradients of conv_in, mid_block; "
            "parameters of conv_in. ",
        ),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run(given, words):
    with pytest.raises(FloatingPointError) as stop:
        Health(GROUPS).examine(given, 10)
    message = str(stop.value)
    assert message.startswith(words) and "\n" not in message
    assert "skip_nonfinite" in message


def test_a_few_steps_may_be_skipped():
    events = []
    health = Health(
        GROUPS,
        most_skipped=2,
        record=lambda event, **fields: events.append((event, fields)),
    )
    good = health.examine(values(1.0, np.nan, 1.0, np.inf, skipped=[0, 1, 1, 2]), 0)
    np.testing.assert_array_equal(good, [True, False, True, False])
    assert [(event, fields["step"], fields["total"]) for event, fields in events] == [
        ("skipped_step", 2, 1),
        ("skipped_step", 4, 2),
    ]
    with pytest.raises(FloatingPointError, match=r"step 5.*2 such steps were skipped"):
        health.examine(values(np.nan, skipped=[3]), 4)


def test_spikes_are_recorded():
    events = []
    health = Health(
        GROUPS,
        spike_factor=3.0,
        record=lambda event, **fields: events.append((event, fields)),
    )
    health.examine(values(*([1.0] * 15), 9.0), 0)  # too early to know
    health.examine(values(*([1.0] * 10), 2.9, 3.5), 16)
    assert events == [("loss_spike", {"step": 28, "loss": 3.5, "median": 1.0})]
    health = Health(GROUPS, record=lambda *_, **__: pytest.fail("spikes are off"))
    health.examine(values(*([1.0] * 30), 100.0), 0)
