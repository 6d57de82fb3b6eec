"""A whole training, from its config: state, resume, loop. Teacher and student alike."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh

from boot_jax import sharding
from boot_jax.training.checkpoints import Checkpoints
from boot_jax.training.logs import Logger
from boot_jax.training.loop import default_dispatch, dispatch_length, fit
from boot_jax.training.state import TrainState, create_optimizer, create_state
from boot_jax.training.step import Loss, make_train_step


def optimizer_from(training: Any) -> optax.GradientTransformation:
    """The optimizer of a config's ``distill`` or ``teacher.training`` section."""
    fields = (
        "learning_rate",
        "num_steps",
        "warmup_steps",
        "decay",
        "b1",
        "b2",
        "weight_decay",
        "max_grad_norm",
    )
    return create_optimizer(**{name: training[name] for name in fields})


def state_template(
    init: Callable[[Array], Any], training: Any, mesh: Mesh, fsdp_min_size: int
) -> Any:
    """The shapes of a training's state, each with its sharding; nothing is computed."""
    shapes = jax.eval_shape(
        lambda key: create_state(init(key), optimizer_from(training)),
        jax.random.key(0),
    )
    shardings = sharding.parameter_shardings(shapes, mesh, fsdp_min_size)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        shardings,
    )


def train(
    directory: pathlib.Path,
    name: str,
    *,
    loss: Loss,
    init: Callable[[Array], Any],
    frozen: Any,
    batches: Callable[[int, int], Iterator[Any]] | None,
    key: Array,
    training: Any,
    run: Any,
    mesh: Mesh,
    fsdp_min_size: int,
    network: str,
    metadata: Mapping[str, Any],
) -> TrainState:
    """Trains until ``training.num_steps``, from the newest checkpoint if there is one.

    Args:
      directory: of checkpoints and logs.
      name: shown beside the progress.
      loss: of `boot_jax.training.step`.
      init: ``key -> params``.
      frozen: what the loss does not train.
      batches: ``(start_step, steps_per_dispatch) -> iterator``; None for no data.
      key: everything random derives from it and the step.
      training: config section ``distill`` or ``teacher.training``.
      run: config section ``run``.
      mesh, fsdp_min_size: where arrays live.
      network: ``dit`` or ``unet``, for the steps per dispatch.
      metadata: kept in every checkpoint; see `Checkpoints`.

    Returns:
      The state at the last step, saved.

    Raises:
      CheckpointError: the newest checkpoint is of another run or does not fit.
      MeshError: the batch cannot be shared evenly.
      FloatingPointError: a loss or gradient is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    template = state_template(init, training, mesh, fsdp_min_size)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    checkpoints = Checkpoints(
        directory / "checkpoints", metadata, run.keep_checkpoints, run.force
    )
    if checkpoints.latest_step() is None:
        init_key = jax.random.fold_in(key, 2**32 - 1)  # no step has this number
        fresh = create_state(init(init_key), optimizer_from(training))
        state = sharding.place(fresh, shardings)
    else:
        state = checkpoints.restore(template)
    start = int(state.step)
    if start >= training.num_steps:
        checkpoints.close()
        return state
    steps_per_dispatch = dispatch_length(
        run.steps_per_dispatch or default_dispatch(network),
        training.num_steps,
        run.checkpoint_every,
        start,
    )
    train_step = make_train_step(
        loss,
        optimizer_from(training),
        ema_decay=training.ema_decay,
        num_steps=training.num_steps,
        steps_per_dispatch=steps_per_dispatch,
        state_sharding=shardings,
    )
    logger = Logger(
        directory,
        name,
        start_step=start,
        num_steps=training.num_steps,
        batch_size=training.batch_size,
        log_every=run.log_every,
        tensorboard=run.tensorboard,
        wandb_project=run.wandb_project,
    )
    try:
        return fit(
            state,
            train_step,
            frozen=frozen,
            batches=None if batches is None else batches(start, steps_per_dispatch),
            key=key,
            num_steps=training.num_steps,
            steps_per_dispatch=steps_per_dispatch,
            checkpoint_every=run.checkpoint_every,
            checkpoints=checkpoints,
            logger=logger,
        )
    finally:
        logger.close()
        checkpoints.close()
