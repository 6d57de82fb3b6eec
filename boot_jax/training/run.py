"""A whole training, from its config: state, resume, loop. Teacher and student alike."""

import functools
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh

from boot_jax import distributed, sharding
from boot_jax.interruption import Interruption, Watchdog
from boot_jax.training import logs
from boot_jax.training.auxiliary import Auxiliary
from boot_jax.training.checkpoints import CheckpointError, Checkpoints
from boot_jax.training.health import Health, group_names
from boot_jax.training.loop import Hook, default_dispatch, dispatch_length, fit
from boot_jax.training.state import (
    AuxiliaryState,
    TrainState,
    create_optimizer,
    create_state,
)
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
    init: Callable[[Array], Any],
    training: Any,
    mesh: Mesh,
    mesh_config: Any,
    auxiliary: Auxiliary | None = None,
) -> Any:
    """The shapes of a training's state, each with its sharding; nothing is computed.

    The moving average and the optimizer's moments live where their parameter lives; the
    parameters of an auxiliary network where the same rules say.
    """
    optimizer = optimizer_from(training)

    def create(key: Array) -> TrainState:
        second = None if auxiliary is None else auxiliary.create(key)
        return create_state(init(key), optimizer, second)

    shapes = jax.eval_shape(create, jax.random.key(0))
    everywhere = sharding.replicated(mesh)

    def of_params(params: Any) -> Any:
        return sharding.parameter_shardings(
            params, mesh, mesh_config.rules, mesh_config.fsdp_min_size
        )

    def of_moments(
        optimizer: optax.GradientTransformation, moments: Any, params: Any
    ) -> Any:
        return optax.tree_map_params(
            optimizer,
            lambda _, where: where,
            moments,
            params,
            transform_non_params=lambda _: everywhere,
        )

    params, second = of_params(shapes.params), shapes.auxiliary
    if auxiliary is not None:
        own = of_params(second.params)
        moments = of_moments(auxiliary.optimizer, second.opt_state, own)
        second = AuxiliaryState(params=own, opt_state=moments)
    shardings: Any = shapes.replace(
        step=everywhere,
        params=params,
        ema_params=params,
        opt_state=of_moments(optimizer, shapes.opt_state, params),
        skipped=everywhere,
        auxiliary=second,
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        shardings,
    )


