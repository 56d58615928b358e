from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vitprune_deploy.latency.fingerprint import read_power_mode
from vitprune_deploy.remote._jetson import read_jetson_clocks, read_tegrastats
from vitprune_deploy.remote.state import Clock, State, changed, read_state, summary, throttled

RECORDED = Path(__file__).parent / "recorded"


def recorded(name):
    return (RECORDED / f"{name}.txt").read_text()


def pair(clock):
    return clock.get("load_percent"), clock.get("mhz")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("nvpmodel_nano_r32", ("5W", 1)),
        ("nvpmodel_xavier_r32", ("MODE_15W_DESKTOP", 7)),
        ("nvpmodel_orin_nx_r36", ("MAXN_SUPER", 2)),
        ("nvpmodel_orin_nano_r36_verbose", ("25W", 1)),
        ("jetson_clocks_refused", (None, None)),
    ],
)
def test_the_power_mode_is_read_among_what_stands_around_it(name, mode):
    assert read_power_mode(recorded(name)) == mode


def test_a_power_mode_may_lack_its_number_or_its_name():
    assert read_power_mode("NV Power Mode: my own mode") == ("my own mode", None)
    assert read_power_mode("NV Power Mode:\n0\n") == (None, None)


@pytest.mark.parametrize(
    ("name", "fixed", "cores", "gpu", "memory"),
    [
        ("tx1_r28", True, 4, (998.4, 998.4, 998.4), 1600.0),
        ("nano_r32_off", False, 4, (230.4, 76.8, 921.6), 1600.0),
        ("nano_r32_on", True, 4, (921.6, 921.6, 921.6), 1600.0),
        ("nano_r32_5w", False, 2, (460.8, 76.8, 614.4), 1600.0),  # of its CPUs least and highest clock are the same
        ("orin_nx_r36", False, 6, (306.0, 306.0, 624.75), 2133.0),
        ("orin_nano_r39", False, 6, (306.0, 306.0, 918.0), 665.6),
        ("agx_orin_r39_on", True, 12, (1300.5, 1300.5, 1300.5), 3199.0),
        ("thor_on", True, 14, (1575.0, 1575.0, 1575.0), 4266.0),
    ],
)
def test_clocks_are_read_on_every_board(name, fixed, cores, gpu, memory):
    found, held = read_jetson_clocks(recorded(f"jetson_clocks_{name}"))
    assert held is fixed
    assert found.keys() == {*(f"cpu{number}" for number in range(cores)), "gpu", "emc"}
    assert tuple(found["gpu"][part] for part in ("mhz", "least_mhz", "most_mhz")) == pytest.approx(gpu)
    assert found["emc"]["mhz"] == pytest.approx(memory)
    assert found["cpu0"]["governor"] == ("interactive" if name == "tx1_r28" else "schedutil")


def test_clocks_that_only_root_may_see_are_not_known():
    assert read_jetson_clocks(recorded("jetson_clocks_refused")) == ({}, None)


@pytest.mark.parametrize(
    ("name", "cpus", "gpu", "memory", "celsius", "watts"),
    [
        ("tx1_r28", {"cpu2": (65, 1734), "cpu3": (0, 1734)}, (39, 76), (1, 1600), {}, {}),
        ("nano_r32", {"cpu0": (5, 1224)}, (0, 76), (0, 1600), {"PLL": 37, "CPU": 40}, {"POM_5V_IN": 1.75}),
        ("tx2_nx_r32", {"cpu0": (3, 345), "cpu3": (0, 345)}, (0, None), (0, None), {"BCPU": 50.5}, {}),
        ("xavier_r32", {"cpu7": (0, 1190)}, (0, None), (0, None), {"thermal": 30.8}, {"SOC": 2.936, "SYS5V": 3.306}),
        ("xavier_nx_r35", {"cpu0": (23, 1397)}, (0, 114), (2, 204), {"AUX": 45}, {"VDD_IN": 2.763, "VDD_SOC": 0.65}),
        ("agx_orin_r36", {"cpu11": (0, 729)}, (0, None), (0, 2133), {"tj": 44.343}, {"VIN_SYS_5V0": 4.025}),
        ("orin_r36_busy", {"cpu5": (93, 247)}, (84, 713), (18, 3199), {"tj": 65.562}, {"VDD_IN": 17.946}),
        ("orin_nano_r36_not_root", {"cpu4": (2, 729)}, (0, None), (None, None), {"gpu": 49.031}, {"VDD_IN": 4.824}),
        ("orin_nano_r39", {"cpu0": (2, 729)}, (0, 305), (3, 665), {"gpu": 46.562}, {"VDD_IN": 3.462}),
    ],
)
def test_tegrastats_is_read_on_every_board(name, cpus, gpu, memory, celsius, watts):
    found = read_tegrastats(recorded(f"tegrastats_{name}"))
    assert {core: pair(found.cpus[core]) for core in cpus} == cpus
    assert (pair(found.gpu), pair(found.memory)) == (gpu, memory)
    assert {zone: found.celsius[zone] for zone in celsius} == celsius
    assert {rail: found.watts[rail] for rail in watts} == watts


