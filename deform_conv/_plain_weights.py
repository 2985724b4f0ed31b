"""Weights files of plain networks, for networks that have a deformable layer for a plain one.

In a file, Keras numbers the layers of a container by their class: `layers/conv2d`,
`layers/conv2d_1`. With a `DeformableConv2D` in place of the first, it asks for
`layers/deformable_conv2d`, which is missing, and for `layers/conv2d` as the second: another layer's
weights. But the file has the layers' names too. In one dimension it is the same.
"""

import collections
import re


def choose_weights(store, name: str, plain: str) -> bool:
    """Has a weights store give a deformable layer the weights of a plain one of the same name.

    Where the file has the layer's own weights, the store stays as it is. Keras 3.10 or newer has a
    store that can be told what to give.

    Args:
      store: what `load_own_variables` of the layer is given.
      name: the layer's.
      plain: the class that the plain layer has, "Conv1D" or "Conv2D".

    Returns:
      Whether the weights are those of a plain layer, without offsets and masks.

    Raises:
      ValueError: the file has no weights for the layer.
    """
    path = getattr(store, "_h5_entry_path", None)
    if not path or hasattr(store, "sharding_config"):
        return False  # a store of another kind; Keras says what is missing
    own = store.h5_file.get(path, {})
    container, _, key = path.rpartition("/")
    siblings = store.h5_file.get(container or "/", {})
    convolutions = {
        _name_of(siblings[sibling]): sibling
        for sibling in siblings
        if _kind_and_number(sibling)[0] == plain.lower()
    }
    # Names that Keras made up differ from one model to the next: a file's need not be the layer's.
    if len(store) and (_name_of(own) == name or name not in convolutions):
        return "vars" in own and "offset_conv" not in own
    if name not in convolutions:
        names = ", ".join(sorted(filter(None, convolutions))) or "none"
        raise ValueError(
            f"the file must have weights of {name}, or of a {plain} of that name. Received: {names}"
        )
    if not isinstance(store.get, _RenumberedGet):
        store.get = _RenumberedGet(store.get)
    store.get.replaced(container, key, siblings, plain.lower())
    store.get.unchanged(f"{container}/{convolutions[name]}".lstrip("/"))
    return True


class _RenumberedGet:
    """`get` of one weights store, for paths of a network whose classes are not the file's.

    Keras asks for the layers of a container in their order. So what is asked for after layers of
    another class has a number that is wrong by theirs.
    """

    def __init__(self, get):
        self.unchanged = get
        self._shifts = collections.defaultdict(int)  # by container and kind of layer

    def replaced(self, container: str, key: str, siblings, plain: str) -> None:
        """Notes that what is `key` in `container` is of the kind `plain` in the file."""
        kind, number = _kind_and_number(key)
        # So many before it are of its kind in the file too. Those before it that are not asked for
        # here, since they were loaded from another place, count as plain.
        same = min(number, sum(_kind_and_number(sibling)[0] == kind for sibling in siblings))
        shift = number - self._shifts[container, kind] + 1 - same
        self._shifts |= {(container, kind): -shift, (container, plain): shift}

    def __call__(self, path: str):
        keys = path.split("/")
        for index, key in enumerate(keys):
            kind, number = _kind_and_number(key)
            if shift := self._shifts["/".join(keys[:index]), kind]:
                keys[index] = f"{kind}_{number + shift}" if number + shift else kind
        return self.unchanged("/".join(keys))


def _kind_and_number(key: str) -> tuple[str, int]:
    kind, number = re.fullmatch(r"(.*?)(?:_(\d+))?", key).groups()
    return kind, int(number or 0)


def _name_of(group) -> str | None:
    return group["vars"].attrs.get("name") if "vars" in group else None
