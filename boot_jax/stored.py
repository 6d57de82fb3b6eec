"""The teacher's samples of some noises, made once and kept in the workdir.

``workdir/stored_samples/`` holds one ``.npy`` file a name: ``target``, and what each
sample was conditioned on: ``label``, ``guidance_scale``, or ``prompt``, the index of a
prompt of the run. Noise is made again from its index. ``meta.json`` says whose the
samples are, and how many of them are made: the rest is made when the set is opened.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tqdm

from boot_jax import distributed
from boot_jax.batches import Batch, batch_indices, dispatch_indices, read_ahead
from boot_jax.sampling import Generator, many_steps, stored_noise
from boot_jax.sharding import batch_sharding, place, to_host
from boot_jax.training.distillation import INDEX, TARGET
from boot_jax.workdir import WorkdirError, write_text

if TYPE_CHECKING:
    from boot_jax.run import Run

FOLDER, PROMPT = "stored_samples", "prompt"

# Of the labels and guidance scales of the samples.
_CONDITION_STREAM = 2**31 + 3


@dataclasses.dataclass(frozen=True)
class StoredSamples:
    """A whole set: arrays ``[N, ...]`` by name, mapped into memory."""

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays[TARGET])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of some indices ``[n]``, with the indices themselves."""
        rows = {name: np.asarray(leaf[indices]) for name, leaf in self.arrays.items()}
        return rows | {INDEX: indices.astype(np.int32)}


def open_stored(run: "Run") -> StoredSamples:
    """A run's set, of which what is missing is made first.

    Raises:
      WorkdirError: the set in the workdir is another teacher's or was made otherwise,
        or it is damaged.
    """
    folder, wanted = run.workdir / FOLDER, provenance(run)
    num = run.objective.stored_samples
    meta = distributed.on_main(lambda: _open_meta(folder, wanted))
    if meta["done"] < num:
        _make(run, folder, meta)
    distributed.wait_for_all((folder / "meta.json").exists)
    try:
        arrays = {
            path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")
        }
        if any(len(leaf) != num for leaf in arrays.values()) or TARGET not in arrays:
            raise ValueError("rows are missing")
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{folder} is damaged ({error}); delete it, and the same command makes it "
            "anew"
        ) from error
    return StoredSamples(arrays)


def stored_batches(
    run: "Run", samples: StoredSamples, start_step: int, steps_per_dispatch: int
) -> Iterator[Any]:
    """Batches ``[k, B, ...]`` of a set on the mesh, a new permutation in each epoch."""
    draw = dispatch_indices(
        len(samples),
        run.config.distill.batch_size,
        run.config.seed,
        start_step,
        steps_per_dispatch,
    )

    def read(first: int) -> Batch:
        indices = draw(first)
        rows = samples.take(indices.ravel())
        if PROMPT in rows:
            assert run.prompts is not None
            rows |= run.prompts.rows.take(rows.pop(PROMPT))
        return {
            name: leaf.reshape(*indices.shape, *leaf.shape[1:])
            for name, leaf in rows.items()
        }

    for batch in read_ahead(read, start_step, steps_per_dispatch):
        yield run.placed_batch(batch)


def provenance(run: "Run") -> dict[str, Any]:
    """All that a set depends on, as JSON holds it."""
    section, objective = run.config.teacher, run.objective
    guidance = {
        name: section[f"guidance_{name}"]
        for name in ("scale", "range", "interval", "rescale")
    }
    prompts = None
    if run.prompts is not None:
        prompts = [run.prompts.cache.folder.name, run.config.prompts.negative]
    known = {
        "teacher": run.teacher.fingerprint(),
        "guidance": guidance,
        "thresholding": section.thresholding,
        "teacher_steps": objective.teacher_steps,
        "solver": objective.solver,
        "grid_power": objective.grid_power,
        "t_max": objective.t_max,
        "prompts": prompts,
        "seed": run.config.seed,
        "batch_size": run.config.distill.batch_size,
        "stored_samples": objective.stored_samples,
    }
    return json.loads(json.dumps(known))


def _open_meta(folder: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        return {"provenance": wanted, "done": 0, "seconds": 0.0}
    try:
        meta = json.loads(path.read_text())
        has = meta["provenance"]
        changed = [name for name in wanted if has.get(name) != wanted[name]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WorkdirError(
            f"{path} is damaged; delete {folder}, and the same command makes it anew"
        ) from error
    if changed:
        name = changed[0]
        raise WorkdirError(
            f"the samples in {folder} were made with another {name} ({has.get(name)}, "
            f"now {wanted[name]}); use another --workdir, or delete them"
        )
    return meta


def _make(run: "Run", folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Makes what is missing, a batch at a time, each on disk before the next."""
    num, size = run.objective.stored_samples, run.config.distill.batch_size
    sampler, seconds = _sampler(run), meta["seconds"]
    with tqdm.tqdm(
        total=num, initial=meta["done"], desc="stored samples", unit="sample",
        mininterval=5.0, disable=not distributed.is_main(),
    ) as bar:  # fmt: skip
        # What is done ends with a batch, but for the last one.
        for start in range(meta["done"], num, size):
            before = time.perf_counter()
            indices = np.arange(start, start + size)
            kept, condition = _conditions(run, start // size)
            eps = stored_noise(run.config.seed, indices, run.teacher.sample_shape)
            placed = place((eps, condition), batch_sharding(run.mesh))
            kept[TARGET] = to_host(sampler(*placed)).astype(np.float32)
            rows = {name: leaf[: num - start] for name, leaf in kept.items()}
            seconds += time.perf_counter() - before
            done = min(start + size, num)
            now = meta | {"done": done, "seconds": seconds}
            distributed.on_main(
                lambda rows=rows, start=start, now=now: _write(
                    folder, rows, start, num, now
                )
            )
            bar.update(done - start)


def _sampler(run: "Run") -> Generator:
    """The teacher's, of a condition as it is drawn."""
    objective = run.objective
    sampler = many_steps(
        run.denoise,
        run.placed_teacher.params,
        run.teacher.schedule,
        objective.teacher_steps,
        t_max=objective.t_max,
        solver=objective.solver,
        power=objective.grid_power,
    )
    if run.encode is None:
        return sampler
    encode, text = jax.jit(run.encode), run.frozen["text"]
    return lambda eps, condition: sampler(eps, encode(text, condition))


def _conditions(run: "Run", batch: int) -> tuple[dict[str, np.ndarray], Any]:
    """What is kept of the conditions of a batch of samples, and the conditions."""
    size, kept, prompts = run.config.distill.batch_size, {}, None
    if run.prompts is not None:
        rows = run.prompts.rows
        kept[PROMPT] = batch_indices(len(rows), size, run.config.seed, batch)
        prompts = rows.take(kept[PROMPT])
    key = jax.random.key(run.config.seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, _CONDITION_STREAM), batch)
    drawn = run.conditions.draw(key, size, prompts)
    own = {k: v for k, v in (drawn or {}).items() if k not in (prompts or {})}
    return kept | {name: np.asarray(leaf) for name, leaf in own.items()}, drawn


def _write(
    folder: pathlib.Path,
    rows: Mapping[str, np.ndarray],
    start: int,
    num: int,
    meta: dict[str, Any],
) -> None:
    for name, leaf in rows.items():
        path, mode = folder / f"{name}.npy", "r+" if start else "w+"
        shape = (num, *leaf.shape[1:])
        whole = np.lib.format.open_memmap(
            path, mode, None if start else leaf.dtype, None if start else shape
        )
        whole[start : start + len(leaf)] = leaf
        whole.flush()
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