def test_tegrastats_says_nothing_of_what_is_off_and_not_there():
    assert read_tegrastats(recorded("tegrastats_tx2_nx_r32")).cpus.keys() == {"cpu0", "cpu3", "cpu4", "cpu5"}
    agx = read_tegrastats(recorded("tegrastats_agx_orin_r36"))
    assert not agx.celsius.keys() & {"CV0", "CV1", "CV2", "GPU"}  # they say -256
    assert agx.watts.keys() == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}  # NC is not connected
    memory = {"RAM", "SWAP", "IRAM"}
    assert not memory & read_tegrastats(recorded("tegrastats_nano_r32")).watts.keys()


@pytest.mark.parametrize(
    ("line", "load", "mhz"),
    [
        ("GR3D_FREQ @[314,314,314] cpu@40C", None, 314),  # documented for JetPack 7.0 on Thor
        ("GR3D_FREQ 99%@[1098,1093] cpu@40C", 99, 1098),
        ("GR3D_FREQ off", None, None),
        ("tegrastats: command not found", None, None),
    ],
)
def test_the_gpu_of_a_documented_line(line, load, mhz):
    assert pair(read_tegrastats(line).gpu) == (load, mhz)


def test_thor_at_rest_has_one_clock_for_all_cores():
    found = read_tegrastats("CPU [0%,5%,off]@2601 EMC_FREQ @4266 GR3D_FREQ @[1574,1574,1574]")
    assert found.cpus == {"cpu0": {"load_percent": 0, "mhz": 2601}, "cpu1": {"load_percent": 5, "mhz": 2601}}
    assert found.memory == {"mhz": 4266}


@pytest.fixture
def orin():
    """An Orin NX at work, as its runner tells of it."""
    return {
        "nvpmodel": recorded("nvpmodel_orin_nx_r36"),
        "jetson_clocks": recorded("jetson_clocks_orin_nx_r36"),
        "tegrastats": "CPU [99%@1510,12%@1113] GR3D_FREQ 98%@[612] gpu@58.6C VDD_IN 16321mW/11204mW",
        "thermal": {"cpu-thermal": 57125, "gpu-thermal": 58625, "cv0-thermal": None},
        "trips": {
            "cpu-thermal": [[99000, "passive"], [104500, "critical"], [70000, "passive"]],
            "gpu-thermal": [[99000, "passive"], [104500, "critical"], [70000, "passive"]],
        },
        "cooling": {
            "pwm-fan": [2, 3],
            "hot-surface-alert": [0, 1],
            "cpu-throttle-alert": [0, 2],
            "gpu-throttle-alert": [0, 2],
            "devfreq-17000000.gpu": [0, 9],
        },
        "cpufreq": {"cpu0": {"cur": 1510400, "min": 729600, "limit": 1510400, "governor": "schedutil"}},
        "over_current": {"oc1": 0, "oc2": 15, "oc3": 37},
        "load_1min": 1.25,
        "pressure": "some avg10=3.50 avg60=1.00 avg300=0.50 total=12345\n",
    }


