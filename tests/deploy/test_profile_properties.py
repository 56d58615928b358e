"""Whatever a file holds: a valid profile, or one InputError whose every line is a sentence."""

from __future__ import annotations

import random
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitprune.errors import InputError
from vitprune_deploy.profile import Profile, list_profiles, load_profile

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
FILES = [listed.path for listed in list_profiles()]
# the shipped profiles, one whole with every key spelled out, so that each key is changed in turn
WHOLE = load_profile("deit-small-x86", ["input.dynamic_height={min: 112, max: 448, step: 16}"]).to_yaml()
TEXTS = [*(path.read_text() for path in FILES), WHOLE]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=12),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["", "auto", "none", "fp16", "fp32", "tensorrt", "8.7", "timm:", "../x", "~nobody/x", "a" * 5000]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3))


def load(content: bytes, folder: Path, overrides: list[str] | None = None) -> None:
    """Loads ``content``; anything else than a valid profile or an InputError fails the test."""
    path = folder / "p.yaml"
    path.write_bytes(content)
    try:
        profile = load_profile(path, overrides or [], files_exist=False)
    except InputError as error:
        lines = str(error).split("\n")
        assert lines
        assert all(": " in line and line.isprintable() for line in lines), lines
    else:
        assert isinstance(profile, Profile)
        resolved = folder / "resolved.yaml"
        resolved.write_text(profile.to_yaml(), encoding="utf-8")
        assert load_profile(resolved) == profile


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """All paths of keys and indices in ``tree``."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(deep for key, inner in inside for deep in places(inner, (*path, key)))]


def changed(tree: object, path: tuple, change: str, value: object) -> object:
    """``tree`` with what stands at ``path`` replaced, removed, doubled or put under another key."""
    if not path:
        return value
    inner = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) > 1:
        inner[path[0]] = changed(inner[path[0]], path[1:], change, value)
    elif change == "replace":
        inner[path[0]] = value
    elif change == "remove":
        del inner[path[0]]
    elif change == "wrap":
        inner[path[0]] = [inner[path[0]]] if isinstance(value, bool) else {"x": inner[path[0]]}
    elif isinstance(inner, dict):
        inner[f"{path[0]}x"] = inner.pop(path[0])
    return inner


@SETTINGS
@given(content=st.binary(max_size=300))
def test_random_bytes(tmp_path_factory, content):
    load(content, tmp_path_factory.mktemp("p"))


@SETTINGS
@given(text=st.sampled_from(TEXTS), seed=st.integers(0, 2**32), edits=st.integers(1, 8))
def test_shipped_profiles_with_bytes_changed_removed_and_inserted(tmp_path_factory, text, seed, edits):
    content, dice = bytearray(text.encode()), random.Random(seed)
    for _ in range(edits):
        at = dice.randrange(len(content))
        inserted = bytes(dice.choices(b"\x00\t\n :-[]{}&*!|>'\"%@`#,?09azAZ\\\xff", k=dice.randrange(3)))
        content[at : at + dice.randrange(4)] = inserted
    load(bytes(content), tmp_path_factory.mktemp("p"))


@settings(SETTINGS, max_examples=100)
@given(
    text=st.sampled_from([*TEXTS, *[WHOLE] * len(TEXTS)]),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["replace", "remove", "wrap", "rename"]), values),
        min_size=1,
        max_size=3,
    ),
)
def test_shipped_profiles_with_keys_and_values_changed(tmp_path_factory, text, edits):
    tree = yaml.safe_load(text)
    for share, change, value in edits:
        options = places(tree)
        tree = changed(tree, options[int(share * len(options))], change, value)
    load(yaml.safe_dump(tree, allow_unicode=True).encode(), tmp_path_factory.mktemp("p"))


@SETTINGS
@given(
    key=st.sampled_from(["seed", "budget", "budget.latency_ms", "input.batch", "model.args", "extends", "prune.tokens"])
    | st.text(max_size=10),
    value=st.text(max_size=20) | values.map(lambda value: yaml.safe_dump(value)),
)
def test_overrides(tmp_path_factory, key, value):
    load(WHOLE.encode(), tmp_path_factory.mktemp("p"), [f"{key}={value}"])


@SETTINGS
@given(extends=values)
def test_what_is_extended(tmp_path_factory, extends):
    load((yaml.safe_dump({"extends": extends}) + WHOLE).encode(), tmp_path_factory.mktemp("p"))
