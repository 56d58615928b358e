"""What trtexec's log says: its version, the GPU, and in one sentence why it failed."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vitprune.errors import DamagedFile, InputError, MissingError, NotSupported, VitpruneError

BANNER = re.compile(r"&&&& \w+ TensorRT\.trtexec \[TensorRT v(?P<number>\d+)\](?: \[b(?P<build>\d+)\])?")
LINE = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] \[(?P<severity>[EWIV])\] ?(?P<text>.*)$")
DEVICE = {
    "name": re.compile(r"\] Selected Device: (.+)"),
    "compute_capability": re.compile(r"\] Compute Capability: (\d+\.\d+)"),
    "multiprocessors": re.compile(r"\] SMs: (\d+)"),
    "memory_bytes": re.compile(r"\] Device Global Memory: (\d+) MiB"),
}
ORIGIN = re.compile(r"^(?:\[TRT\] )?(?:Error\[\d+\]: )?")  # in front of what TensorRT itself says
# what trtexec says itself after TensorRT has said why, and kernels that it tried and left
NO_REASON = re.compile(
    r"^(Engine set up failed|Failed to create engine from model or file\.|Building engine failed|Parsing model failed"
    r"|Failed to parse onnx file|Engine could not be created from network|Inference set up failed|Got invalid engine!"
    r"|Engine deserialization failed|Error occurred during inference)$|Skipping tactic"
)
NODE = re.compile(r"While parsing node number \d+ \[(?P<kind>\S+) -> \"(?P<gives>[^\"]*)\"")
NODE_NAME = re.compile(r"^name: \"(?P<name>[^\"]+)\"", re.MULTILINE)
NODE_REASON = re.compile(r"ERROR: \S+ In function [^\n]*\n(?P<reason>.+)", re.DOTALL)
OTHER_GPU = re.compile(r"incompatible device, expecting compute (?P<here>\S+) got compute (?P<built>\S+?),")
# of an engine; a cache of timings from another version is left aside, with the same words
OTHER_VERSION = re.compile(
    r"(Version tag does not match|incompatible serialization version).*Engine deserialization failed", re.DOTALL
)
NO_MEMORY = re.compile(r"out ?of ?memory|OutOfMemory|could not be allocated|NvMapMemAlloc.* error 12", re.IGNORECASE)
NO_GPU = re.compile(
    r"Cannot find any available devices|no CUDA-capable device|CUDA initialization failure|driver version is insuff"
)
NO_FILE = re.compile(r"Input file cannot be found|Could not open file|Error opening engine file|Cannot open file")
NO_ROOM = re.compile(r"Saving engine to file failed|Cannot open engine file")
NO_ONNX = re.compile(r"Failed to parse ONNX model from file")
MOST_TEXT = 300


class Version(NamedTuple):
    """A version of TensorRT; trtexec tells the build since 10.10 or so."""

    major: int
    minor: int
    patch: int
    build: int | None = None

    def __str__(self) -> str:
        return ".".join(str(part) for part in self if part is not None)


class _Log(NamedTuple):
    """What a failed run said, and of which file."""

    subject: str
    program: str  # 'TensorRT 10.3.0'
    errors: list[str]  # without what stands in front of them
    text: str


def read_version(log: str) -> Version:
    """The version in trtexec's banner, which begins whatever it prints.

    Raises:
        MissingError: there is no banner: no such program, or it does not start.
    """
    found = BANNER.search(log)
    if found is None:
        raise MissingError(f"there is no trtexec that runs on the device: {_last_line(log)}; install TensorRT there")
    digits = int(found["number"])
    base = 100 if digits >= 10**4 else 10  # 100300 is 10.3.0, and 8601 was 8.6.1
    major, rest = divmod(digits, 100 * base)
    return Version(major, *divmod(rest, 100), int(found["build"]) if found["build"] else None)


def read_gpu(log: str) -> dict[str, Any]:
    """The GPU that trtexec used, as the sidecar of a plan has it; it does not tell the driver.

    Raises:
        DamagedFile: the log does not name it, since it is cut off.
    """
    found = {key: pattern.search(log) for key, pattern in DEVICE.items()}
    facts = {key: one[1].strip() for key, one in found.items() if one is not None}
    if facts.keys() != DEVICE.keys():
        raise DamagedFile("the log of trtexec does not describe the GPU; it is cut off")
    return {
        "name": facts["name"],
        "compute_capability": facts["compute_capability"],
        "multiprocessors": int(facts["multiprocessors"]),
        "memory_bytes": int(facts["memory_bytes"]) << 20,
        "driver": None,
        "driver_cuda": None,
    }


def explain(log: str, code: int, subject: str) -> VitpruneError:
    """The error to raise for a run of trtexec that did not end well.

    Args:
        log: all that it printed.
        code: its exit status; that of a shell for a program that a signal ended is 128 more than the signal.
        subject: the file that it worked on, for the message.
    """
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # nobody but the kernel does that
        return MissingError(f"{subject}: trtexec was killed, most likely for want of memory on the device")
    try:
        program = f"TensorRT {read_version(log)}"
    except MissingError as error:
        return error
    errors = [text for severity, text in _entries(log) if severity == "E"]
    told = _Log(subject, program, [ORIGIN.sub("", text) for text in errors], log)
    return next((found for rule in RULES if (found := rule(told)) is not None), _unknown(told, code))


def _unknown_option(log: _Log) -> VitpruneError | None:
    names = [text.split(":", 1)[1].split()[0] for text in log.errors if text.startswith("Unknown option: --")]
    if not names:
        return None
    return NotSupported(f"{log.subject}: trtexec of {log.program} has no {', '.join(names)}")


def _other_engine(log: _Log) -> VitpruneError | None:
    if gpus := OTHER_GPU.search(log.text):
        return MissingError(
            f"{log.subject} was built for a GPU of compute capability {gpus['built']}, and that of the device has "
            f"{gpus['here']}; build it again on the device"
        )
    if OTHER_VERSION.search(log.text):
        return MissingError(
            f"{log.subject} does not load in {log.program}: another version built it; build it again on the device"
        )
    return None


def _wrong_file(log: _Log) -> VitpruneError | None:
    if NO_FILE.search(log.text):
        return InputError(f"{log.subject}: there is no such file on the device; send it again")
    if NO_ONNX.search(log.text):
        return DamagedFile(f"{log.subject} is cut off or not an ONNX file")
    return None


def _poor_device(log: _Log) -> VitpruneError | None:
    if NO_ROOM.search(log.text):
        return MissingError(f"{log.subject}: {log.program} could not write the engine; is the device's disk full?")
    if NO_GPU.search(log.text):
        return MissingError(f"{log.subject}: {log.program} finds no GPU on the device, or its driver is too old")
    if NO_MEMORY.search(log.text):
        return MissingError(
            f"{log.subject}: {log.program} ran out of the device's memory; lower workspace_mb or the largest batch, or "
            "end what else uses the memory"
        )
    return None


def _unparsed_node(log: _Log) -> VitpruneError | None:
    """The node that could not be parsed, and why."""
    said = "\n".join(log.errors)
    node = NODE.search(said)
    if node is None:
        return None
    name, reason = NODE_NAME.search(said, node.end()), NODE_REASON.search(said, node.end())
    lines = reason["reason"].split("\nFailed to parse onnx file")[0].strip().splitlines() if reason else []
    why = f" ({_short(lines[-1])})" if lines else ""
    place = name["name"] if name else node["gives"]
    return NotSupported(f"{log.subject}: {log.program} cannot parse the node {place} of type {node['kind']}{why}")


# the first that has an answer; a node that cannot be parsed comes before what follows from it
RULES: tuple[Callable[[_Log], VitpruneError | None], ...] = (
    _unknown_option,
    _unparsed_node,
    _other_engine,
    _wrong_file,
    _poor_device,
)


def _unknown(log: _Log, code: int) -> VitpruneError:
    """What TensorRT said last, or how the program ended if it said nothing."""
    reasons = [text for text in log.errors if not NO_REASON.search(text)]
    if reasons:
        return NotSupported(f"{log.subject}: {log.program} could not do it: {_short(reasons[-1])}")
    last = _last_line(log.text)
    return NotSupported(f"{log.subject}: trtexec of {log.program} ended with {code}; its last line: {last}")


def _entries(log: str) -> Iterator[tuple[str, str]]:
    """Severity and text of what was logged; lines without a time belong to what stands above them."""
    severity = ""
    lines: list[str] = []
    for line in log.splitlines():
        found = LINE.match(line)
        if found is None and not line.startswith("&&&&"):
            lines.append(line)
            continue
        if severity:
            yield severity, "\n".join(lines)
        severity, lines = (found["severity"], [found["text"]]) if found else ("", [])
    if severity:
        yield severity, "\n".join(lines)


def _last_line(text: str) -> str:
    return _short((text.strip().splitlines() or ["it said nothing"])[-1])


def _short(text: str) -> str:
    """On one line, and not too long."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= MOST_TEXT else f"{line[: MOST_TEXT - 3]}..."
