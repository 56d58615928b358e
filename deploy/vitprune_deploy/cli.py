"""The command ``vitprune-deploy``: parses arguments, shows what comes back, and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import vitprune
from vitprune.errors import BudgetUnreachable, DamagedFile, InputError, MissingError

from . import console
from .verbs.answer import Answer

EXIT_CODES = """\b
Exit codes:
  0    done, and within the profile
  1    done, but a budget or floor was missed, unstable or infeasible
  2    the input is wrong: the message says where, and what would be right
  3    the machine lacks something: the message says what, and how to get it
  70   a bug of vitprune
  130  interrupted: the same command goes on from there
"""
INTERRUPTED = 130
PRUNING = (
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnx_ir", "google", "safetensors", "accelerate", "jinja2",
)  # fmt: skip
EXTRAS = {  # which extra brings a package
    **dict.fromkeys(PRUNING, "prune,cpu"),
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "nncf": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "cuda": "tensorrt",
    "pycuda": "pycuda",
    "asyncssh": "ssh",
}

app = typer.Typer(
    help="Prune Vision Transformers to a latency budget measured on the device, and ship them as engines.",
    epilog=f"\b\nExample:\n  vitprune-deploy build quickstart\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text reads the same in a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
devices = typer.Typer(
    help="Boards that are reached over ssh: add, list, remove and check them.",
    epilog=f"\b\nExample:\n  vitprune-deploy devices add jetson ssh://me@192.168.1.20\n\n{EXIT_CODES}",
)
app.add_typer(devices, name="devices")
UsageError: Any = typer.BadParameter.__base__  # typer exports only what derives from it, and where it lives changes

ProfileArgument = Annotated[
    str, typer.Argument(metavar="PROFILE", help="a YAML file, or the name of a shipped profile")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a key of the profile; may be repeated")
]
OutOption = Annotated[Path | None, typer.Option(help="output folder  [default: out/NAME of the profile]")]
HostOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="measure and build on a board: ssh://user@board, or its name")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="repeat finished stages as well")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads  [default: all cores]")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]
JsonOption = Annotated[bool, typer.Option("--json", help="the result as JSON on stdout, for programs")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="show the traceback of an error")]
SHARED = [
    Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
    Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption),
    Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
    Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=VerboseOption),
]
Verb = Callable[..., Answer]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command with ``arguments``, those of the process by default."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _terminated_as_interrupted():
        try:
            code = app(args=given or ["--help"], prog_name="vitprune-deploy", standalone_mode=False)
        except UsageError as error:
            path = error.ctx.command_path if error.ctx else "vitprune-deploy"
            _complain(f"{error.format_message()} See '{path} --help'.")
            code = 2
        except BaseException as error:  # outside of a verb: Ctrl-C between two of them, or our own mistake
            code = _explain(error.__cause__ or error if isinstance(error, typer.Abort) else error, "-v" in given)
        return _flushed(code or 0)


def _verb(example: str, group: typer.Typer = app, name: str | None = None) -> Callable[[Verb], Verb]:
    """Makes a function the verb of its name, with the options that every verb has; it is given a console first.

    Args:
        group: what the verb belongs to.
        name: in place of the function's.
    """

    def register(function: Verb) -> Verb:
        own = list(signature(function, eval_str=True).parameters.values())[1:]

        def run(*, context: typer.Context, quiet: bool, as_json: bool, verbose: bool, **arguments: Any) -> None:
            work = functools.partial(function, console.Console(quiet), **arguments)
            raise typer.Exit(_answer(work, as_json, verbose or bool(context.obj)))

        wanted: Any = run
        wanted.__signature__ = signature(run).replace(parameters=own + SHARED)
        wanted.__annotations__ = {p.name: p.annotation for p in own + SHARED}
        examples = f"\b\nExample:\n{example}\n\n{EXIT_CODES}"
        group.command(name or function.__name__, help=function.__doc__, epilog=examples)(run)
        return function

    return register


def _answer(work: Callable[[], Answer], as_json: bool, verbose: bool) -> int:
    """Exit code of ``work``, whose answer is printed."""
    try:
        answer = work()
        console.data(json.dumps(answer.data, indent=1, allow_nan=False) if as_json else answer.text)
    except BaseException as error:
        return _explain(error, verbose)
    return answer.code


def _explain(error: BaseException, verbose: bool) -> int:
    """Exit code for ``error``, which is told in a sentence on stderr."""
    if isinstance(error, BrokenPipeError):  # whoever read our result has seen enough
        return 0
    if verbose:
        traceback.print_exception(error)
    code, text = _sentence(error)
    if code == INTERRUPTED:
        sys.stderr.write(f"{text}\n")
    else:
        _complain(text)
    return code


def _sentence(error: BaseException) -> tuple[int, str]:
    """Exit code and text for ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; the same command goes on from here"
    if isinstance(error, BudgetUnreachable):
        return 1, str(error)
    if isinstance(error, InputError | DamagedFile):
        return 2, str(error)
    if isinstance(error, MissingError):
        return 3, str(error)
    if isinstance(error, MemoryError):
        return 3, "the machine ran out of memory; close other programs, or use a smaller batch or fewer images"
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if package in EXTRAS:
        return 3, f"{package} cannot be imported ({error}); run `pip install 'vitprune[{EXTRAS[package]}]'`"
    text = " ".join(str(error).split())
    what = type(error).__name__ + (f": {text}" if text else "")
    return 70, f"a bug of vitprune: {what}; run again with -v and report it"


