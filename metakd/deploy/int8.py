"""An exported model in int8: weights per output channel, activations with one scale.

A scale of activations is either found in each batch (dynamic) or fixed beforehand, from texts like
those to be served (static): then what a text is told does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

_LEVELS = 255  # of an unsigned byte, above the lowest


def quantise(fp32: Path, int8: Path, plan: Sequence[tuple[tuple[int, int], bool]]) -> None:
    """Write a model whose matrix products are in int8, the ranges of activations found in each
    batch.

    Args:
        fp32: the exported model.
        int8: written; may be the same.
        plan: of ``smoothing.smoothed``; empty quantises every product.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        fp32,
        int8,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,  # one scale for a whole matrix gave 4 % of the reviews another label
        weight_type=QuantType.QInt8,
        nodes_to_exclude=_left_out(onnx.load(fp32).graph, plan),
    )
    model = onnx.load(int8)
    _halve_embeddings(model.graph)
    onnx.save(model, int8)


def fix_ranges(int8: Path, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Replace what a quantised model finds in each batch by the ranges of these, all together; what
    lies beyond them is cut off at serving.

    Args:
        int8: of ``quantise``; rewritten.
        batches: padded inputs of the model, each ``[B, L]`` by its name.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    model, watched = onnx.load(int8), onnx.load(int8)
    found = [node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"]
    for node in found:
        _, scale, zero = node.output
        watched.graph.output.extend(
            helper.make_tensor_value_info(name, kind, [])
            for name, kind in ((scale, TensorProto.FLOAT), (zero, TensorProto.UINT8))
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    lowest, highest = np.zeros(len(found)), np.zeros(len(found))
    for batch in batches:
        _, *ranges = session.run(None, {name: batch[name] for name in names})
        scales, zeros = (np.array(ranges[part::2], np.float64) for part in (0, 1))
        lowest = np.minimum(lowest, -zeros * scales)
        highest = np.maximum(highest, (_LEVELS - zeros) * scales)
    for node, low, high in zip(found, lowest, highest):
        quantised, *fixed = node.output
        scale = (high - low) / _LEVELS or 1.0  # of what is always 0
        values = np.array(scale, np.float32), np.array(round(-low / scale), np.uint8)
        model.graph.initializer.extend(map(numpy_helper.from_array, values, fixed))
        fixes = helper.make_node("QuantizeLinear", [node.input[0], *fixed], [quantised])
        place = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        model.graph.node.insert(place, fixes)
    onnx.save(model, int8)


def _left_out(graph, plan: Sequence[tuple[tuple[int, int], bool]]) -> list[str]:
    """Names of the products whose layers do not bear int8: they stand in the order of the plan."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    products = [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and len(sizes.get(node.input[1], ())) == 2
    ]
    if [sorted(sizes[node.input[1]]) for node in products] != [sorted(s) for s, _ in plan]:
        return []  # not told apart: all are quantised, and the comparison decides
    return [node.name for node, (_, bears_int8) in zip(products, plan) if not bears_int8]


def _halve_embeddings(graph) -> None:
    """Tables of embeddings, most of a small model, in half precision; what is read is fp32 again.

    In int8, even with a scale for each row, they were the largest part of the error.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 2 or table.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(table).astype(np.float16)
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(values, table.name))
        [found] = node.output
        node.output[0] = f"{found}.half"
        cast = helper.make_node("Cast", [node.output[0]], [found], to=TensorProto.FLOAT)
        graph.node.insert(list(graph.node).index(node) + 1, cast)
