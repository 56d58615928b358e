"""The fusion report: what real ONNX Runtime made of exported graphs, and what OpenVINO and TensorRT say they made.

OpenVINO is asked where it is installed; what it said of one block is recorded below. TensorRT's inspector needs a GPU:
its sample is written by hand after NVIDIA's documentation and the notes of TensorRT's ONNX parser, not recorded.
"""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper
from tiny import tiny_vit

from vitprune.errors import NotSupported
from vitprune_deploy import cli
from vitprune_deploy.backends._kernels import of_openvino, of_tensorrt
from vitprune_deploy.export.onnx import export_onnx
from vitprune_deploy.validate import fusion
from vitprune_deploy.validate.fusion import Attention, Core, broken, cores, fusion_rows, head_sizes, refused_heads


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dense model whose attention is one node, and a pruned one whose attention is written out."""
    folder = tmp_path_factory.mktemp("fusion")
    export_onnx(tiny_vit(depth=2), folder / "dense.onnx", opset=23)
    export_onnx(tiny_vit(depth=2, reducer="evit", keep={0: 30}), folder / "pruned.onnx", opset=20)
    return folder / "dense.onnx", folder / "pruned.onnx"


# ---- ONNX Runtime, for real ----------------------------------------------------------------------------------------


def test_exported_nodes_bear_the_names_of_their_modules(files):
    graph = onnx.load(files[1]).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    by_type = {node.op_type: node.name.rpartition("_")[0] for node in graph.node}
    assert by_type["Conv"] == "patch_embed/Conv"
    assert by_type["Gelu"] == "blocks.1.mlp.act/Gelu"
    assert by_type["TopK"] == "blocks.0.reducer/TopK"
    assert not any("module" in name for name in names)


def test_attention_is_found_block_by_block_and_a_token_methods_own_is_none(files):
    for path, nodes in zip(files, (["Attention"], ["MatMul", "Softmax", "MatMul"]), strict=True):
        graph = onnx.load(path).graph
        kinds = {node.name: node.op_type for node in graph.node}
        assert sum(kind == "Softmax" for kind in kinds.values()) in (0, 3)  # two blocks, and the scores of EViT
        found = cores(graph)
        assert [core.block for core in found] == [0, 1]
        assert [[kinds[name] for name in core.nodes] for core in found] == [nodes, nodes]


def test_what_onnxruntime_fuses_is_read_from_the_graph_that_it_runs(files):
    dense, pruned = (fusion.in_onnxruntime(path, threads=1) for path in files)
    assert [one.block for one in dense] == [one.block for one in pruned] == [0, 1]
    assert [(one.fused, one.kernels) for one in dense] == [(True, ("Attention",))] * 2
    assert [(one.fused, one.kernels[1:]) for one in pruned] == [(False, ("Softmax", "MatMul"))] * 2
    assert "MatMul" in pruned[0].kernels[0]  # or a fused one with the scale in it
    for one in (*dense, *pruned):  # out of one split, queries, keys, values and the result turn their axes
        assert one.around["copy"] == 1
        assert 4 <= one.around["transpose"] <= 5


def test_a_fusion_that_the_pruned_model_no_longer_has_is_warned_of(files):
    dense, pruned = (fusion.in_onnxruntime(path) for path in files)
    warnings = broken(dense, pruned)
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "pruning broke a fusion: the attention of block 0 is one kernel in the dense model (Attention), and "
    )
    assert warnings[0].endswith("Softmax + MatMul in the pruned one")
    assert broken(dense, dense) == broken(pruned, pruned) == broken(pruned, dense) == []


def test_a_block_that_was_dropped_or_is_not_known_is_no_broken_fusion():
    one, unknown = Attention(0, True, ("mha",), {}), Attention(0, None, (), {})
    assert broken([one, Attention(1, True, ("mha",), {})], [one]) == []
    assert broken([one], [unknown]) == []


def test_a_provider_that_keeps_its_graph_to_itself_is_not_supported(files, monkeypatch):
    from vitprune.errors import DamagedFile
    from vitprune_deploy.backends import onnxruntime as backend

    def fails(*arguments):
        raise DamagedFile("Unable to serialize model as it contains compiled nodes.")

    monkeypatch.setattr(backend, "_open", fails)
    with pytest.raises(NotSupported, match=r"CPUExecutionProvider does not show what it made of dense\.onnx"):
        fusion.in_onnxruntime(files[0])


# ---- graphs of others ----------------------------------------------------------------------------------------------


def written_out(between=(), name="/vit/encoder/layer/layer.7/attention/"):
    """Queries times keys, ``between``, a softmax, its product with the values; each of these a product with weights."""
    chain = ["QK", *(f"{kind}{i}" for i, kind in enumerate(between)), "P"]
    nodes = [helper.make_node("MatMul", ["x", "w"], [name_], name=f"{name}{name_}") for name_ in ("q", "k", "v")]
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["QK"], name=f"{name}MatMul"))
    for kind, (source, target) in zip((*between, "Softmax"), pairwise(chain), strict=True):
        others = ["mask"] if kind in ("Add", "Mul") else []
        more = {"to": TensorProto.FLOAT} if kind == "Cast" else {}
        nodes.append(helper.make_node(kind, [source, *others], [target], name=f"{name}{kind}", **more))
    nodes.append(helper.make_node("MatMul", ["P", "v"], ["y"], name=f"{name}MatMul_1"))
    ends = [helper.make_tensor_value_info(name_, TensorProto.FLOAT, None) for name_ in "xy"]
    weights = [helper.make_tensor(name_, TensorProto.FLOAT, [1], [1.0]) for name_ in ("w", "mask")]
    return helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)


@pytest.mark.parametrize("between", [(), ("Mul",), ("Add",), ("Mul", "Add", "Cast")])
def test_attention_of_other_exporters_is_found_by_its_shape(between):
    (core,) = cores(written_out(between))
    assert core.block == 7
    assert [name.rpartition("/")[2] for name in core.nodes] == ["MatMul", "Softmax", "MatMul_1"]
    assert core.heads == ("q", "v")


def test_a_softmax_that_weighs_nothing_is_no_attention():
    graph = written_out()
    graph.node.remove(graph.node[-1])
    assert cores(graph) == []
    classifier = written_out()
    del classifier.node[3:-1]
    classifier.node.insert(3, helper.make_node("Softmax", ["q"], ["P"]))  # of a product with weights
    assert cores(classifier) == []


def test_names_that_say_nothing_leave_the_block_open():
    assert [core.block for core in cores(written_out(name="n"))] == [None]


# ---- OpenVINO ------------------------------------------------------------------------------------------------------

# name, layerType, originalLayersNames, inputs: one block of a dense model, OpenVINO 2026.4.1 in bf16 on an x86 CPU
RECORDED = [
    ("blocks.0.attn.qkv/Add_10", "FullyConnected", "blocks.0.attn.qkv/Add_10", []),
    ("Split_11", "Split", "Split_11", ["blocks.0.attn.qkv/Add_10:0"]),
    ("Multiply_4482", "Eltwise", "Multiply_4482", ["Split_11:0"]),
    ("blocks.0/Reshape_12", "Reshape", "blocks.0/Reshape_12", ["Multiply_4482:0"]),
    ("blocks.0/Reshape_14", "Reshape", "blocks.0/Reshape_14", ["Split_11:1"]),
    ("blocks.0.attn/Transpose_18", "Transpose", "blocks.0.attn/Transpose_18", ["blocks.0/Reshape_14:0"]),
    ("blocks.0/Reshape_15", "Reshape", "blocks.0/Reshape_15", ["Split_11:2"]),
    ("blocks.0.attn/MatMul_21", "Subgraph",
     "blocks.0/Transpose_13,blocks.0.attn/MatMul_19,blocks.0.attn/Softmax_20,blocks.0/Transpose_16,"
     "blocks.0.attn/MatMul_21",
     ["blocks.0/Reshape_12:0", "blocks.0.attn/Transpose_18:0", "blocks.0/Reshape_15:0"]),
    ("blocks.0.attn/Transpose_22", "Transpose", "blocks.0.attn/Transpose_22", ["blocks.0.attn/MatMul_21:0"]),
    ("blocks.0.attn/Reshape_23", "Reshape", "blocks.0.attn/Reshape_23", ["blocks.0.attn/Transpose_22:0"]),
    ("blocks.0.attn.proj/Add_25", "FullyConnected", "blocks.0.attn.proj/Add_25", ["blocks.0.attn/Reshape_23:0"]),
]  # fmt: skip
ATTENDS = Core(0, ("blocks.0.attn/MatMul_19", "blocks.0.attn/Softmax_20", "blocks.0.attn/MatMul_21"), ("q", "v"))


class DoubleNode:
    """A node of a runtime model, with the calls of OpenVINO's Python interface that are used."""

    def __init__(self, name, kind, origins, inputs, outputs):
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.info = {"layerType": SimpleNamespace(value=kind), "originalLayersNames": SimpleNamespace(value=origins)}

    def get_friendly_name(self):
        return self.name

    def get_rt_info(self):
        return self.info

    def get_input_size(self):
        return len(self.inputs)

    def get_output_size(self):
        return self.outputs

    def input_value(self, place):
        name, _, index = self.inputs[place].rpartition(":")
        return SimpleNamespace(get_node=lambda: DoubleNode(name, "", "", [], 1), get_index=lambda: int(index))


