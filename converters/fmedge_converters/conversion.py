"""From the names and tensors of a checkpoint to those of a model, by transformers' own rules.

`from_pretrained` renames what it reads, and merges or cuts some of it (WeightConverter). The same rules run here on
lazy tensors, in the same order, so that a checkpoint is understood here exactly when transformers understands it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fmedge_runtimes.errors import SourceError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from fmedge_converters.decoder import quiet_libraries
from fmedge_converters.lazy_tensor import LazyTensor, NotLazyError
from fmedge_converters.weight import UNREADABLE, Weight, equal


def converted(
    tensors: Mapping[str, Weight],
    model: PreTrainedModel,
    names: Collection[str] | None = None,
    transforms: Sequence[WeightTransform] | None = None,
    unplaced: dict[str, Weight] | None = None,
) -> dict[str, Weight]:
    """The weights of a model's parameters and persistent buffers, as far as the checkpoint's tensors make them up.

    `names` asks for some of them only; `transforms` take the place of the model's own rules. Tensors that the model
    does not know are left out, as by transformers; `unplaced` gets them, by the names that they would have in it.
    Raises SourceError: tensors that cannot be merged, two different tensors for the same parameter.
    """
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    found: dict[str, Weight] = {}
    origins: dict[str, str] = {}
    merges: dict[str, WeightConverter] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target not in known:
            if unplaced is not None:
                unplaced[target] = tensors[name]
            continue
        if names is not None and target not in names:
            continue
        if tensors[name].dtype == UNREADABLE:
            tensors[name].read(0, 0)  # says what is wrong
        if pattern is not None:
            if target not in merges:
                merges[target] = copy.deepcopy(by_pattern[pattern])
            merges[target].add_tensor(target, name, pattern, LazyTensor(tensors[name]))
        elif target not in found:
            found[target], origins[target] = tensors[name], name
        elif not equal(found[target], tensors[name]):
            raise SourceError(
                f"{origins[target]} and {name} in the checkpoint are both {target} of the model, with different "
                "values; files of two checkpoints are mixed: download or copy the folder again."
            )
    with quiet_libraries():
        for target, merge in merges.items():
            made = _merged(target, merge, model)
            found |= {
                name: weight for name, weight in made.items() if name in known and (names is None or name in names)
            }
    return found


def _merged(target: str, merge: WeightConverter, model: PreTrainedModel) -> dict[str, Weight]:
    operations = " and ".join(type(operation).__name__ for operation in merge.operations)
    count = sum(len(tensors) for tensors in merge.collected_tensors.values())
    try:
        result: dict[str, Any] = merge.convert(target, model=model, config=model.config)
    except NotLazyError as error:
        raise SourceError(
            f"{target} is made of {count} tensors by transformers' {operations}, and fmedge has no way to do "
            f"{error} piece by piece; load the model with transformers and save it in another layout."
        ) from error
    except Exception as error:
        raise SourceError(
            f"{target} cannot be made of {count} tensors of the checkpoint by {operations}: {error}; "
            "the weights do not belong to this configuration."
        ) from error
    tensors = {name: item[0] if isinstance(item, list) else item for name, item in result.items()}
    return {name: tensor.weight for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)}
