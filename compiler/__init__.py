"""From an ONNX file of polynomial ops to a CKKS circuit: `compile_onnx` is the whole of it, `pipeline.py` its order."""

from .pipeline import Compiled, compile_onnx
from .plan import Target

__all__ = ["Compiled", "Target", "compile_onnx"]