def _complain(text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"error: {line}\n")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does: what is half done is cleaned up, and the folder can be resumed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flushed(code: int) -> int:
    """``code``, once all output is written; a reader that has gone away is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
    return code


def _with(overrides: Sequence[str], host: str | None) -> list[str]:
    """What ``--set`` and ``--host`` put in place of the profile's."""
    return [*overrides, *([] if host is None else [f"device.host={host}"])]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.data(f"vitprune {vitprune.__version__}")
        raise typer.Exit


@app.callback()
def _before(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_show_version, is_eager=True)
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    context.obj = verbose


@_verb("  vitprune-deploy build quickstart\n  vitprune-deploy build my.yaml --set data.source=images --budget 2x")
def build(
    show: console.Console,
    profile: ProfileArgument,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
    host: HostOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    budget: Annotated[str | None, typer.Option(help="in place of the profile's: 5 or 5ms, or 2x")] = None,
    recover: Annotated[bool, typer.Option("--recover/--no-recover", help="train the pruned model")] = True,
) -> Answer:
    """Prune a model to its budget. Export, build, validate and report it too; finished stages are not repeated."""
    from .verbs import building

    return building.build(show, profile, _with(set_, host), out, fresh=fresh, budget=budget, recover=recover)


@_verb("  vitprune-deploy init deit_small_patch16_224 --data images --speedup 2")
def init(
    show: console.Console,
    model: Annotated[str, typer.Argument(metavar="NAME|CHECKPOINT", help="a timm name, or a file of weights")],
    data: Annotated[Path | None, typer.Option(help="folder or archive of images, in folders by class")] = None,
    speedup: Annotated[float, typer.Option(min=1.0, help="times as fast as the model is now")] = 2.0,
    architecture: Annotated[str | None, typer.Option(help="timm name of a checkpoint's architecture")] = None,
    host: HostOption = None,
    output: Annotated[Path, typer.Option(help="the file to write")] = Path("profile.yaml"),
) -> Answer:
    """Write a commented profile for a model and this machine. Or for the board that --host names."""
    from .verbs import init as verb

    return verb.init(show, model, data=data, speedup=speedup, architecture=architecture, host=host, output=output)


@_verb("  vitprune-deploy check my.yaml")
def check(
    show: console.Console,
    profile: ProfileArgument,
    set_: SetOption = [],  # noqa: B006
    host: HostOption = None,
    out: OutOption = None,
) -> Answer:
    """Find what would make a build fail. All of it at once, before work begins; and estimate how long it takes."""
    from .verbs import check as verb

    return verb.check(show, profile, _with(set_, host), out)


