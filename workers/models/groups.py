"""Parameter groups: which tensors decay, and the parameter table that the shards are given."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from ps.types import ParameterTable, TensorSpec

#: Index of a parameter group in the optimizer's list.
DECAYED, NOT_DECAYED = 0, 1


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Name the parameters that are the weight of an embedding, also where they are tied to a projection."""
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in weights)


def decays(name: str, parameter: Tensor, embeddings: Collection[str] = ()) -> bool:
    """Tell whether the weight decay applies: matrices do, norms, biases and embeddings do not.

    Args:
        name: The parameter's name in its model.
        parameter: Its tensor.
        embeddings: What `embedding_names` says of the model.
    """
    return parameter.ndim >= 2 and name not in embeddings


def parameter_table(model: nn.Module, decay_all: bool) -> ParameterTable:
    """List the trainable tensors in registration order, tied ones once, frozen ones left out."""
    embeddings = embedding_names(model)
    return ParameterTable(
        tuple(
            TensorSpec(
                name,
                tuple(parameter.shape),
                DECAYED if decay_all or decays(name, parameter, embeddings) else NOT_DECAYED,
            )
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
    )