def runtime_model(nodes):
    made = [DoubleNode(*node, outputs=3 if node[1] == "Split" else 1) for node in nodes]
    return SimpleNamespace(get_ordered_ops=lambda: made)


def test_openvinos_kernels_say_which_nodes_they_were_made_of():
    (found,) = fusion.what_became([ATTENDS], of_openvino(runtime_model(RECORDED)))
    assert found == Attention(0, True, ("Subgraph",), {"copy": 1, "transpose": 2})


def test_openvinos_kernels_apart_are_no_fusion():
    apart = [*RECORDED[:7]]
    apart += [("a", "MatMul", ATTENDS.nodes[0], RECORDED[7][3][:2]), ("b", "Softmax", ATTENDS.nodes[1], ["a:0"]),
              ("a_f32_bf16_c", "Reorder", "", ["b:0"]),
              (RECORDED[7][0], "MatMul", ATTENDS.nodes[2], ["a_f32_bf16_c:0", RECORDED[7][3][2]])]  # fmt: skip
    apart += RECORDED[8:]
    (found,) = fusion.what_became([ATTENDS], of_openvino(runtime_model(apart)))
    assert (found.fused, found.kernels) == (False, ("MatMul", "Softmax", "MatMul"))
    assert found.around == {"copy": 1, "reformat": 1, "transpose": 2}