@pytest.fixture
def pc():
    """A PC with a graphics card."""
    return {
        "thermal": {"x86_pkg_temp": 61000, "acpitz": 27800},
        "trips": {"x86_pkg_temp": [[-274000, "passive"], [0, "passive"]]},
        "cooling": {"Processor": [0, 10], "intel_powerclamp": [-1, 50], "TCC Offset": [10, 63], "Fan": [1, 1]},
        "cpufreq": {
            f"cpu{n}": {"cur": 3600012, "min": 800000, "limit": 4700000, "governor": "powersave"} for n in range(12)
        },
        "throttles": {"cpu0": {"core": 4, "package": 20}, "cpu1": {"core": 7, "package": 20}},
        "nvidia_smi": {
            "clocks.gr": "2470",
            "clocks.max.gr": "3003",
            "clocks.mem": "10251 MHz",
            "temperature.gpu": "66",
            "power.draw": "318.20 W",
            "power.limit": "450.00",
            "utilization.gpu": "97 %",
            "clocks_event_reasons.active": "0x0000000000000004",
            "clocks_event_reasons_counters.sw_power_cap": "91403239 us",
            "clocks_event_reasons_counters.hw_thermal_slowdown": "0 us",
        },
    }


def test_a_jetson_at_work(orin):
    state = read_state(orin)
    assert (state.power_mode, state.power_mode_number, state.jetson_clocks) == ("MAXN_SUPER", 2, False)
    assert state.cpus["cpu0"] == Clock(1510.0, 729.6, 1510.4, 99.0, "schedutil")
    assert list(state.cpus) == [f"cpu{number}" for number in range(6)]
    assert state.gpu == Clock(612.0, 306.0, 624.75, 98.0)
    assert state.memory == Clock(2133.0, 204.0, 2133.0)
    assert state.celsius == {"cpu-thermal": 57.125, "gpu-thermal": 58.625}
    assert state.passive_celsius == {"cpu-thermal": 99.0, "gpu-thermal": 99.0}
    assert state.watts == {"VDD_IN": 16.321}
    assert (state.load_1min, state.cpu_pressure_percent) == (1.25, 3.5)


def test_without_root_a_jetsons_clocks_come_from_sys(orin):
    orin["jetson_clocks"] = recorded("jetson_clocks_refused")
    orin["devfreq"] = {
        "15480000.nvdec": {"cur": 1, "min": 1, "max": 1},
        "17000000.gpu": {"cur": 612000000, "min": 306000000, "max": 624750000, "governor": "nvhost_podgov"},
    }
    state = read_state(orin)
    assert state.jetson_clocks is None
    assert state.gpu == Clock(612.0, 306.0, 624.75, 98.0, "nvhost_podgov")
    assert state.cpus["cpu0"] == Clock(1510.0, 729.6, 1510.4, 99.0, "schedutil")


@pytest.mark.parametrize("name", ["17000000.ga10b", "17000000.gv11b", "17000000.gp10b", "57000000.gpu", "gpu-gpc-0"])
def test_the_gpu_is_found_under_the_names_that_jetsons_give_it(name):
    others = {"gpu-nvd-0": {"max": 1692000000}, "15340000.vic": {"max": 1}}
    state = read_state({"devfreq": others | {name: {"cur": 114750000, "min": 114750000, "max": 1109250000}}})
    assert state.gpu == Clock(114.75, 114.75, 1109.25)


def test_a_pc(pc):
    state = read_state(pc)
    assert list(state.cpus)[-2:] == ["cpu10", "cpu11"]
    assert state.cpus["cpu11"] == Clock(3600.012, 800.0, 4700.0, None, "powersave")
    assert state.gpu == Clock(2470.0, None, 3003.0, 97.0)
    assert state.celsius == {"x86_pkg_temp": 61.0, "acpitz": 27.8, "gpu": 66.0}
    assert state.passive_celsius == {}  # -274 and 0 degrees stand for none
    assert (state.watts, state.power_limit_watts) == ({"gpu": 318.2}, 450.0)
    assert state.throttle_counts == {"cpu0/core": 4, "cpu0/package": 20, "cpu1/core": 7, "cpu1/package": 20}
    assert state.gpu_reasons == ("sw_power_cap",)
    assert state.gpu_reasons_us == {"sw_power_cap": 91403239, "hw_thermal_slowdown": 0}


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"clocks_event_reasons.active": "0x0000000000000000"}, ()),
        ({"clocks_throttle_reasons.active": "0x0000000000000048"}, ("hw_slowdown", "hw_thermal_slowdown")),
        ({"clocks_throttle_reasons.sw_thermal_slowdown": "Active"}, ("sw_thermal_slowdown",)),
        ({"clocks_event_reasons.hw_slowdown": "Not Active"}, ()),
        ({"clocks_event_reasons.active": "[N/A]", "clocks_event_reasons.hw_slowdown": "[N/A]"}, None),
        ({}, None),
    ],
)
def test_the_drivers_reasons_are_read_in_old_and_new_fields(fields, reasons):
    assert read_state({"nvidia_smi": fields}).gpu_reasons == reasons


