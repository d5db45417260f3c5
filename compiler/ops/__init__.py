"""How each ONNX op is read, in tables by kind of op; the matrices that plaintext-linear ops are."""
