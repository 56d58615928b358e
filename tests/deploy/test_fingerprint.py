from __future__ import annotations

import json
import os
import stat

import pytest

from vitprune_deploy.latency.fingerprint import compare, device_fingerprint, identity, machine_state


@pytest.fixture
def device():
    return {
        "cpu": "AMD EPYC",
        "architecture": "x86_64",
        "cores": 2,
        "flags": ["avx2", "avx512f"],
        "memory_mb": 16_000,
        "os": "Linux 6.1",
        "gpus": [{"name": "T4", "compute_capability": "7.5", "memory_mb": "15360", "driver": "550.1"}],
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "provider": "cpu",
        "threads": 2,
    }


def test_a_device_is_itself(device):
    here = device_fingerprint("onnxruntime 1.31.1", "cpu", 2)
    assert compare(here, device_fingerprint("onnxruntime 1.31.1", "cpu", 2)) == ([], [])
    assert here["cores"] >= 1
    assert here["cpu"]
    assert (here["runtime"], here["runtime_version"]) == ("onnxruntime", "1.31.1")
    assert json.loads(json.dumps(here)) == here
    assert compare(device, device) == ([], [])


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("cpu", "Intel Xeon"),
        ("architecture", "aarch64"),
        ("cores", 4),
        ("flags", ["avx2"]),
        ("gpus", []),
        ("power_mode", "15W"),
        ("runtime", "tensorrt"),
        ("provider", "cuda"),
        ("threads", 1),
    ],
)
def test_what_changes_the_figures_refuses(device, key, other):
    refusals, _ = compare(device, device | {key: other})
    assert len(refusals) == 1
    assert refusals[0].startswith(f"the device's {key} was ")
    assert str(other) in refusals[0]
    assert identity(device) != identity(device | {key: other})


@pytest.mark.parametrize(("key", "other"), [("os", "Linux 6.9"), ("memory_mb", 32_000), ("runtime_version", "1.32.0")])
def test_what_may_change_the_figures_only_warns(device, key, other):
    refusals, warnings = compare(device, device | {key: other})
    assert refusals == []
    assert len(warnings) == 1
    assert str(other) in warnings[0]


def test_a_little_more_memory_is_no_difference(device):
    assert compare(device, device | {"memory_mb": 16_500}) == ([], [])


def test_another_gpu_refuses_and_another_driver_only_warns(device):
    (gpu,) = device["gpus"]
    refusals, warnings = compare(device, device | {"gpus": [gpu | {"driver": "560.2"}]})
    assert (refusals, len(warnings)) == ([], 1)
    refusals, _ = compare(device, device | {"gpus": [gpu | {"name": "L4"}]})
    assert len(refusals) == 1


def test_a_cache_measures_again_for_a_new_runtime_version_but_not_for_a_new_kernel(device):
    assert identity(device) != identity(device | {"runtime_version": "1.32.0"})
    assert identity(device) == identity(device | {"os": "Linux 6.9", "memory_mb": 1})


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA L4, 8.9, 23034, 550.54"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (gpu,) = device_fingerprint("onnxruntime 1.31.1")["gpus"]
    assert gpu == {"name": "NVIDIA L4", "compute_capability": "8.9", "memory_mb": "23034", "driver": "550.54"}


def test_a_jetsons_power_mode_is_asked_of_nvpmodel(tmp_path, monkeypatch):
    assert device_fingerprint("onnxruntime 1.31.1")["power_mode"] is None
    program = tmp_path / "nvpmodel"
    program.write_text('#!/bin/sh\necho "NV Power Mode: MAXN"\necho 0\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert device_fingerprint("onnxruntime 1.31.1")["power_mode"] == "MAXN"


def test_the_state_of_the_machine_is_plain_data_apart_from_its_identity():
    state = machine_state()
    assert json.loads(json.dumps(state)) == state
    assert not state.keys() & {"cpu", "cores"}
