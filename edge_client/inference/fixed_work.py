"""Decides whether the work of a model depends on the shapes of its inputs alone.

If it does, a run within limits of time and memory shows what every run on inputs of these shapes
takes, up to what single numbers cost a processor. If it does not, numbers that somebody chooses
can have the model loop or allocate without end.
"""

from __future__ import annotations

from edge_client.inference.graph import (
    GraphNode,
    PlainGraph,
    StoredTensor,
    UnreadableGraph,
    read_graph,
)

# Operators whose outputs have shapes that follow from the shapes of all inputs, and which take
# time by these shapes. Control flow, sequences, strings, random numbers and operators that count
# what they find (NonZero, Unique, Compress, NonMaxSuppression) are not among them.
_GROUPS = (
    # arithmetic, element by element
    "Abs Add And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Div",
    "Equal Erf Exp Floor Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Log Max Mean Min",
    "Mul Neg Not Or Pow Reciprocal Round Sign Sqrt Sub Sum Where Xor",
    "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan Tanh",
    # activations and normalisations
    "Celu Dropout Elu Gelu HardSigmoid HardSwish Hardmax Identity LeakyRelu LogSoftmax Mish PRelu",
    "Relu Selu Shrink Sigmoid Softmax Softplus Softsign Swish ThresholdedRelu",
    "BatchNormalization GroupNormalization InstanceNormalization LRN LayerNormalization",
    "LpNormalization MeanVarianceNormalization RMSNormalization SimplifiedLayerNormalization",
    # layers
    "AveragePool Conv ConvTranspose Einsum GRU Gemm GlobalAveragePool GlobalMaxPool LSTM LpPool",
    "MatMul MaxPool RNN RotaryEmbedding",
    # selection and rearrangement
    "ArgMax ArgMin Concat CumSum DepthToSpace Det EyeLike Flatten Gather GatherElements GatherND",
    "GridSample ReverseSequence ScatterElements ScatterND SpaceToDepth Transpose Trilu",
    # 8 bits
    "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul",
    "QuantizeLinear",
)
_MICROSOFT = (
    "BiasGelu DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul FastGelu FusedConv",
    "FusedGemm FusedMatMul Gelu MatMulIntegerToFloat MatMulNBits QGemm QLinearAdd",
    "QLinearAveragePool QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul",
    "QLinearSigmoid QLinearSoftmax QuantizeLinear SkipLayerNormalization",
)
_BY_SHAPE = frozenset(
    [*(name for group in _GROUPS for name in group.split())]
    + [f"com.microsoft:{name}" for group in _MICROSOFT for name in group.split()]
)
_SHAPED_BY: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1, 2),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Operators that take the shape of their output from these inputs, by place."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRAPS = frozenset({"Div", "Mod"})
"""Operators that end the process for some whole numbers: the least one by -1 is a trap of x86."""
_FRACTIONS = frozenset({1, 10, 11, 16})
"""ONNX's numbers of float32, float16, float64 and bfloat16."""
_OF_FRACTIONS = _names(
    "BatchNormalization Conv DequantizeLinear Erf Exp Gelu GroupNormalization HardSigmoid "
    "InstanceNormalization LayerNormalization Log LogSoftmax Reciprocal Sigmoid Softmax Sqrt "
    "Tanh"
)
"""Operators that give nothing but fractions."""
_OF_SAME_TYPE = _names(
    "Abs Add Ceil Clip Concat Cos Div Expand Flatten Floor Gather Gemm GlobalAveragePool Identity "
    "MatMul Max Mean Min Mul Neg Pow ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum "
    "ReduceSumSquare Relu Reshape Sin Slice Split Squeeze Sub Sum Transpose Unsqueeze"
)
"""Operators that give what their first input is of."""
_ONLY_SHAPES = frozenset({"Shape", "Size"})
"""Operators whose outputs depend on the shape of their input, and not on its numbers."""
_CONSTANT = "Constant"


def why_unbounded(onnx: bytes) -> str:
    """Returns why a model's work may depend on the numbers in its inputs; empty if it does not.

    Guarantee:
        If the result is empty, the time and memory of a run depend on the shapes of the inputs and
        on nothing that is in them, up to a constant factor: no operator loops, and every shape is
        computed from shapes and constants. It says nothing about how large they are, which one run
        within limits shows.

    Args:
        onnx: The content of an ONNX file, from anybody.

    Returns:
        One clause, for people; or an empty text.
    """
    try:
        return _first_doubt(read_graph(onnx))
    except UnreadableGraph as error:
        return str(error)


def _first_doubt(graph: PlainGraph) -> str:
    # Whether a tensor's numbers depend on those of the inputs. Nodes stand in the order in which
    # they run, as ONNX demands; where they don't, a name is not known yet.
    from_numbers = dict.fromkeys(graph.initializers, False)
    from_numbers |= dict.fromkeys(graph.inputs, True)
    from_numbers[""] = False  # an optional input that is left out
    fractions = {name for name, one in graph.initializers.items() if one.kind in _FRACTIONS}
    fractions |= {name for name, kind in graph.kinds.items() if kind in _FRACTIONS}
    for node in graph.nodes:
        operator = node.operator
        if missing := [name for name in node.inputs if name not in from_numbers]:
            return f"{operator} takes {missing[0]!r} before it is computed"
        if operator in _SHAPED_BY:
            shaping = [node.inputs[at] for at in _SHAPED_BY[operator] if at < len(node.inputs)]
            if any(from_numbers[name] for name in shaping):
                return f"{operator} takes a shape from the numbers of an input"
        elif operator in _TRAPS and not fractions.intersection(node.inputs):
            if any(from_numbers[name] for name in node.inputs):
                return f"{operator} ends the process for some numbers of an input"
        elif operator not in _BY_SHAPE | _ONLY_SHAPES | _TRAPS | {_CONSTANT}:
            return f"the work of {operator} may depend on the numbers of an input"
        tainted = operator not in _ONLY_SHAPES and any(from_numbers[n] for n in node.inputs)
        for name in node.outputs:
            if name and name in from_numbers:
                return f"two operators compute {name!r}"
            from_numbers[name] = tainted if name else False
        if _gives_fractions(node, fractions):
            fractions.update(filter(None, node.outputs))
    return ""


def _gives_fractions(node: GraphNode, fractions: set[str]) -> bool:
    """Returns whether all outputs surely are fractions, which no operator here traps on."""
    if node.operator == _CONSTANT:
        (told, *more) = node.attributes.items() or (("", None),)
        stored = told[1]
        exact = isinstance(stored, StoredTensor) and stored.kind in _FRACTIONS
        return not more and (exact or told[0] in ("value_float", "value_floats"))
    if node.operator == "Cast":
        return node.attributes.get("to") in _FRACTIONS
    if node.operator == "Where":
        return not fractions.isdisjoint(node.inputs[1:])
    same = node.operator in _OF_SAME_TYPE and bool(node.inputs) and node.inputs[0] in fractions
    return same or node.operator in _OF_FRACTIONS
