"""The distance to a model's nearest training photos as ONNX operators, see `model.neighbors`."""

import json

import numpy as np
import onnx
import onnx.compose
import onnx.parser

from hotdog_hf.errors import UserError
from hotdog_hf.model.neighbors import NEIGHBORS, Neighbors, distances, unit_roots, usual_limit

# The first version of the operators that takes how many neighbours are the nearest as an input.
DISTANCE_OPSET = 10


def add_distance(network: onnx.ModelProto, kept: Neighbors) -> onnx.ModelProto:
    """Return a model whose outputs are `probabilities` [batch, classes] and `distance` [batch].

    `network` has the outputs `probabilities` and `features` [batch, D]. Raises `UserError` for an opset with
    which this cannot be done.
    """
    [opset] = {entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")}
    if opset < DISTANCE_OPSET:
        raise UserError(
            f"the distance to the training photos needs --opset {DISTANCE_OPSET} or higher, got {opset}"
        )
    count, dimensions = kept.features.shape
    nearest = min(NEIGHBORS, count)
    graph = onnx.parser.parse_model(f"""
        <ir_version: {network.ir_version}, opset_import: ["" : {opset}]>
        distances (float[batch, {dimensions}] features) => (float[batch] distance)
        <
            int64[1] nearest = {{{nearest}}}, int64[1] flat = {{-1}},
            float[{nearest}, 1] shares = {{{", ".join([repr(1 / nearest)] * nearest)}}}, float one = {{1}}
        >
        {{
            signs = Sign (features)
            sizes = Abs (features)
            size_roots = Sqrt (sizes)
            roots = Mul (signs, size_roots)
            unit_roots = LpNormalization <axis = 1, p = 2> (roots)
            photos = Cast <to = {onnx.TensorProto.FLOAT}> (kept)
            similarities = MatMul (unit_roots, photos)
            highest, indices = TopK (similarities, nearest)
            mean = MatMul (highest, shares)
            similarity = Reshape (mean, flat)
            distance = Sub (one, similarity)
        }}
    """)
    values = np.ascontiguousarray(kept.features.T)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(values, "kept"))
    return onnx.compose.merge_models(
        network,
        onnx.compose.add_prefix(graph, "distance/", rename_inputs=False, rename_outputs=False),
        io_map=[("features", "features")],
        producer_name="hotdog_hf",
    )


def refit_distances(kept: Neighbors, features: np.ndarray, rounded: np.ndarray) -> Neighbors:
    """Return neighbours whose held-out distances are those of a network that rounds its features.

    `features` and `rounded` [N, D] are what the network and the one that rounds give for the same photos.
    """
    # Rounding turns a photo's features a little, which lowers its similarities to all others by about the
    # same share. The mean share that is left is applied to the held-out similarities. A limit from the
    # distances of these photos alone would depend on fewer of them, often training photos, which are near to
    # themselves; the share is about the same for those.
    before, after = (1 - distances(unit_roots(rows), kept.features) for rows in (features, rounded))
    share = after.sum() / before.sum()
    return kept._replace(held_out_distances=1 - share * (1 - kept.held_out_distances))


def describe_distances(kept: Neighbors) -> dict[str, str]:
    """Return the metadata of a model: distances of held-back photos, and the usual limit.

    There is no limit if too few photos were held back.
    """
    rounded = [round(float(value), 7) for value in kept.held_out_distances]
    about = {"held_out_distances": json.dumps(rounded)}
    limit = usual_limit(rounded)
    return about if limit is None else about | {"distance_limit": repr(limit)}
