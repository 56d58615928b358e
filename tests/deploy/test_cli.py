"""The command: what each verb takes and prints, and which exit code each kind of failure gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitprune.errors import BudgetUnreachable, DamagedFile, InputError, MissingError
from vitprune.search.counts import Counts
from vitprune.search.frontier import Point
from vitprune_deploy import cli, profile
from vitprune_deploy.console import Console
from vitprune_deploy.verbs import building, lists
from vitprune_deploy.verbs.answer import Answer, table
from vitprune_deploy.verbs.building import budget_overrides, parse_budget

ROOT = Path(__file__).parent.parent.parent
VERBS = ["build", "init", "check", "measure", "search", "export", "refit", "validate", "bench", "inspect", "visualize",
         "package", "doctor", "schema", "profiles", "devices"]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments, code="from vitprune_deploy.cli import main; sys.exit(main())"):
    """The command as a process of its own; ``code`` may prepare it."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "deploy")])
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def failing(monkeypatch, error):
    """Has the verb ``profiles`` fail with ``error``."""

    def fail():
        raise error

    monkeypatch.setattr(lists, "profiles", fail)


def test_help_lists_every_verb_and_every_exit_code(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.split("Commands:")[1].split("Example:")[0].strip().splitlines()] == VERBS
    assert all(f"\n    {code} " in text for code in (0, 1, 2, 3, 70, 130))


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_has_an_example_and_the_exit_codes(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"    vitprune-deploy {verb}" in text.split("Example:")[1]
    assert "interrupted: the same command goes on from there" in text


def test_no_arguments_at_all_show_the_help(capsys):
    assert cli.main([]) == 0
    assert "Usage: vitprune-deploy" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "vitprune 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bild"], "No such command 'bild'"),
        (["build"], "Missing argument"),
        (["bench", "x.onnx", "--batch", "none"], "Invalid value for '--batch'"),
        (["doctor", "--nonsense"], "No such option"),
        (["build", "no-such-profile"], "no-such-profile: there is no such file"),
        (["build", "quickstart", "--budget", "fast"], "--budget must be milliseconds such as 5 or 5ms, or a speed-up"),
        (["bench", "x.onnx", "--image-size", "big"], "--image-size must be pixels such as 224 or 224x160, got 'big'"),
        (["bench", "x.onnx"], "x.onnx: there is no such model file"),
        (["inspect", "nothing"], "nothing: there is no such file or folder"),
        (["validate", "nothing"], "nothing: there is no such folder"),
        (["refit", "a.plan", "m.onnx", "--output", "b.plan"], "a.plan: there is no such file; build the engine again"),
        (
            ["refit", "a.plan", "m.onnx", "--output", "a.plan"],
            "--output a.plan is the engine itself; give another name",
        ),
        (["package", "triton", "nothing"], "nothing: there is no such folder"),
        (["package", "tritton", "nothing"], "package makes triton, got 'tritton'"),
    ],
)
def test_wrong_input_is_told_in_a_sentence_on_stderr_with_exit_code_2(arguments, said, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


def test_all_lines_of_a_wrong_profile_are_shown(capsys):
    Path("wrong.yaml").write_text("budgett: {}\nmodel: {name: vit_tiny_patch16_224}\nseed: x\n")
    assert cli.main(["build", "wrong.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("error: wrong.yaml") for line in lines)
    assert lines[0].startswith("error: wrong.yaml:1: budgett: is no key of a profile; did you mean budget?")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("a is wrong\nb is wrong"), 2, "error: a is wrong\nerror: b is wrong\n"),
        (DamagedFile("model.onnx is cut off"), 2, "error: model.onnx is cut off\n"),
        (MissingError("no GPU"), 3, "error: no GPU\n"),
        (BudgetUnreachable("too fast", 3.0), 1, "error: too fast\n"),
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            3,
            "error: timm cannot be imported (No module named 'timm'); run `pip install 'vitprune[prune,cpu]'`\n",
        ),
        (
            ModuleNotFoundError("No module named 'nonsense'", name="nonsense"),
            70,
            "error: a bug of vitprune: ModuleNotFoundError: No module named 'nonsense'; run again with -v",
        ),
        (ValueError("x\ny"), 70, "error: a bug of vitprune: ValueError: x y; run again with -v and report it\n"),
        (EOFError(), 70, "error: a bug of vitprune: EOFError; run again with -v and report it\n"),
        (MemoryError(), 3, "error: the machine ran out of memory; "),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_a_sentence(error, code, said, monkeypatch, capsys):
    failing(monkeypatch, error)
    assert cli.main(["profiles"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["-v", "profiles"], ["profiles", "-v"]])
def test_a_traceback_is_shown_with_v_only(arguments, monkeypatch, capsys):
    failing(monkeypatch, ValueError("broken"))
    assert cli.main(arguments) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_exit_code_of_an_answer_is_that_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(lists, "profiles", lambda: Answer("missed", {"verdict": "fail"}, 1))
    assert cli.main(["profiles"]) == 1
    assert cli.main(["profiles", "--json"]) == 1
    assert capsys.readouterr().out == 'missed\n{\n "verdict": "fail"\n}\n'


def test_json_never_holds_what_is_no_json(monkeypatch, capsys):
    monkeypatch.setattr(lists, "profiles", lambda: Answer("x", {"ms": float("nan")}))
    assert cli.main(["profiles", "--json"]) == 70
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_with_130_and_what_is_half_done_is_cleaned_up(sent):
    code = """
import pathlib, signal, time
from vitprune_deploy.verbs import building, lists
from vitprune_deploy.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from the start

def slow():
    try:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(30)
    finally:
        pathlib.Path("cleaned").touch()

lists.profiles = slow
sys.exit(main(["profiles"]))
"""
    process = command(code=code)
    assert process.stderr.readline() == "ready\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted; the same command goes on from here\n")
    assert Path("cleaned").exists()


