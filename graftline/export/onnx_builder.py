"""An ONNX graph under construction, whose weights are streamed to a file beside it."""

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's contributed operators."""
_PAGE_BYTES = 4096
_OPSET, _IR_VERSION = 21, 10

Dim = int | str


class GraphBuilder:
    """An ONNX graph under construction, whose large weights are streamed to one external file.

    Memory holds one weight at a time. Each starts on a page, so that the runtime can map it. Names are never random, so
    the same checkpoint gives the same bytes.
    """

    def __init__(self, weights: IO[bytes], location: str) -> None:
        self._weights, self._location = weights, location
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._count = 0

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output, named here unless ``outputs`` are given."""
        self._count += 1
        names = list(outputs) or [f"{operator}_{self._count}"]
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, f"n{self._count}_{operator}", domain=domain, **attributes)
        )
        return names[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add a constant, whose bytes go to the external file."""
        array = np.ascontiguousarray(array)
        self._weights.write(b"\0" * (-self._weights.tell() % _PAGE_BYTES))
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._location, "offset": self._weights.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._weights.write(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
        self._initializers.append(tensor)
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a small constant inside the graph."""
        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> str:
        """Add a required graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def optional_input(self, name: str, default: np.ndarray, shape: Sequence[Dim]) -> str:
        """Add a graph input with a default value (an initializer of the same name)."""
        self.constant(name, default)
        return self.input(name, helper.np_dtype_to_tensor_dtype(default.dtype), shape)

    def output(self, name: str, dtype: int, shape: Sequence[Dim]) -> None:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def model(self, name: str) -> onnx.ModelProto:
        """The finished model; its weights are those written to the external file."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="graftline")
