"""The weights of ONNX graphs: where they lie beside one, and how several share a file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

from fedloom.errors import Reason, Refused
from fedloom.exports import WEIGHTS_FILE
from fedloom.tensor_files import Array, write_tensors

_SMALLEST = 1024  # bytes; less stays in the graph


def read_constants(model: onnx.ModelProto, folder: Path) -> dict[str, Array]:
    """Return the initializers but theta; those of float32 in other files are mapped, not read."""
    tensors = (tensor for tensor in model.graph.initializer if tensor.name != "theta")
    return {tensor.name: _values(tensor, folder) for tensor in tensors}


def _values(tensor: TensorProto, folder: Path) -> Array:
    """Read a weight; not by onnx, which refuses files that have several names, as ours do."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = external_data_helper.ExternalDataInfo(tensor)
    if Path(where.location).name != where.location:
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected {tensor.name} in a file beside its graph, found {where.location[:80]!r}",
        )
    shape, start = tuple(tensor.dims), where.offset or 0
    if tensor.data_type == TensorProto.FLOAT:
        return np.memmap(folder / where.location, "<f4", "r", start, shape)
    with (folder / where.location).open("rb") as file:
        file.seek(start)
        data = file.read(-1 if where.length is None else where.length)
    return numpy_helper.to_array(TensorProto(data_type=tensor.data_type, dims=shape, raw_data=data))


def write_weights(
    models: Mapping[str, onnx.ModelProto], weights: Mapping[str, Array], folder: Path
) -> None:
    """Write graphs by file name, and their weights to one file; initializers name the weights."""
    named = {tensor.name for model in models.values() for tensor in model.graph.initializer}
    used = {name: values for name, values in weights.items() if name in named}
    large = {name: values for name, values in used.items() if values.nbytes >= _SMALLEST}
    places = write_tensors(folder / WEIGHTS_FILE, large)
    for file, model in models.items():
        for tensor in model.graph.initializer:
            if tensor.name not in places:
                values = np.asarray(used[tensor.name])
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                continue
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.EXTERNAL
            offset, length = places[tensor.name]
            for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        (folder / file).write_bytes(model.SerializeToString(deterministic=True))