def test_a_reader_that_goes_away_is_no_error():
    process = command("schema")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 0


def test_a_missing_package_is_named_with_the_command_that_brings_it():
    Path("my.yaml").write_text(small_profile())
    Path("images").mkdir()
    hidden = "sys.modules['torch'] = None; from vitprune_deploy.cli import main; sys.exit(main())"
    process = command("build", "my.yaml", code=hidden)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "pip install 'vitprune[prune,cpu]'" in err
    assert out == ""


def small_profile(**changes):
    values = {"model": {"name": "vit_tiny_patch16_224", "pretrained": False}, "data": {"source": "images"},
              "budget": {"speedup": 2.0}, "accuracy": {"max_drop": 1.0}}  # fmt: skip
    return profile.commented_yaml(values | changes)


def test_schema_is_json_of_the_profile(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"model", "data", "budget", "extends"}


def test_profiles_lists_what_is_shipped(capsys):
    assert cli.main(["profiles"]) == 0
    text = capsys.readouterr().out
    assert "\nquickstart " in text
    assert "\ndevices/orin-nx " in text
    assert cli.main(["profiles", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["devices/t4"]["is_device"]
    assert not listed["quickstart"]["is_device"]


def test_a_table_aligns_its_columns():
    text = table([["a", 1], ["long", 23]], head=["name", "ms"], right=[1])
    assert text == "name  ms\na      1\nlong  23"
    assert table([]) == ""


def test_a_budget_is_milliseconds_or_a_speed_up_and_replaces_the_profile_s():
    assert parse_budget("5") == parse_budget("5ms") == ("latency_ms", 5.0)
    assert parse_budget("1.5x") == ("speedup", 1.5)
    for wrong in ("0", "-1", "x", "5s", "nan", ""):
        with pytest.raises(InputError, match="--budget must be"):
            parse_budget(wrong)
    Path("images").mkdir()
    Path("my.yaml").write_text(small_profile())
    changed = profile.load_profile("my.yaml", budget_overrides("7ms"))
    assert (changed.budget.latency_ms, changed.budget.speedup) == (7.0, None)


def points():
    found = [(2.0, 0.9, (1, 0)), (3.0, 0.5, (2, 1)), (8.0, 0.0, (4, 4))]
    return [Point(ms, ms, loss, Counts(heads, (16, 16), (49, 20)), "evit") for ms, loss, heads in found]


def test_each_budget_gets_the_plan_of_least_loss_or_the_time_of_the_fastest_one():
    rows = building._picked(points(), [("2x", 4.0), ("3ms", 3.0), ("1ms", 1.0)])
    assert [row["predicted_ms"] for row in rows] == [3.0, 3.0, None]
    assert [row["budget_ms"] for row in rows] == [4.0, 3.0, 1.0]
    assert rows[0]["counts"]["heads"] == [2, 1]
    assert (rows[2]["counts"], rows[2]["fastest_ms"]) == (None, 2.0)
    text = building._frontier_text(rows, 8.0)
    assert text.startswith("the dense model takes 8 ms\n")
    assert " 2.67x  " in text
    assert "the fastest plan takes 2 ms" in text
    assert "2x: block      0   1\nheads          2   1" in text


def test_a_long_frontier_is_thinned_for_a_person_and_keeps_its_ends():
    rows = [building._row(None, point) for point in points()[:1] * 99 + points()[2:]]
    lines = building._frontier_text(rows, 8.0).splitlines()
    assert len(lines) <= building.MOST_ROWS + 4
    assert lines[-1].split()[:2] == ["8", "8"]


def write_onnx(path, batch="batch", width=16, operator="Relu"):
    """A model of one matrix product, its batch free unless a number is given."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(torch.randn(width, width).numpy(), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(operator, ["h"], ["y"])]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"vitprune.base_model": "none"})
    onnx.save(model, str(path))


def test_bench_measures_two_files_in_turn_with_interval_and_circumstances(capsys):
    write_onnx("small.onnx")
    write_onnx("large.onnx", width=512)
    arguments = ["bench", "small.onnx", "--against", "large.onnx", "--batch", "8", "--threads", "1", "--seconds", "2"]
    assert cli.main([*arguments, "--json"]) in (0, 1)  # 1: others used the machine
    found = json.loads(capsys.readouterr().out)
    first, second = found["results"]
    assert (first["file"], second["file"]) == ("large.onnx", "small.onnx")
    assert all(0 < one["low_ms"] <= one["value_ms"] <= one["high_ms"] for one in (first, second))
    assert second["of_first"]["value"] == pytest.approx(second["value_ms"] / second["reference_ms"])
    assert found["circumstances"]["shapes"] == [{"x": [8, 512]}, {"x": [8, 16]}]
    assert found["circumstances"]["device"]["threads"] == 1
    assert len(first["sha256"]) == 64


def test_bench_says_what_a_file_leaves_open(capsys):
    write_onnx("fixed.onnx", batch=4)
    assert cli.main(["bench", "fixed.onnx", "--seconds", "1"]) == 2
    assert "input x has a fixed batch of 4; run with --batch 4" in capsys.readouterr().err
    Path("cut.onnx").write_bytes(Path("fixed.onnx").read_bytes()[:100])
    assert cli.main(["bench", "cut.onnx"]) == 2
    assert "cut.onnx is cut off or not an ONNX model" in capsys.readouterr().err


def test_inspect_counts_the_nodes_of_an_onnx_file(capsys):
    write_onnx("model.onnx")
    assert cli.main(["inspect", "model.onnx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == {"MatMul": 1, "Relu": 1}
    assert found["inputs"] == [{"name": "x", "type": "float", "shape": ["batch", 16]}]
    assert found["opsets"] == {"ai.onnx": 17}
    assert found["metadata"] == {"vitprune.base_model": "none"}
    assert cli.main(["inspect", "model.onnx"]) == 0
    assert "float [batch, 16]" in capsys.readouterr().out
    Path("cut.onnx").write_bytes(Path("model.onnx").read_bytes()[:200])
    assert cli.main(["inspect", "cut.onnx"]) == 2


def test_the_console_of_a_quiet_command_is_quiet(monkeypatch, capsys):
    def talk(console: Console, *_, **__):
        console.say("talk")
        return Answer("data", {})

    monkeypatch.setattr("vitprune_deploy.verbs.check.check", talk)
    assert cli.main(["check", "quickstart", "-q"]) == 0
    assert capsys.readouterr() == ("data\n", "")
    assert cli.main(["check", "quickstart"]) == 0
    assert capsys.readouterr() == ("data\n", "talk\n")
