"""The command: ``python -m boot_jax.main --config=configs/digits.py``.

Flags become a config, the config becomes one mode. Whatever a user can mend ends in one
line on the terminal and exit code 2.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run; see configs/.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/ and the config's name if not given."
)
_MODES = ["all", "teacher", "distill", "sample", "evaluate", "compare", "export"]
_MODE = flags.DEFINE_enum(
    "mode",
    "all",
    [*_MODES, "inspect"],
    "What to do; all does whatever is missing, and the report.",
)
_CLUSTER = ("distributed", "coordinator_address", "num_processes", "process_id")
_AMONG = ["auto", "on", "off"]  # auto asks the environment, on also a cloud
flags.DEFINE_enum("distributed", "auto", _AMONG, "Whether other processes take part.")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
flags.DEFINE_integer("num_processes", None, "How many take part.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_PATH = flags.DEFINE_string("path", None, "inspect: a teacher, hub id or workdir.")
_BATCH = flags.DEFINE_integer("batch_size", None, "inspect: noises in a step.")
_SAMPLE = ("num", "seed", "prompt", "negative_prompt", "guidance_scale")
flags.DEFINE_integer("num", None, "Images to sample; these are config.sample's.")
flags.DEFINE_integer("seed", None, "Their seed.")
flags.DEFINE_string("prompt", None, "What they show.")
flags.DEFINE_string("negative_prompt", None, "What the teacher's beside them do not.")
flags.DEFINE_float("guidance_scale", None, "Told to a student of a range.")


def main() -> int:
    """Runs the command; gives the exit code.

    0: done. 1: a loss was not finite. 2: something to mend, said in one line. 75: asked
    to stop, and saved. 76: hung, or another process has gone. After 75 and 76 the same
    command goes on; docs/operations.md has more.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(sys.argv)  # where overrides of the config are looked for
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]!r} is not a flag; flags begin with --")
        if _MODE.value == "inspect" and not (_PATH.value or _WORKDIR.value):
            raise flags.Error("say what to inspect: --path=FOLDER")
        if _CONFIG.value is not None:
            _ = _CONFIG.value.title  # a file that cannot be read only answers here
        elif _MODE.value != "inspect":
            raise flags.Error("say which run: --config=configs/digits.py, for example")
    except (AttributeError, KeyError) as error:
        hint = str(error.args[0]).replace('"', "'").splitlines()
        return _refuse("the config has no field " + ". ".join(hint))
    except (OSError, flags.Error, TypeError, ValueError) as error:
        if isinstance(error, OSError) or "Traceback" in str(error):
            last = str(error).strip().splitlines()[-1].strip()
            return _refuse(f"the config cannot be read: {last}")
        return _refuse(" ".join(str(error).split()))
    # After the flags, so that a misspelt one is answered at once.
    from boot_jax import interruption

    with interruption.Interruption() as asked:
        from boot_jax import pipeline

        logging.set_verbosity(logging.FATAL)  # the rest is said here, in one line
        if _MODE.value == "inspect":
            path = _PATH.value or _WORKDIR.value or ""
            return pipeline.inspect(path, _CONFIG.value, _BATCH.value)
        cluster = {name: flags.FLAGS[name].value for name in _CLUSTER}
        return pipeline.answer(_MODE.value, _config(), _workdir(), cluster, asked)


def _config() -> Any:
    given = {name: flags.FLAGS[name].value for name in _SAMPLE}
    _CONFIG.value.sample.update({k: v for k, v in given.items() if v is not None})
    return _CONFIG.value


def _workdir() -> str:
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return _WORKDIR.value or f"runs/{pathlib.Path(path).stem}"


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
