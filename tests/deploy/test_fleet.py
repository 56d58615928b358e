"""Several devices in one profile: what each gets, and the page about all."""

from __future__ import annotations

import json

import pytest
from outputs import written

from vitprune.errors import InputError
from vitprune_deploy.artifact import Manifest
from vitprune_deploy.profile import json_schema, load_fleet, load_profile
from vitprune_deploy.report.fleet import Board, fleet_dict, fleet_page

PROFILE = """\
model: {name: vit_tiny_patch16_224}
data: {source: images}
budget: {speedup: 2, threads: 2}
accuracy: {max_drop: 1}
devices:
  laptop: {}
  nx: {host: "ssh://me@nx", extends: devices/orin-nx}
  quick: {host: nano, budget: {speedup: 3}}
"""


@pytest.fixture
def profile(tmp_path):
    (tmp_path / "p.yaml").write_text(PROFILE)
    return tmp_path / "p.yaml"


def test_each_device_gets_the_file_with_what_is_its_own_over_it(profile):
    found = load_fleet(profile)
    assert list(found) == ["laptop", "nx", "quick"]
    assert [one.device.host for one in found.values()] == [None, "ssh://me@nx", "nano"]
    assert [one.runtime.name for one in found.values()] == ["onnxruntime", "tensorrt", "onnxruntime"]
    assert [one.budget.speedup for one in found.values()] == [2, 2, 3]
    assert {one.budget.threads for one in found.values()} == {2}
    assert {one.name for one in found.values()} == {"p"}


def test_a_verb_for_one_device_has_it_chosen_by_name(profile):
    assert load_profile(profile, ["device.host=quick"]).device.host == "nano"
    assert list(load_fleet(profile, ["device.host=quick"])) == ["p"]
    with pytest.raises(InputError, match="it is for one of several; choose one with --host: laptop, nx, quick"):
        load_profile(profile)
    with pytest.raises(InputError, match="choose one with --host"):
        load_profile(profile, ["device.host=ssh://me@elsewhere"])


def test_a_file_for_one_device_is_a_fleet_of_one(profile):
    profile.write_text(PROFILE.partition("devices")[0])
    assert load_fleet(profile) == {"p": load_profile(profile)}


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ("devices: [a, b]", "devices: must be a mapping of names"),
        ("devices: {a: ssh://x}", r"devices\.a: must be keys such as host, got 'ssh://x'"),
        ("devices: {a/b: {}}", "devices: a name is letters, digits"),
        ("devices: {a: {hots: x}}", "hots: is no key"),
        ("devices: {a: {extends: devices/nobody}}", "there is no such file"),
        ("devices: {a: {host: 'ssh://me:secret@x'}}", "must hold no password"),
    ],
)
def test_what_is_wrong_with_a_device_is_a_sentence(profile, devices, why):
    profile.write_text(PROFILE.partition("devices")[0] + devices)
    with pytest.raises(InputError, match=why) as caught:
        load_fleet(profile)
    assert "secret" not in str(caught.value)


def test_editors_know_the_key():
    assert json_schema()["properties"]["devices"]["additionalProperties"] == {"type": "object"}


def test_the_page_has_a_row_for_each_device_and_says_what_is_missing(tmp_path):
    (tmp_path / "one").mkdir()
    manifest = Manifest.load(written(tmp_path / "one"))
    boards = [Board("one<b>", None, manifest, ""), Board("two", "ssh://me@two", None, "two cannot be reached")]
    page = fleet_page(boards)
    assert "one&lt;b&gt;/report.html" in page
    assert "two cannot be reached" in page
    assert page.count("not built") == 1
    plain = json.loads(json.dumps(fleet_dict(boards)))
    assert plain["two"] == {"host": "ssh://me@two", "error": "two cannot be reached"}
    assert plain["one<b>"]["verdict"] == manifest.verdict
