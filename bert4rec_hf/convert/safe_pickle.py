"""Reading pickles of RecBole and hopwise without executing or importing anything that they name."""

import io
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import IO, Any

import numpy as np
import torch


class Inert:
    """Placeholder for an object that is not a container, number or string, with its pickled arguments and state."""

    args: tuple = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.args = args
        return inert

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Names that pickles of RecBole and hopwise contain. None of them is imported.
KNOWN_MODULES = ("recbole", "hopwise", "pandas")
KNOWN_NAMES = {
    ("yaml.loader", "FullLoader"), ("logging", "getLogger"), ("builtins", "slice"), ("torch", "device"),
    ("torch", "float32"), ("torch.storage", "_load_from_bytes"), ("torch._utils", "_rebuild_tensor_v2"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
}  # fmt: skip
# NumPy names `_frombuffer` in pickle protocol 5, the default of Python 3.14, and `_reconstruct` in older protocols.
NUMPY_NAMES = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "scalar"), ("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64,
}  # fmt: skip

# How much larger the tensors may be than their file, since several may share what is stored, as tied weights do.
MAX_COPIES = 16


class InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings. A known name becomes an `Inert` class; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (
            module.partition(".")[0] in KNOWN_MODULES
            or (module, name) in KNOWN_NAMES
            or (module == "torch" and name in STORAGES)
            or (module, name) in NUMPY_NAMES
        ):
            return type(name, (Inert,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of RecBole or hopwise needs")

    def persistent_load(self, identifier: Any) -> Any:
        if not (isinstance(identifier, tuple) and identifier[:1] == ("storage",)):
            raise pickle.UnpicklingError("it has a persistent object that is no tensor's storage")
        return Inert(identifier)


def read_pickle(path: str | os.PathLike) -> Any:
    """Read a file of `torch.save` or `pickle.dump` without executing or importing anything that it names.

    `torch.load(weights_only=True)` cannot read pickle protocol 4, which RecBole and hopwise write. Here the tensors of
    a "state_dict" are read. Other objects become `Inert` if their name is known in such files, and are an error
    otherwise.

    Raises:
        ValueError: If the file is of another kind, is damaged, or has an unknown name.
    """
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if file.read(4) == b"PK\3\4":
                    raise pickle.UnpicklingError("it is incomplete; download it again")
                file.seek(0)
                return _load(file)
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = name.removesuffix("data.pkl")
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise pickle.UnpicklingError("it is compressed, which torch.save does not do")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise pickle.UnpicklingError("it was saved on a machine of another byte order")
            with archive.open(name) as file:
                content = _load(file)
            if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
                left = MAX_COPIES * os.path.getsize(path)  # tensors may share what is stored
                for name, value in content["state_dict"].items():
                    content["state_dict"][name] = _tensor(value, archive, folder)
                    left -= content["state_dict"][name].nbytes
                    if left < 0:
                        raise pickle.UnpicklingError(f"its tensors are {MAX_COPIES} times as large as the file")
            return content
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"cannot read {path} as a checkpoint of RecBole or hopwise: {error}") from error


def _load(file: IO[bytes]) -> Any:
    content = io.BytesIO(file.read())  # a length in the pickle cannot be above that of these bytes
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        # An extension code may name an object that this process has loaded, which `find_class` would not see.
        if operation.name.startswith("EXT"):
            raise pickle.UnpicklingError("it has an extension code, which no checkpoint of RecBole or hopwise needs")
        # Python would take memory for all places of the memo up to this one.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > number:
            raise pickle.UnpicklingError(f"it has the place {argument} in a memo of at most {number}")
    content.seek(0)
    return InertUnpickler(content).load()


def _tensor(stored: Any, archive: zipfile.ZipFile, folder: str) -> torch.Tensor:
    """Build a tensor from the arguments of `torch._utils._rebuild_tensor_v2`, whose storage is a persistent id."""
    storage, offset, size, stride, *_ = stored.args
    _, dtype, key, *_ = storage.args[0]
    if len(size) > 2:
        raise pickle.UnpicklingError("a tensor in it has more than two dimensions")
    values = torch.frombuffer(bytearray(archive.read(f"{folder}data/{int(key)}")), dtype=STORAGES[dtype.__name__])
    number = math.prod(size)
    contiguous = tuple(math.prod(size[place + 1 :]) for place in range(len(size)))
    if tuple(stride) != contiguous or not 0 <= offset <= offset + number <= len(values):
        raise pickle.UnpicklingError("a tensor in it is not contiguous or exceeds its storage")
    return values[offset : offset + number].reshape(size).clone()


def strings(stored: Any) -> list[str]:
    """Convert a string, a list, or a pickled numpy string or array of strings to a list of strings."""
    if isinstance(stored, list):
        return [string for value in stored for string in strings(value)]
    if not isinstance(stored, Inert):
        return [str(stored)]
    if type(stored).__name__ == "scalar":
        (dtype, data), number = stored.args, 1
    elif type(stored).__name__ == "_frombuffer":
        data, dtype, (number,), *_ = stored.args
    else:
        _, (number,), dtype, _, data = stored.state
    if dtype.args[0].startswith("U") and dtype.state[1] == "<" and number >= 0:
        return np.frombuffer(data, f"<U{int(dtype.args[0][1:])}", count=number).tolist()
    if not isinstance(data, list) or number < 0:
        raise ValueError(f"expected an array of strings; got an array of type {dtype.args[0]}")
    return strings(data)