def test_openvino_is_asked_where_it_is_installed(files):
    pytest.importorskip("openvino")
    for path in files:
        found = fusion.in_openvino(path, {"INFERENCE_PRECISION_HINT": "f32"})
        assert [one.block for one in found] == [0, 1]
        assert [(one.fused, one.kernels) for one in found] == [(True, ("Subgraph",))] * 2
        assert all(one.around["copy"] == 1 for one in found)


# ---- TensorRT ------------------------------------------------------------------------------------------------------


def layer(name, kind, nodes, inputs, outputs, between="\x1f"):
    """A layer as the inspector writes it; versions separate the notes of the parser in different ways."""
    ends = [[{"Name": one, "Dimensions": [8, 197, 384], "Format/Datatype": "Half"} for one in names]
            for names in (inputs, outputs)]  # fmt: skip
    noted = between.join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "LayerType": kind, "Inputs": ends[0], "Outputs": ends[1], "TacticName": "", "Metadata": noted}


def attends(block):
    nodes = tuple(f"blocks.{block}.attn/{name}" for name in ("MatMul_1", "Softmax_2", "MatMul_3"))
    return Core(block, nodes, ("q", "v"))


def by_hand(between="\x1f"):
    """Two blocks by the inspector: the attention of the first is one kernel, that of the second three."""
    first, second = attends(0).nodes, attends(1).nodes
    layers = [
        layer("qkv_myl0_0", "gemm", ["blocks.0.attn.qkv/MatMul_0"], ["x"], ["qkv"]),
        layer("__myl_TranReshMove_myl0_1", "kgen", ["blocks.0/Transpose_4"], ["qkv"], ["q"]),
        layer("Reformatting CopyNode for Input Tensor 1", "Reformat", [], ["qkv"], ["k"]),
        layer("__myl_Cast_myl0_2", "kgen", [first[2]], ["qkv"], ["v"]),
        layer("_gemm_mha_v2_myl0_3", "kgen", first, ["q", "k", "v"], ["y"], between),
        layer("__myl_TraRes_myl0_4", "kgen", ["blocks.0.attn/Transpose_6"], ["y"], ["z"]),
        layer("proj_myl0_5", "gemm", ["blocks.0.attn.proj/MatMul_7"], ["z"], ["out"]),
        layer("qk_myl0_6", "gemm", [second[0]], ["q1", "k1"], ["s"]),
        layer("__myl_MaxSubExpSumDivMul_myl0_7", "kgen", [second[1]], ["s"], ["p"]),
        layer("pv_myl0_8", "gemm", [second[2]], ["p", "v1"], ["y1"]),
    ]
    return json.loads(json.dumps({"Layers": layers, "Bindings": ["images", "logits"]}))


@pytest.mark.parametrize("between", ["\x1f", "\x1e", ""])
def test_tensorrts_layers_say_which_nodes_they_were_made_of(between):
    fused, apart = fusion.what_became([attends(0), attends(1)], of_tensorrt(by_hand(between)))
    assert fused == Attention(0, True, ("_gemm_mha_v2_myl0_3",), {"cast": 1, "reformat": 1, "transpose": 2})
    assert apart.fused is False
    assert apart.kernels == ("gemm", "__myl_MaxSubExpSumDivMul_myl0_7", "gemm")


