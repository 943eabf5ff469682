"""Which operators of ONNX each version of TensorRT's parser knows.

Sources: the importers of onnx-tensorrt at 10.1 and its changelog up to 10.15; docs/operators.md of 10.1 and 11.1; and
`OnnxParser.supports_operator` of TensorRT-RTX 1.7.1, asked for every operator of onnx 1.23. That an operator is known
does not say that every use of it is: the rules have what is refused all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

BEGINNING = (10, 0)


def _listed(names: str) -> list[str]:
    return names.split()


SINCE_THE_BEGINNING = _listed(
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil "
    "Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear "
    "Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu "
    "Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization "
    "HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization "
    "LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean "
    "MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow "
    "QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 "
    "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
    "Relu Reshape Resize ReverseSequence RoiAlign Round Scan Scatter ScatterElements ScatterND Selu Shape Shrink "
    "Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh "
    "ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor"
)

FIRST: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        **dict.fromkeys(SINCE_THE_BEGINNING, BEGINNING),
        "DeformConv": (10, 1),
        **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (10, 4)),
        "STFT": (10, 5),
        "Attention": (10, 14),
        **dict.fromkeys(("RMSNormalization", "RotaryEmbedding", "TensorScatter"), (10, 15)),
        "Swish": (11, 0),
    }
)
"""The version that has an operator of ONNX's own domain first."""

RTX_LACKS = frozenset({"DeformConv", "NonMaxSuppression", "NonZero", "RoiAlign"})
"""Operators that TensorRT computes by plugins or by itself, and TensorRT-RTX 1.7.1 does not build without a GPU."""
RTX_KNOWS = frozenset({"CausalConvWithState", "LinearAttention", "SimplifiedLayerNormalization"})
"""Operators that TensorRT-RTX 1.7.1 knows beside those of TensorRT."""
RTX_CONTRIB = frozenset({"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "MultiHeadAttention"})
"""The same of ONNX Runtime's own domain."""

FLOATS = frozenset(
    _listed(
        "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Conv "
        "ConvTranspose Cos Cosh Dropout Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool "
        "GlobalMaxPool GroupNormalization GRU Hardmax HardSigmoid InstanceNormalization IsInf IsNaN "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool LRN LSTM MatMul MaxPool "
        "MeanVarianceNormalization PRelu Reciprocal ReduceL2 ReduceLogSum ReduceLogSumExp Resize "
        "RMSNormalization RNN RotaryEmbedding Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt "
        "Swish Tan Tanh ThresholdedRelu Upsample"
    )
)
"""Operators that take floats only."""
HALVES = frozenset(_listed("DeformConv GridSample HardSwish Mish NonMaxSuppression RoiAlign"))
"""Operators that take fp32 and fp16 only."""
NUMBERS = frozenset(
    _listed(
        "Abs Add ArgMax ArgMin Clip CumSum DepthToSpace Div Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod "
        "Mul Neg Pow Range ReduceL1 ReduceMax ReduceMean ReduceMin ReduceProd "
        "ReduceSum ReduceSumSquare Relu Shrink Sign SpaceToDepth Sub Sum TopK"
    )
)
"""Operators that take no booleans."""
RTX_TAKES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "INT8": frozenset(
            _listed("Conv Erf HardSwish InstanceNormalization LeakyRelu LRN MaxPool Reciprocal Resize RMSNormalization")
        ),
        "BFLOAT16": frozenset(("GridSample",)),
    }
)
"""Types that TensorRT-RTX 1.7.1 builds these operators for, although no document of TensorRT lists them."""
RTX_REFUSES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"INT32": frozenset(("Relu",)), "INT8": frozenset(("CumSum", "ReduceMean"))}
)
"""Types that it refuses for these, although TensorRT's documents list them."""
BOOLEANS = frozenset(_listed("And Not Or Xor"))
"""Operators that take nothing else."""

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "Attention": "export for tensorrt-compat, which writes attention in matrix products",
        "RotaryEmbedding": "export for tensorrt-compat, which writes rotary embedding in products and sums",
        "RMSNormalization": "export for tensorrt-compat, which writes norms in plain operators",
        "TensorScatter": "export for tensorrt-compat, which writes the cache by ScatterElements",
        "Swish": "write it as x * Sigmoid(x)",
        "DynamicQuantizeLinear": "export for tensorrt: it has symmetric QuantizeLinear and DequantizeLinear only",
        "MatMulInteger": "export for tensorrt: it has symmetric QuantizeLinear and DequantizeLinear only",
        "ConvInteger": "export for tensorrt: it has symmetric QuantizeLinear and DequantizeLinear only",
        "QLinearConv": "write it as Conv between DequantizeLinear and QuantizeLinear",
        "QLinearMatMul": "write it as MatMul between DequantizeLinear and QuantizeLinear",
    }
)
"""What to do about an operator that a version lacks."""

CONTRIB: Mapping[str, str] = MappingProxyType(
    {
        "MatMulNBits": "ONNX Runtime's 4-bit product: export for tensorrt, which writes blocked DequantizeLinear",
        "GroupQueryAttention": "ONNX Runtime's attention: export for tensorrt or tensorrt-compat",
        "MultiHeadAttention": "ONNX Runtime's attention: export for tensorrt or tensorrt-compat",
        "QMoE": "ONNX Runtime's experts: export for tensorrt",
    }
)
"""What to do about operators of ONNX Runtime's own domain."""