@_verb("  vitprune-deploy measure my.yaml --json > table.json")
def measure(
    show: console.Console,
    profile: ProfileArgument,
    set_: SetOption = [],  # noqa: B006
    host: HostOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> Answer:
    """Measure what each part of a model costs on this device."""
    from .verbs import building

    return building.measure(show, profile, _with(set_, host), out, fresh=fresh)


@_verb("  vitprune-deploy search my.yaml --budget 1.5x --budget 2x --budget 8ms")
def search(
    show: console.Console,
    profile: ProfileArgument,
    budget: Annotated[list[str], typer.Option(help="5 or 5ms, or 2x; may be repeated")] = [],  # noqa: B006
    set_: SetOption = [],  # noqa: B006
    host: HostOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> Answer:
    """Find the best plan for each of several budgets. Or the whole frontier; nothing is trained or exported."""
    from .verbs import building

    return building.search(show, profile, _with(set_, host), out, fresh=fresh, budgets=budget)


@_verb("  vitprune-deploy export my.yaml")
def export(
    show: console.Console,
    profile: ProfileArgument,
    set_: SetOption = [],  # noqa: B006
    host: HostOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
) -> Answer:
    """Prune and recover a model, and write it as ONNX. What is written is compared with torch."""
    from .verbs import building

    return building.export(show, profile, _with(set_, host), out, fresh=fresh)


@_verb("  vitprune-deploy refit out/small/engine/model.plan trained/model.onnx --output engines/trained.plan")
def refit(
    show: console.Console,
    engine: Annotated[Path, typer.Argument(metavar="ENGINE.plan", help="built with runtime.refit: true")],
    onnx: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="of the same plan and precision")],
    output: Annotated[Path, typer.Option(help="the new engine; its sidecar lies beside it")],
) -> Answer:
    """Give a TensorRT engine new weights. Without building it again; needs its GPU."""
    from .verbs import refit as verb

    return verb.refit(engine, onnx, output)


@_verb("  vitprune-deploy validate out/quickstart")
def validate(
    show: console.Console,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the output folder of a build")],
    set_: SetOption = [],  # noqa: B006
    host: HostOption = None,
) -> Answer:
    """Validate an output folder again on this machine. Files, accuracy, latency, and answers in any batch."""
    from .verbs import validate as verb

    return verb.validate(show, folder, _with(set_, host))


@_verb("  vitprune-deploy bench pruned.onnx --against dense.onnx --batch 8 --threads 2")
def bench(
    show: console.Console,
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="any ONNX file that takes images")],
    against: Annotated[Path | None, typer.Option(metavar="OTHER.onnx", help="measured in turn with it")] = None,
    batch: Annotated[int, typer.Option(min=1, help="images in a batch")] = 1,
    threads: ThreadsOption = None,
    image_size: Annotated[str | None, typer.Option(help="224 or 224x160, where the file leaves it free")] = None,
    provider: Annotated[str, typer.Option(help="ONNX Runtime's execution provider")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.1, help="measure no longer than this")] = 60.0,
) -> Answer:
    """Measure how long an ONNX file takes here. With a 95% interval; code 1 where that stays too wide."""
    from .verbs import bench as verb

    size, files = _image_size(image_size), [against, file] if against else [file]
    return verb.bench(show, files, batch=batch, threads=threads, image_size=size, provider=provider, seconds=seconds)


@_verb("  vitprune-deploy inspect out/quickstart\n  vitprune-deploy inspect model.onnx --json")
def inspect(
    show: console.Console,
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="output folder, .onnx file or .plan file")],
) -> Answer:
    """Show what an output folder, ONNX file or engine holds. Whether files are whole, and attention is one kernel."""
    from .verbs import inspect as verb

    return verb.inspect(path)


@_verb("  vitprune-deploy visualize out/quickstart photo.jpg another.png")
def visualize(
    show: console.Console,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the output folder of a build")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="image files")],
    output: Annotated[Path | None, typer.Option(help="folder for the PNG files; DIR/tokens")] = None,
) -> Answer:
    """Draw which tokens of images survive, block by block. Merged tokens as regions; one PNG for each image."""
    from .verbs import visualize as verb

    return verb.visualize(folder, images, output)