def test_what_is_known_is_plain_data(orin, pc):
    for raw in (orin, pc):
        plain = read_state(raw).to_dict()
        assert json.loads(json.dumps(plain)) == plain
    assert read_state(orin).to_dict()["gpu"] == {"mhz": 612, "least_mhz": 306, "most_mhz": 624.75, "load_percent": 98}
    assert read_state({}).to_dict() == {}


@pytest.mark.parametrize("nonsense", [None, "", "sudo: a password is required", float("nan"), [], [1], {}, {"a": None}])
def test_whatever_stands_in_place_of_a_value_is_left_out(orin, pc, nonsense):
    for key in orin.keys() | pc.keys():
        assert read_state({key: nonsense}).to_dict() == {}
        nested = read_state({key: {"gpu": nonsense, "power.draw": nonsense, "clocks_event_reasons.active": nonsense}})
        assert nested.to_dict() == {}


def test_a_machine_that_kept_its_clocks_shows_no_sign(orin, pc):
    for raw in (orin, pc):
        state = read_state(raw)
        assert throttled(state, state) == ()
        assert changed(state, state) == ()
    # a fan, an alert and a trip point that only rings, and the power limit of a card
    hot = read_state(
        orin | {"thermal": {"gpu-thermal": 75000}, "cooling": {"pwm-fan": [3, 3], "hot-surface-alert": [1, 1]}}
    )
    assert throttled(read_state(orin), hot) == ()


def test_counters_that_rise_are_signs(orin, pc):
    later = read_state(pc | {"throttles": {"cpu0": {"core": 4, "package": 32}, "cpu1": {"core": 9, "package": 32}}})
    assert throttled(read_state(pc), later) == (
        "the processor throttled itself for heat 2 times (core_throttle_count)",
        "the processor throttled itself for heat 12 times (package_throttle_count)",
    )
    later = read_state(orin | {"over_current": {"oc1": 0, "oc2": 15, "oc3": 50, "oc4": 1}})
    assert throttled(read_state(orin), later) == ("the board throttled itself 13 times for peak power (oc3_event_cnt)",)
    assert throttled(later, read_state(orin)) == ()  # it started anew in between


def test_heat_is_a_sign_from_the_highest_passive_trip_point_on(orin):
    hot = orin | {"thermal": {"cpu-thermal": 98900, "gpu-thermal": 99500}}
    sentence = "gpu-thermal was at 99.5 C, where clocks are held down from 99.0 C on"
    assert throttled(read_state(orin), read_state(hot)) == (sentence,)
    assert throttled(read_state(hot), read_state(orin)) == (sentence,)


@pytest.mark.parametrize(
    "name",
    ["gpu-throttle-alert", "soc012-throttle-alert", "cpufreq-cpu0", "thermal-cpufreq-0", "devfreq-gpu-gpc-0"],
)
def test_a_cooling_device_that_holds_clocks_down_is_a_sign(name):
    before, after = (read_state({"cooling": {name: [state, 9]}}) for state in (0, 3))
    assert throttled(before, after) == throttled(after, before) == (f"{name} held clocks down (state 3 of 9)",)


def test_a_clock_under_load_below_the_least_that_is_set_is_a_sign(orin):
    # a core at an eighth of the others' clock, as it was posted
    busy = read_state(orin | {"tegrastats": recorded("tegrastats_orin_r36_busy")})
    assert throttled(read_state(orin), busy) == (
        "cpu5 ran at 247 MHz under 93% load, below the 730 MHz that it is set to at the least",
    )
    held = {"jetson_clocks": recorded("jetson_clocks_agx_orin_r39_on")}
    slow = read_state(held | {"tegrastats": "GR3D_FREQ 99%@[650,650]"})
    assert throttled(slow, read_state(held)) == (
        "the GPU ran at 650 MHz under 99% load, below the 1300 MHz that it is set to at the least",
    )


