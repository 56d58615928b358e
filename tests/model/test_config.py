from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny import tiny_config

from vitprune.errors import InputError
from vitprune.model.config import BlockConfig, VitConfig


def test_survives_json():
    config = tiny_config(registers=2, residual="post", norm="rms", gated=True, pool="avg", keep={1: 20}, reducer="evit")
    assert VitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_is_written():
    assert VitConfig.from_dict(tiny_config().to_dict() | {"qk_norm": True}).qk_norm
    assert set(tiny_config().to_dict()) == set(VitConfig.__dataclass_fields__)


def test_counts_tokens():
    config = replace(tiny_config(registers=4, distilled=True), image_size=(30, 21), patch_size=(4, 5))
    assert config.prefix == 6
    assert config.grid == (7, 4)  # what does not fill a patch is not seen
    assert config.patches == 28


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 3}, "unknown key 'heads'"),
        ({"pool": "middle"}, "a model's pool must be 'token' or 'avg' or 'max' or 'avgmax' or 'map', got 'middle'"),
        ({"dim": "32"}, "a model's dim must be int, got '32'"),
        ({"dim": True}, "a model's dim must be int, got True"),
        ({"registers": -1}, "a model's registers must be int, got -1"),
        ({"norm_eps": None}, "a model's norm_eps must be float, got None"),
        ({"gated": 1}, "a model's gated must be bool, got 1"),
        ({"image_size": [28]}, "a model's image_size must be"),
        ({"blocks": [{"heads": 1}]}, "this is not a model.json: TypeError .*qk_dim"),
        ({"blocks": 3}, "this is not a model.json: TypeError"),
    ],
)
def test_names_the_field_that_is_wrong(change, sentence):
    with pytest.raises(InputError, match=sentence):
        VitConfig.from_dict(tiny_config().to_dict() | change)


def test_names_a_missing_field():
    plain = tiny_config().to_dict()
    del plain["dim"]
    with pytest.raises(InputError, match=r"this is not a model.json: TypeError .*dim"):
        VitConfig.from_dict(plain)
    with pytest.raises(InputError, match=r"a model's mlp must be int, got 2.5"):
        BlockConfig(heads=1, qk_dim=2, v_dim=2, scale=1.0, mlp=2.5)
