"""What a machine was doing before and after a measurement, and whether heat or power slowed it down meanwhile.

The runner on the machine only collects texts and numbers; here they are read. ``read_state`` takes a dict in which any
key may be missing, and any value may be the text of an error:

    nvpmodel        answer of ``nvpmodel -q``
    jetson_clocks   answer of ``jetson_clocks --show``; it wants root
    tegrastats      one line of ``tegrastats --interval 100``, best while the machine is at work
    thermal         {type: millidegrees} of /sys/class/thermal/thermal_zone*
    trips           {type: [[millidegrees, kind], ...]}, their trip points
    cooling         {type: [cur_state, max_state]} of /sys/class/thermal/cooling_device*; of one type, the most held
    cpufreq         {cpu: {cur, min, limit, governor}} in kHz: scaling_cur_freq, scaling_min_freq, scaling_max_freq
    devfreq         {name: {cur, min, max, governor}} in Hz, of /sys/class/devfreq: a Jetson's GPU, without root
    throttles       {cpu: {core, package}}, the counts in /sys/devices/system/cpu/cpu*/thermal_throttle; Intel
    over_current    {oc1: count, ...} of /sys/class/hwmon/hwmon*/oc*_event_cnt; Orin and later
    nvidia_smi      {field: value} of one GPU, under nvidia-smi's own names of fields
    load_1min       of /proc/loadavg
    pressure        percent, or the text of /proc/pressure/cpu

A sign is named only where nothing else explains it. A passive trip point may ring a bell and no more, as Orin's at 70 C
does, so that only the highest of a zone counts. A fan is no sign, whatever it does. A clock below its limit is what
governors are for, so that it must be below what the settings allow at the least, under load. A card that its driver
holds at its power limit is at its rated speed, which stands in the state and is no sign.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..latency.fingerprint import read_power_mode
from . import _readings as readings
from ._jetson import read_jetson_clocks, read_tegrastats

# devices that cool by holding clocks down; others are fans, alerts that are no more than that, chargers, displays
SLOWING = re.compile(r"throttle-alert$|cpufreq|devfreq|balanced|^Processor$|powerclamp")
OVER_CURRENT = {"oc1": "under-voltage", "oc2": "mean power", "oc3": "peak power"}  # as NVIDIA names Orin's
REASONS = {
    "hw_slowdown": "by the hardware",
    "sw_thermal_slowdown": "for heat, by the driver",
    "hw_thermal_slowdown": "for heat, by the hardware",
    "hw_power_brake_slowdown": "by the power supply's brake",
}
TOTAL_POWER = ("VDD_IN", "POM_5V_IN", "VIN", "gpu")  # what goes into a whole board, or into a graphics card
BUSY_PERCENT = 90.0
A_LITTLE_LOW = 0.95  # of a clock that is counted, not set


@dataclass(frozen=True)
class Clock:
    """A clock: now, what the settings allow at the least and at the most, and how busy its part is."""

    mhz: float | None = None
    least_mhz: float | None = None
    most_mhz: float | None = None
    load_percent: float | None = None
    governor: str | None = None


@dataclass(frozen=True)
class State:
    """A machine at a moment; what is not known is None or empty.

    Attributes:
        power_mode: as nvpmodel calls it, with its number in ``power_mode_number``.
        jetson_clocks: whether it holds the clocks fixed.
        cpus: by name, as in cpu0.
        memory: the memory controller's clock, which Jetsons call EMC.
        celsius: by thermal zone, or by tegrastats' sensor where there are no zones; 'gpu' for a graphics card.
        passive_celsius: the highest passive trip point of a zone, from which on the system holds clocks down.
        cooling: state and highest state of each cooling device.
        watts: by rail; 'gpu' for a graphics card.
        throttle_counts: by processor and kind, as in cpu0/package, since the machine started.
        over_current: by event, since the machine started.
        gpu_reasons: the driver's reasons for a lower clock that hold now.
        gpu_reasons_us: microseconds that each has held in all.
    """

    power_mode: str | None = None
    power_mode_number: int | None = None
    jetson_clocks: bool | None = None
    cpus: Mapping[str, Clock] = field(default_factory=dict)
    gpu: Clock = Clock()
    memory: Clock = Clock()
    celsius: Mapping[str, float] = field(default_factory=dict)
    passive_celsius: Mapping[str, float] = field(default_factory=dict)
    cooling: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    watts: Mapping[str, float] = field(default_factory=dict)
    power_limit_watts: float | None = None
    throttle_counts: Mapping[str, int] = field(default_factory=dict)
    over_current: Mapping[str, int] = field(default_factory=dict)
    gpu_reasons: tuple[str, ...] | None = None
    gpu_reasons_us: Mapping[str, int] = field(default_factory=dict)
    load_1min: float | None = None
    cpu_pressure_percent: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return _known(asdict(self))

    def tells(self) -> bool:
        """Whether it holds anything that would show that the machine is slowed down."""
        counted = self.throttle_counts or self.over_current or self.gpu_reasons_us
        return bool(self.passive_celsius or self.cooling or counted or self.gpu_reasons is not None)


def read_state(raw: Mapping[str, Any]) -> State:
    """The state in what the runner collected; what cannot be read is left out."""
    stats = read_tegrastats(readings.text(raw, "tegrastats"))
    shown, fixed = read_jetson_clocks(readings.text(raw, "jetson_clocks"))
    mode, number = read_power_mode(readings.text(raw, "nvpmodel"))
    card = readings.mapping(raw, "nvidia_smi")
    card_gpu, card_memory = readings.card_clocks(card)
    found_gpu = readings.gpu_clock(readings.mapping(raw, "devfreq"))
    zones = readings.numbers(readings.mapping(raw, "thermal"), unit=1e3) or stats.celsius
    return State(
        power_mode=mode,
        power_mode_number=number,
        jetson_clocks=fixed,
        cpus=_cores(readings.core_clocks(readings.mapping(raw, "cpufreq")), shown, stats.cpus),
        gpu=Clock(**(card_gpu | found_gpu | shown.get("gpu", {}) | stats.gpu)),
        memory=Clock(**(card_memory | shown.get("emc", {}) | stats.memory)),
        celsius=zones | readings.numbers({"gpu": card.get("temperature.gpu")}),
        passive_celsius=readings.passive_celsius(readings.mapping(raw, "trips")),
        cooling=readings.cooling_states(readings.mapping(raw, "cooling")),
        watts=stats.watts | readings.numbers({"gpu": card.get("power.draw")}),
        power_limit_watts=readings.number(card.get("power.limit")),
        throttle_counts=readings.throttle_counts(readings.mapping(raw, "throttles")),
        over_current=readings.counts(readings.mapping(raw, "over_current")),
        gpu_reasons=readings.card_reasons(card),
        gpu_reasons_us=readings.card_reasons_us(card),
        load_1min=readings.number(raw.get("load_1min")),
        cpu_pressure_percent=readings.pressure_percent(raw.get("pressure")),
    )


def throttled(before: State, after: State) -> tuple[str, ...]:
    """A sentence for each sign that heat or power slowed the machine down between the two."""
    signs = (_counted, _hot, _cooled, _too_slow, _held_by_driver)
    return tuple(dict.fromkeys(sentence for find in signs for sentence in find(before, after)))


def changed(before: State, after: State) -> tuple[str, ...]:
    """A sentence for each setting that is not what it was."""
    switch = {True: "on", False: "off", None: None}
    found = [
        *_change("power mode", *(_mode(state) for state in (before, after))),
        *_change("jetson_clocks", *(switch[state.jetson_clocks] for state in (before, after))),
        *_change("power limit of the GPU", *(_watts(state.power_limit_watts) for state in (before, after))),
        *_clock_changes("the GPU", before.gpu, after.gpu),
        *_clock_changes("the memory", before.memory, after.memory),
    ]
    for name in [name for name in before.cpus if name in after.cpus]:
        found += _clock_changes("the processor", before.cpus[name], after.cpus[name])
    return tuple(dict.fromkeys(found))


def summary(before: State, after: State) -> str:
    """One sentence about settings and heat, one about what slowed the machine down, one about what changed."""
    facts = ", ".join(filter(None, [*_settings(after), *_heat(before, after)]))
    signs, changes = throttled(before, after), changed(before, after)
    if signs:
        verdict = f"It was slowed down: {'; '.join(signs)}."
    elif before.tells() and after.tells():
        verdict = "Nothing shows that heat or power slowed it down."
    else:
        verdict = "It does not tell whether heat or power slows it down."
    sentences = [f"{facts[0].upper()}{facts[1:]}." if facts else "", verdict]
    return " ".join(filter(None, [*sentences, f"Meanwhile {'; '.join(changes)}." if changes else ""]))


def _cores(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Clock]:
    """The clock of each core; the last layer that tells a thing has it, since clock and load are of one moment."""
    names = {name for layer in layers for name in layer if re.fullmatch(r"cpu\d+", name)}
    found = {}
    for name in sorted(names, key=lambda name: int(name[3:])):
        facts: dict[str, Any] = {}
        for layer in layers:
            facts |= layer.get(name, {})
        found[name] = Clock(**facts)
    return found


def _counted(before: State, after: State) -> Iterator[str]:
    """What the processor and the board count by themselves."""
    rises = _rises(before.throttle_counts, after.throttle_counts)
    for kind in ("core", "package"):
        more = max((rise for name, rise in rises.items() if name.endswith(f"/{kind}")), default=0)
        if more:
            yield f"the processor throttled itself for heat {_times(more)} ({kind}_throttle_count)"
    for name, more in _rises(before.over_current, after.over_current).items():
        yield f"the board throttled itself {_times(more)} for {OVER_CURRENT.get(name, 'power')} ({name}_event_cnt)"


def _hot(before: State, after: State) -> Iterator[str]:
    """Zones that reached the temperature from which on clocks are held down."""
    for zone, limit in {**before.passive_celsius, **after.passive_celsius}.items():
        most = max(state.celsius.get(zone, -math.inf) for state in (before, after))
        if most >= limit:
            yield f"{zone} was at {most:.1f} C, where clocks are held down from {limit:.1f} C on"


def _cooled(before: State, after: State) -> Iterator[str]:
    """Devices that cool by holding clocks down, and did."""
    for name in sorted({*before.cooling, *after.cooling}):
        state, most = max(one.cooling[name] for one in (before, after) if name in one.cooling)
        if state > 0 and SLOWING.search(name):
            yield f"{name} held clocks down (state {state} of {most})"


def _too_slow(before: State, after: State) -> Iterator[str]:
    """Clocks under load below what the settings allow at the least: no governor does that."""
    for state in (before, after):
        for unit, clock in (("the GPU", state.gpu), *state.cpus.items()):
            if clock.mhz is None or clock.least_mhz is None or (clock.load_percent or 0.0) < BUSY_PERCENT:
                continue
            if clock.mhz < A_LITTLE_LOW * clock.least_mhz:
                yield (
                    f"{unit} ran at {clock.mhz:.0f} MHz under {clock.load_percent:.0f}% load, below the "
                    f"{clock.least_mhz:.0f} MHz that it is set to at the least"
                )


def _held_by_driver(before: State, after: State) -> Iterator[str]:
    """Reasons for a lower clock that NVIDIA's driver names."""
    rises = _rises(before.gpu_reasons_us, after.gpu_reasons_us)
    held = {*(before.gpu_reasons or ()), *(after.gpu_reasons or ()), *rises} & REASONS.keys()
    if len(held) > 1:
        held.discard("hw_slowdown")  # it only says that there is one of the others
    for name in sorted(held):
        lasted = f" for {rises[name] / 1000:.0f} ms" if name in rises else ""
        yield f"the GPU's clock was held down{lasted} {REASONS[name]} ({name})"