@pytest.mark.parametrize("line", ["GR3D_FREQ 99%@[1290]", "GR3D_FREQ 40%@[650]", "GR3D_FREQ @[650]", "GR3D_FREQ 99%"])
def test_a_clock_is_no_sign_unless_it_is_certain(line):
    state = read_state({"jetson_clocks": recorded("jetson_clocks_agx_orin_r39_on"), "tegrastats": line})
    assert throttled(state, state) == ()


def test_a_governor_that_saves_power_is_no_sign(orin):
    slow = read_state(orin | {"tegrastats": "CPU [97%@729] GR3D_FREQ 99%@[306]"})
    assert throttled(slow, slow) == ()


def test_what_the_driver_holds_down_is_a_sign(pc):
    hot = pc["nvidia_smi"] | {
        "clocks_event_reasons.active": "0x000000000000004c",
        "clocks_event_reasons_counters.sw_power_cap": "99403239 us",
        "clocks_event_reasons_counters.hw_thermal_slowdown": "250000 us",
    }
    assert throttled(read_state(pc), read_state(pc | {"nvidia_smi": hot})) == (
        "the GPU's clock was held down for 250 ms for heat, by the hardware (hw_thermal_slowdown)",
    )
    braked = read_state({"nvidia_smi": {"clocks_event_reasons.active": "0x88"}})
    assert throttled(braked, read_state(pc)) == (
        "the GPU's clock was held down by the power supply's brake (hw_power_brake_slowdown)",
    )


def test_settings_that_changed_are_named_once(orin):
    other = orin | {
        "nvpmodel": recorded("nvpmodel_orin_nano_r36_verbose"),
        "jetson_clocks": recorded("jetson_clocks_orin_nano_r39"),
    }
    assert changed(read_state(orin), read_state(other)) == (
        "power mode changed from MAXN_SUPER (2) to 25W (1)",
        "highest clock of the GPU changed from 625 MHz to 918 MHz",
        "highest clock of the memory changed from 2133 MHz to 3199 MHz",
        "highest clock of the processor changed from 1510 MHz to 1344 MHz",
    )
    nano = [read_state({"jetson_clocks": recorded(f"jetson_clocks_nano_r32_{name}")}) for name in ("on", "off")]
    assert changed(*nano) == (
        "jetson_clocks changed from on to off",
        "least clock of the GPU changed from 922 MHz to 77 MHz",
        "least clock of the processor changed from 1428 MHz to 102 MHz",
    )
    assert changed(*nano[::-1])[0] == "jetson_clocks changed from off to on"


def test_what_is_known_on_one_side_only_did_not_change(orin, pc):
    for raw in (orin, pc):
        assert changed(read_state(raw), State()) == changed(State(), read_state(raw)) == ()


def test_a_governor_and_a_power_limit_can_change(pc):
    cpufreq = {name: facts | {"governor": "performance"} for name, facts in pc["cpufreq"].items()}
    after = read_state(pc | {"cpufreq": cpufreq, "nvidia_smi": pc["nvidia_smi"] | {"power.limit": "300.00"}})
    assert changed(read_state(pc), after) == (
        "power limit of the GPU changed from 450 W to 300 W",
        "governor of the processor changed from powersave to performance",
    )


def test_a_report_gets_the_settings_the_heat_and_the_verdict(orin, pc):
    before = read_state(orin)
    after = dataclasses.replace(before, celsius={"gpu-thermal": 71.4}, watts={"VDD_IN": 18.04})
    assert summary(before, after) == (
        "Power mode MAXN_SUPER, jetson_clocks off, processor up to 1510 MHz, governor schedutil, GPU up to 625 MHz, "
        "59 C before and 71 C after, 16.3 W before and 18.0 W after. Nothing shows that heat or power slowed it down."
    )
    slowed = dataclasses.replace(after, over_current={"oc2": 16}, power_mode="25W", power_mode_number=1)
    assert summary(before, slowed).endswith(
        "It was slowed down: the board throttled itself once for mean power (oc2_event_cnt). "
        "Meanwhile power mode changed from MAXN_SUPER (2) to 25W (1)."
    )
    assert summary(read_state(pc), read_state(pc)).startswith("Processor up to 4700 MHz, governor powersave, GPU up")


def test_a_machine_that_tells_nothing_is_not_called_cool():
    assert summary(State(), State()) == "It does not tell whether heat or power slows it down."
