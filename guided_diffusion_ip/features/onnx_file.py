"""Does an ONNX file keep weights in other files? Found from its structure, without running it."""

from __future__ import annotations

from .tf_graph import fields

# Where tensors are in an ONNX file (onnx.proto): message -> {field: message inside}. Tensors end
# the search.
_ONNX = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def refuse_external_data(path: str, content: bytes) -> None:
    """An ONNX file may have its weights in other files, anywhere; the sha256 of a feature space
    would say nothing of them.
    """
    waiting = [("model", memoryview(content))]
    try:
        while waiting:
            kind, message = waiting.pop()
            for number, value in fields(message):
                if kind == "tensor":
                    if number == 14 and value == 1:  # data_location: EXTERNAL
                        raise ValueError(
                            f"{path} has weights in another file; save it as one file "
                            "(onnx.save_model(..., save_as_external_data=False))"
                        )
                elif number in _ONNX[kind] and not isinstance(value, int):
                    waiting.append((_ONNX[kind][number], value))
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text if text.startswith(path) else f"{path}: no ONNX model, or not all of one ({text})"
        ) from None