def compiled_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a compiled program holds on a device while it runs: its arguments, results
    that do not take their place, and temporaries. None where the backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    kept = found.argument_size_in_bytes + found.output_size_in_bytes
    return kept + found.temp_size_in_bytes - found.alias_size_in_bytes


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
    config: Any,
    mesh: Mesh,
    metadata: Mapping[str, Any],
    interruption: Interruption,
    convolutional: bool = False,
    show: Callable[[int, Any], None] | None = None,
    check: Callable[[int, Any], None] | None = None,
) -> TrainState:
    """Trains until ``training.num_steps``, from the newest checkpoint if there is one.

    A new run saves its first state before its first step: so there is something to go
    on from at any moment, and a disk that cannot be written to is found at once.

    Args:
      directory: of checkpoints and logs.
      name: shown beside the progress.
      loss: of `boot_jax.training.step`.
      init: ``key -> params``.
      frozen: what the loss does not train, on the mesh.
      batches: ``(start_step, steps_per_dispatch) -> iterator``; None for no data.
      key: everything random derives from it and the step.
      training: config section ``distill`` or ``teacher.training``.
      config: the whole; its sections ``run`` and ``mesh`` are read.
      mesh: where arrays live.
      metadata: kept in every checkpoint; see `Checkpoints`.
      interruption: what may ask the run to stop.
      convolutional: whether the network is, for the choice of steps per dispatch.
      show: called with step and moving average every ``run.sample_every`` steps.
      check: called alike every ``run.recall_every`` steps.

    Returns:
      The state at the last step, saved.

    Raises:
      CheckpointError: the newest checkpoint is of another run or does not fit, or none
        can be written.
      MeshError: the batch cannot be shared evenly.
      FloatingPointError: a loss or gradient is not finite.
      Preempted: the run was asked to stop, and has saved.
    """
    run = config.run
    if run.wandb_project:
        logs.require_wandb()  # now, before anything is written
    distributed.on_main(lambda: directory.mkdir(parents=True, exist_ok=True))
    record = functools.partial(logs.record, directory)
    template = state_template(init, training, mesh, config.mesh, loss.auxiliary)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    checkpoints = Checkpoints(
        directory / "checkpoints",
        metadata,
        keep=run.keep_checkpoints,
        keep_every=run.keep_every,
        force=run.force,
        record=record,
    )
    if checkpoints.latest_step() is None:
        _refuse_lost(directory, checkpoints)
        state = _first_state(init, key, training, shardings, loss.auxiliary)
        checkpoints.save(state)
    else:
        state = checkpoints.restore(template)
    start = int(state.step)
    if start >= training.num_steps:
        checkpoints.close()
        return state
    record("start", step=start, devices=jax.device_count(), mesh=dict(mesh.shape))
    steps_per_dispatch = dispatch_length(
        run.steps_per_dispatch or default_dispatch(convolutional),
        training.num_steps,
        run.checkpoint_every,
        run.sample_every,
        run.recall_every if check is not None else 0,
        start,
    )
    train_step = make_train_step(
        loss,
        optimizer_from(training),
        ema_decay=training.ema_decay,
        num_steps=training.num_steps,
        steps_per_dispatch=steps_per_dispatch,
        microbatches=training.microbatches,
        skip_nonfinite=training.skip_nonfinite > 0,
        state_sharding=shardings,
        metrics_sharding=sharding.replicated(mesh),
    )
    feed = None if batches is None else batches(start, steps_per_dispatch)
    first = None if feed is None else next(feed)
    key = sharding.place_key(key, mesh)
    with interruption.finishing(checkpoints.wait):
        compiled = train_step.lower(state, frozen, first, key).compile()
        checkpoints.finish(state)  # the first one, if it is not yet on disk
    record("compiled", memory_bytes=compiled_bytes(compiled))
    logger = logs.Logger(
        directory,
        name,
        start_step=start,
        num_steps=training.num_steps,
        batch_size=training.batch_size,
        log_every=run.log_every,
        tensorboard=run.tensorboard,
        wandb_project=run.wandb_project,
        health=Health(
            group_names(template.params),
            most_skipped=training.skip_nonfinite,
            spike_factor=run.spike_factor,
            record=record,
        ),
    )
    try:
        return fit(
            state,
            compiled,
            frozen=frozen,
            batches=None if feed is None else itertools.chain([first], feed),
            key=key,
            num_steps=training.num_steps,
            steps_per_dispatch=steps_per_dispatch,
            checkpoint_every=run.checkpoint_every,
            checkpoints=checkpoints,
            logger=logger,
            interruption=interruption,
            watchdog=Watchdog(run.watchdog_seconds),
            hooks=[
                Hook("grid", run.sample_every, show),
                Hook("recall", run.recall_every, check),
            ],
        )
    finally:
        # Nothing that this meets may hide what has happened. A peer that is gone would
        # be waited for.
        if not distributed.is_lost_peer(sys.exception() or Exception()):
            logger.close()
            checkpoints.close()


def _first_state(
    init: Callable[[Array], Any],
    key: Array,
    training: Any,
    shardings: TrainState,
    auxiliary: Auxiliary | None,
) -> TrainState:
    # No step has these numbers.
    params = init(jax.random.fold_in(key, 2**32 - 1))
    second, where = None, None
    if auxiliary is not None:
        second = auxiliary.init(jax.random.fold_in(key, 2**32 - 2))
        where = shardings.auxiliary.params
    placed = sharding.place((params, second), (shardings.params, where))

    def create(params: Any, second: Any) -> TrainState:
        own = None if auxiliary is None else auxiliary.state_of(second)
        return create_state(params, optimizer_from(training), own)

    return jax.jit(create, out_shardings=shardings)(*placed)


def _refuse_lost(directory: pathlib.Path, checkpoints: Checkpoints) -> None:
    """A run that has made steps never starts afresh without a word."""
    done = logs.read_metrics(directory)
    if checkpoints.lost() or done:
        said = f"its log reaches step {done[-1]['step']}" if done else "all were broken"
        raise CheckpointError(
            f"there is no checkpoint left in {directory / 'checkpoints'}, though there "
            f"has been one ({said}); bring one back, or take another --workdir to "
            "start afresh"
        )