@_verb(
    "  vitprune-deploy package triton out/quickstart --output models\n"
    "  vitprune-deploy package triton out/rtx4090 out/l4 --output models --name flowers"
)
def package(
    show: console.Console,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="what to make of it: triton")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="output folder of a build, or of several GPUs' builds")
    ],
    output: Annotated[Path | None, typer.Option(help="the model repository; DIR/triton")] = None,
    name: Annotated[str | None, typer.Option(help="of the model; the profile's")] = None,
    runtime: Annotated[str | None, typer.Option(help="onnxruntime or tensorrt; the one that was validated")] = None,
    queue_delay_us: Annotated[
        int, typer.Option(min=0, help="microseconds that a request may wait for others to share its batch")
    ] = 0,
) -> Answer:
    """Put a built model into a model repository of the Triton server. With its labels, warm-up and preprocessing."""
    from .verbs import package as verb

    return verb.package(kind, folders, output, name=name, runtime=runtime, queue_delay_us=queue_delay_us)


@_verb("  vitprune-deploy doctor")
def doctor(show: console.Console) -> Answer:
    """Show what this machine can run and build, or lacks."""
    from .verbs import doctor as verb

    return verb.doctor()


@_verb("  vitprune-deploy schema > profile.schema.json")
def schema(show: console.Console) -> Answer:
    """Print the JSON schema of a profile, for editors."""
    from .verbs import lists

    return lists.schema()


@_verb("  vitprune-deploy profiles")
def profiles(show: console.Console) -> Answer:
    """List the shipped profiles and device files."""
    from .verbs import lists

    return lists.profiles()


@_verb("  vitprune-deploy devices add jetson ssh://me@192.168.1.20", devices, "add")
def devices_add(
    show: console.Console,
    name: Annotated[str, typer.Argument(metavar="NAME", help="what to call it here")],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="ssh://user@board, or ssh://user@board:2222")],
    python: Annotated[str, typer.Option(metavar="PATH", help="the Python there that measures")] = "python3",
    folder: Annotated[str, typer.Option(metavar="PATH", help="where files are put there")] = ".cache/vitprune/board",
    runner: Annotated[
        Literal["python", "trtexec"], typer.Option(help="what works there; trtexec needs no Python")
    ] = "python",
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256:...", help="of the board's host key; without it you are asked")
    ] = None,
) -> Answer:
    """Name a board that is reached over ssh. Its host key is shown, and accepted if it is the right one."""
    from .verbs import devices as verb

    return verb.add(name, address, python=python, folder=folder, runner=runner, fingerprint=fingerprint)


@_verb("  vitprune-deploy devices list", devices, "list")
def devices_list(show: console.Console) -> Answer:
    """List the boards that have a name."""
    from .verbs import devices as verb

    return verb.devices()


@_verb("  vitprune-deploy devices remove jetson", devices, "remove")
def devices_remove(
    show: console.Console, name: Annotated[str, typer.Argument(metavar="NAME", help="one of `devices list`")]
) -> Answer:
    """Forget a board and its host key."""
    from .verbs import devices as verb

    return verb.remove(name)


@_verb("  vitprune-deploy devices check jetson", devices, "check")
def devices_check(
    show: console.Console,
    name: Annotated[str, typer.Argument(metavar="NAME|ADDRESS", help="one of `devices list`, or ssh://user@board")],
) -> Answer:
    """Show what a board has, or lacks. For measuring there: Python, numpy, a runtime, room on its disk."""
    from .verbs import devices as verb

    return verb.check(name)


def _image_size(text: str | None) -> tuple[int, int] | None:
    """'224' or '224x160' as height and width in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None or not int(match[1]) or (match[2] and not int(match[2])):
        raise InputError(f"--image-size must be pixels such as 224 or 224x160, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


if __name__ == "__main__":
    sys.exit(main())
