from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from vitprune.errors import MissingError
from vitprune_deploy import cli
from vitprune_deploy.verbs import doctor


@pytest.fixture(scope="module")
def answer():
    return doctor.doctor()


def test_the_facts_are_json_and_say_what_works_here(answer):
    facts = json.loads(json.dumps(answer.data, allow_nan=False))
    assert facts["packages"]["onnxruntime"]
    assert facts["packages"]["pycuda"] is None or isinstance(facts["packages"]["pycuda"], str)
    assert facts["onnxruntime"]["providers"]["CPUExecutionProvider"] == ""
    assert "AzureExecutionProvider" not in facts["onnxruntime"]["providers"]
    assert "onnxruntime CPUExecutionProvider" in facts["can"]["run"]
    assert facts["tensorrt"].keys() == {"tensorrt", "tensorrt_rtx"}
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_free_mb"] <= facts["machine"]["memory_mb"]
    assert answer.code == 0


def test_the_text_names_the_same(answer):
    lines = answer.text.splitlines()
    assert any(line.split() == ["CPUExecutionProvider", "works"] for line in lines)
    assert any(line.startswith("this machine can") for line in lines)
    assert all(f"- {problem}" in lines for problem in answer.data["problems"])


def test_the_model_that_tries_a_provider_is_a_valid_onnx_file():
    model = onnx.load_from_string(doctor.RELU)
    onnx.checker.check_model(model, full_check=True)
    found = ReferenceEvaluator(model).run(None, {"x": np.array([[-1.0, 2.0]], np.float32)})
    assert found[0].tolist() == [[0.0, 2.0]]


def test_a_provider_that_is_not_there_is_told_with_the_command_that_brings_it():
    assert doctor.try_provider("CPUExecutionProvider") == ""
    assert "pip install onnxruntime-gpu" in doctor.try_provider("CUDAExecutionProvider")
    assert "has no execution provider 'nonsense'" in doctor.try_provider("nonsense")


def test_two_packages_of_onnxruntime_at_once_are_refused_with_code_3_and_the_rest_is_told(monkeypatch, capsys):
    def refuse():
        raise MissingError("onnxruntime and onnxruntime-gpu are both installed")

    monkeypatch.setattr(doctor.ort_backend, "check_packages", refuse)
    monkeypatch.setattr(doctor, "capabilities", dict)
    assert cli.main(["doctor", "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["onnxruntime"]["conflict"] == "onnxruntime and onnxruntime-gpu are both installed"
    assert facts["problems"][0] == facts["onnxruntime"]["conflict"]
    assert facts["machine"]["cores"] >= 1


def test_a_machine_without_torch_or_a_runtime_is_told_how_to_get_them(monkeypatch):
    monkeypatch.setattr(doctor, "is_installed", lambda module: False)
    monkeypatch.setattr(doctor, "capabilities", dict)
    answer = doctor.doctor()
    assert answer.code == 3
    assert answer.data["can"] == {"run": [], "build engines": [], "prune": []}
    assert "no runtime works here; run `pip install 'vitprune[cpu]'`" in answer.data["problems"]
    assert any("pip install 'vitprune[prune]'" in problem for problem in answer.data["problems"])
