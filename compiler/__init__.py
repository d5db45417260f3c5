"""From an ONNX file of polynomial ops to a CKKS circuit: `compile_onnx` is the whole of it, `pipeline.py` its order."""

from .pipeline import Compiled, Target, compile_onnx

__all__ = ["Compiled", "Target", "compile_onnx"]