def test_one_attention_node_that_fell_apart_in_tensorrt_is_no_fusion():
    core = Core(0, ("blocks.0.attn/Attention_1",), ("q", "v"))
    whole = {"Layers": [layer("_gemm_mha_v2_myl0_3", "kgen", core.nodes, ["q"], ["y"])]}
    parts = {"Layers": [layer(n, "gemm", core.nodes, [n], [f"{n}y"]) for n in ("qk", "pv")]}
    alone = {"Layers": [layer("qk", "gemm", core.nodes, ["q"], ["y"])]}  # the rest goes by no name
    found = [fusion.what_became([core], of_tensorrt(one))[0] for one in (whole, parts, alone)]
    assert [one.fused for one in found] == [True, False, False]


def test_an_engine_that_tells_only_names_or_whole_parts_leaves_its_fusions_unknown():
    names = ["_gemm_mha_v2_myl0_3", "proj_myl0_5"]
    part = [
        layer("{ForeignNode[blocks.0.attn.qkv/MatMul_0...blocks.1/Add_9]}", "Myelin", attends(0).nodes, ["x"], ["y"])
    ]
    for layers in (names, part):
        (found,) = fusion.what_became([attends(0)], of_tensorrt({"Layers": layers, "Bindings": ["images", "logits"]}))
        assert (found.fused, found.became()) == (None, "not known")


def test_a_node_inside_a_function_is_noted_with_where_it_was_called():
    noted = layer("a", "kgen", ["blocks.0.attn/MatMul_1 | call_0 (Attention)"], [], [])
    assert of_tensorrt({"Layers": [noted]})[0].origins == ("blocks.0.attn/MatMul_1",)


# ---- heads that TensorRT's fused attention refuses -----------------------------------------------------------------


def test_head_sizes_are_read_from_the_graph(files, tmp_path):
    for path in files:
        assert head_sizes(onnx.load(path)) == [(0, 8, 8), (1, 8, 8)]


@pytest.mark.parametrize("size", [8, 15, 20, 250, 264])
def test_tensorrt_takes_heads_from_16_to_256_in_eights(size):
    assert len(refused_heads([(0, size, size)])) == 1
    assert refused_heads([(0, 16, 24), (1, 64, 256)]) == []


def test_refused_heads_are_told_by_size_with_their_blocks():
    assert refused_heads([(0, 64, 64), (1, 64, 12), (2, 12, 12), (None, 4, 64)]) == [
        f"TensorRT's fused attention takes heads of 16 to 256 channels in multiples of 8, and those of block {which}"
        for which in ("1, 2 have 12", "? have 4")
    ]


# ---- what a person sees --------------------------------------------------------------------------------------------


def test_inspect_shows_the_attention_of_a_file_and_the_heads_that_tensorrt_refuses(files, capsys):
    assert cli.main(["inspect", str(files[0])]) == 0
    text = capsys.readouterr().out
    assert "attention in onnxruntime" in text
    assert "0 one kernel: Attention 1 copy, 4 transpose" in [" ".join(line.split()) for line in text.splitlines()]
    assert "warning: TensorRT's fused attention takes heads of 16 to 256" in text
    assert cli.main(["inspect", str(files[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["fusion"]
    assert [one["block"] for one in found["runtimes"]["onnxruntime"]["attention"]] == [0, 1]
    assert len(found["warnings"]) == 1


def test_inspect_of_a_file_that_a_runtime_does_not_take_says_so(tmp_path, capsys):
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape) for name, shape in (("x", [2, 2]), ("y", ()))
    )
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "d.onnx")
    assert cli.main(["inspect", str(tmp_path / "d.onnx")]) == 0
    assert "attention in onnxruntime: not known, " in capsys.readouterr().out


def test_rows_for_a_report_put_the_dense_block_beside_the_pruned_one():
    dense = [Attention(0, True, ("mha",), {}), Attention(1, True, ("mha",), {})]
    pruned = [Attention(0, False, ("MatMul", "Softmax", "MatMul"), {"cast": 2}), Attention(None, None, (), {})]
    noted = {"dense": [one.to_dict() for one in dense], "pruned": [one.to_dict() for one in pruned]}
    assert fusion_rows(json.loads(json.dumps(noted))) == [
        ("0", "one kernel: mha", "MatMul + Softmax + MatMul", "2 cast"),
        ("-", "-", "not known", "nothing"),
    ]
    assert fusion_rows(None) == []