def _rises(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """How much each counter has risen; one that was not there before, or is lower, has not."""
    return {name: count - before[name] for name, count in after.items() if count > before.get(name, count)}


def _clock_changes(whose: str, before: Clock, after: Clock) -> Iterator[str]:
    yield from _change(f"governor of {whose}", before.governor, after.governor)
    yield from _change(f"least clock of {whose}", _mhz(before.least_mhz), _mhz(after.least_mhz))
    yield from _change(f"highest clock of {whose}", _mhz(before.most_mhz), _mhz(after.most_mhz))


def _change(what: str, before: str | None, after: str | None) -> Iterator[str]:
    if before is not None and after is not None and before != after:
        yield f"{what} changed from {before} to {after}"


def _settings(state: State) -> Iterator[str]:
    """Power mode and limits in words."""
    cores = [clock.most_mhz for clock in state.cpus.values() if clock.most_mhz is not None]
    governors = sorted({clock.governor for clock in state.cpus.values() if clock.governor})
    if state.power_mode is not None:
        yield f"power mode {state.power_mode}"
    if state.jetson_clocks is not None:
        yield f"jetson_clocks {'on' if state.jetson_clocks else 'off'}"
    if cores:
        yield f"processor up to {_mhz(max(cores))}"
    if governors:
        yield f"governor {' and '.join(governors)}"
    if state.gpu.most_mhz is not None:
        yield f"GPU up to {_mhz(state.gpu.most_mhz)}"


def _heat(before: State, after: State) -> Iterator[str]:
    """The hottest zone and the power, before and after."""
    if before.celsius and after.celsius:
        yield f"{max(before.celsius.values()):.0f} C before and {max(after.celsius.values()):.0f} C after"
    for rail in TOTAL_POWER:
        if rail in before.watts and rail in after.watts:
            yield f"{before.watts[rail]:.1f} W before and {after.watts[rail]:.1f} W after"
            return


def _mode(state: State) -> str | None:
    """Power mode with its number: two modes may share a name."""
    return state.power_mode if state.power_mode_number is None else f"{state.power_mode} ({state.power_mode_number})"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _mhz(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f} MHz"


def _watts(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f} W"


def _known(value: Any) -> Any:
    """Plain data without what is not known."""
    if isinstance(value, dict):
        plain = {key: _known(one) for key, one in value.items()}
        return {key: one for key, one in plain.items() if one is not None and one != {}}
    return list(value) if isinstance(value, tuple) else value
