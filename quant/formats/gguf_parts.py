"""Opens a model in GGUF, whether it is one file or was split by llama-gguf-split into several.

The parts of a split model are named `<name>-00001-of-00003.gguf`. The first carries the metadata; each has `split.no`
(from 0), `split.count`, `split.tensors.count` and tensors of its own, each whole in one part.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.gguf import GGUFFile, Header, TensorInfo
from edger1.quant.formats.gguf_names import MAX_PARTS, part_paths, whole_name


class GGUFParts:
    """An open model: `header` has the metadata and the tensors of all its files. A context manager.

    `path` may name any of the parts. Raises FormatError where a file is damaged, a part is missing, or the parts do not
    belong together.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: list[GGUFFile] = []
        try:
            self._files.append(GGUFFile(path))
            count = self._files[0].header.integer("split.count", 1)
            if count > 1:
                self._open_all(count)
            self._file_of = self._owners()
            self.header = self._merged()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The model's name: that of its file without the suffix and the number of the part."""
        return whole_name(self.path.name) if len(self._files) > 1 else self.path.stem

    @property
    def fingerprint(self) -> str:
        """A checksum over the names, sizes and times of last change of all files."""
        return hashlib.sha256("\n".join(file.stamp() for file in self._files).encode()).hexdigest()

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the raw bytes of rows [start, stop) of a tensor of `header`, by default of all, as uint8."""
        return self._file_of[tensor.name].read(tensor, start, stop)

    def close(self) -> None:
        """Close the files; closing twice is fine."""
        for file in self._files:
            file.close()

    def __enter__(self) -> GGUFParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_all(self, count: int) -> None:
        given = self._files.pop()
        given.close()
        paths = part_paths(self.path)
        if len(paths) != count:
            raise FormatError(
                f"{self.path.name} is one of {count:,} parts of a model, which are to be named "
                f"<name>-00001-of-{min(count, 99999):05d}.gguf and so on, {MAX_PARTS:,} at most. Give the files their "
                "names back, or join them with llama-gguf-split --merge."
            )
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise FormatError(
                f"{self.path.name} is one of {count} parts of a model, but {len(missing)} of them are missing beside "
                f"it, first {missing[0]}; fetch them all into one folder."
            )
        for number, path in enumerate(paths):
            self._files.append(GGUFFile(path))
            header = self._files[-1].header
            found = header.integer("split.no", -1), header.integer("split.count", 1)
            if found != (number, count):
                raise FormatError(
                    f"{path.name} calls itself part {found[0] + 1} of {found[1]}, but its name says {number + 1} of "
                    f"{count}; the files do not belong together."
                )

    def _owners(self) -> dict[str, GGUFFile]:
        owners: dict[str, GGUFFile] = {}
        for file in self._files:
            for name in file.header.tensors:
                if name in owners:
                    raise FormatError(
                        f"{file.path.name} holds the tensor {name!r}, as {owners[name].path.name} does; the files do "
                        "not belong together."
                    )
                owners[name] = file
        return owners

    def _merged(self) -> Header:
        first = self._files[0].header
        if len(self._files) == 1:
            return first
        tensors = {name: info for file in self._files for name, info in file.header.tensors.items()}
        told = first.integer("split.tensors.count", len(tensors))
        if told != len(tensors):
            raise FormatError(
                f"{first.name} says that the model has {told:,} tensors, but its {len(self._files)} parts hold "
                f"{len(tensors):,}; a part is of another model. Fetch them again."
            )
        return Header(first.name, first.version, first.metadata, tensors, first.alignment)
