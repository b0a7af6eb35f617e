"""Write a model as it is served: one file with everything a lookup needs and nothing that only training needs."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from recsys_embed._version import __version__
from recsys_embed.core.precision import FLOATS, FP16_MAX, NARROW, SEARCHES, Layout, Precision, Search, check_precision
from recsys_embed.data.serving.stored import Output, StoredEncoders
from recsys_embed.discover import unwrapped
from recsys_embed.errors import CheckpointError, ConfigError, raise_faults, unknown_name
from recsys_embed.exports.encoders import encoders_for
from recsys_embed.exports.file_format import NAMES, LargeWrites, TensorInfo, header_bytes, lay_out
from recsys_embed.exports.manifest import MANIFEST_VERSION, WITH_ENCODERS, item_to_dict, table_to_dict
from recsys_embed.exports.model_scan import ModelContents, Storage, scan
from recsys_embed.exports.pack import Packed, RoundingError, choose_parts, inspect_table
from recsys_embed.exports.read import load
from recsys_embed.exports.report import ExportReport, Metric, TableOutcome
from recsys_embed.exports.served_modules import build_model
from recsys_embed.kernels.pointers import memory_of
from recsys_embed.models.base import MODELS, CTRModel
from recsys_embed.utils.files import replacing

if TYPE_CHECKING:
    from recsys_embed.data.loader import Dataset

CLIPPED = 0.01
"""Share of a table's numbers at the outermost codes above which a report says so."""


def unwritten(path: Path, error: OSError) -> CheckpointError:
    """The error for an export that could not be written."""
    reason = error.strerror or str(error)
    return CheckpointError(f"{path} could not be written: {reason}; what was there before is untouched")


PLANNED = "planned"
"""The manifest's precision where tables have several."""
_PLACEHOLDER = -1.7976931348623157e308  # no number takes more characters
_KINDS = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class _Matrix:
    """A dense parameter of an embedding, which every lookup reads completely."""

    key: str
    value: Tensor
    dtype: torch.dtype


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    precision: Precision | None = None,
    *,
    prune: bool = True,
    search: Search | None = None,
    rows_per_scale: int = 1,
    evaluate: Callable[[nn.Module], float] | None = None,
    metric: str = "metric",
    encoders: Dataset | str | Path | Literal[False] | None = None,
    output: Output | None = None,
) -> ExportReport:
    """Write ``model`` to one file that :func:`recsys_embed.load` turns back into a module that gives the same outputs.

    The file is in safetensors format with a manifest in its metadata; it appears under ``path`` when it is complete,
    and until then what was there stays. Memory used is that of a few chunks of rows, whatever the size of the tables.

    Args:
        model: a drop-in, an :class:`EmbeddingCollection`, one of the library's models, any module that contains these
            or plain ``nn.Embedding``/``nn.EmbeddingBag`` (to be loaded ``into`` a freshly built one), the folder of a
            training run, or its ``model.pt``.
        path: the file to write; ``.safetensors`` is its usual ending.
        precision: of table rows: ``"fp32"`` (outputs are bit for bit those of the source), ``"fp16"``, ``"bf16"``,
            ``"fp8"`` (e4m3 with a scale per row), or ``"int8"``, ``"int4"`` or ``"int2"`` with an fp16 scale and bias
            per row (FBGEMM's layout). Projections and networks of embeddings are then kept in 16 bits; other layers
            stay as they are. By default each table has the precision of its plan or configuration, ``"fp32"`` where
            these say nothing.
        prune: drop rows and columns of zeros where that saves bytes.
        search: how scales of integer rows are found: ``"minmax"`` (default of int8), ``"greedy"`` (of int4) or
            ``"mse"``, of least squared error (of int2); a note says if no row has such a scale.
        rows_per_scale: consecutive rows of integers or fp8 that share a scale, at most 64: 4 rows of width 16 take 9
            bytes each at int4 rather than 12, for 2.3 times the squared error. Torch decodes them, slower than the
            compiled kernels decode rows with a scale each.
        evaluate: measures a model, e.g. its AUC, as a finite number; called with the source before anything is written,
            and with what was loaded from the new file.
        metric: name of what ``evaluate`` measures.
        encoders: the data folder that the model was trained on, opened or its path. What turns raw rows into ids and
            numbers is then stored too, so that the loaded model's ``predict`` takes raw rows. By default that of the
            run's own folder where it is still there, and that of a model which was loaded with it; False: none.
        output: what ``predict`` gives: ``"probability"``, or ``"value"``, the model's output as it is. By default as
            the run was trained, or by the labels of ``encoders``.

    Returns:
        Bytes and errors per table and in total.

    Raises:
        ConfigError: unknown precision; scales to share where no row has one, or rows trained with theirs; weights
            that are not finite or too large for it (all named); tensors on the meta device; subclasses of the library's
            embeddings; encoders of another model's data.
        CheckpointError: the run folder cannot be read, or the file cannot be written.

    >>> import torch, tempfile, recsys_embed as rse
    >>> from recsys_embed.exports import export, load
    >>> emb = rse.make_embedding("hash", 100_000, 16, budget="64KiB")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export(emb, f"{folder}/items.safetensors", "int8")
    ...     served = load(f"{folder}/items.safetensors")
    >>> ids = torch.tensor([3, 99_999])
    >>> bool((served(ids) - emb(ids)).abs().max() <= report.max_error), report.embedding_bytes / report.source_bytes
    (True, 0.3125)
    """
    if precision is not None:
        check_precision(precision)
    if isinstance(rows_per_scale, bool) or not isinstance(rows_per_scale, int) or not 1 <= rows_per_scale <= 64:
        raise ConfigError(f"`rows_per_scale` must be an integer in [1, 64]; got {rows_per_scale!r}")
    if search is not None and search not in get_args(Search):
        raise unknown_name("search", str(search), get_args(Search))
    if output not in (None, "probability", "value"):
        raise unknown_name("output", str(output), ("probability", "value"))
    notes: list[str] = []
    if isinstance(model, str | Path):
        from recsys_embed.exports.run_model import check_run_data, model_of_run, run_data, run_output

        run, model = model, model_of_run(model)
        if encoders is None:
            encoders = run_data(run, notes)
        elif encoders is not False:
            check_run_data(run, encoders)
        output = output or run_output(run)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module or the path of a run; got {type(model).__name__}")
    model = unwrapped(model)
    found = scan(model)
    kind = _model_kind(model, found)
    stored = encoders_for(model, encoders, output)
    with torch.no_grad():
        writer = _Writer(model, found, kind, precision, search, prune, rows_per_scale, stored, notes)
        return writer.write(path, evaluate, metric)


def _model_kind(model: nn.Module, found: ModelContents) -> dict[str, Any]:
    """What ``load`` has to build: an embedding, a model of the library, or nothing (the caller's own model)."""
    if any("" in item.paths for item in found.modules):
        return {"kind": "embedding"}
    if (
        isinstance(model, CTRModel)
        and MODELS.get(getattr(model, "key", "")) is type(model)
        and model.params is not None
    ):
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(model.params).items()}
        kind = {"kind": "model", "key": model.key, "num_dense": model.num_dense, "params": params}
        collections = {item.paths[0]: item for item in found.modules}
        if set(collections) == set(model.collections()):
            try:
                build_model(kind, collections, {k: v.shape for k, v in found.rest.items()})
            except CheckpointError:
                pass  # it was changed after it was built, so only its owner can build it again
            else:
                return kind
    return {"kind": "state", "class": f"{type(model).__module__}.{type(model).__qualname__}"}


def _finite(value: float, name: str) -> float:
    """What ``evaluate`` returned, which has to be a number that a manifest can hold."""
    if not isinstance(value, (int, float, Tensor)) and not hasattr(value, "__float__"):
        raise ConfigError(f"`evaluate` must return a number ({name}); got {type(value).__name__}")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(number):
        raise ConfigError(f"`evaluate` must return a finite number ({name}); got {number}: see what it is measured on")
    return number


def _notes_of_clipping(found: ModelContents) -> Iterator[str]:
    """A note per table that trained at a fixed step and of whose numbers many stand at the outermost codes."""
    for storage in found.storages:
        start = 0
        for name, rows in storage.tables:
            share = storage.share_clipped(start, rows)
            if share > CLIPPED:
                yield (
                    f"{share:.0%} of the numbers of table {name!r} stand at the outermost codes of its step, beyond "
                    "which training clipped them: set a larger `quantization_step`, or train with quantization 'alpt'"
                )
            start += rows


class _Writer:
    def __init__(
        self,
        model: nn.Module,
        found: ModelContents,
        kind: dict[str, Any],
        precision: Precision | None,
        search: Search | None,
        prune: bool,
        rows_per_scale: int,
        encoders: StoredEncoders | None,
        notes: Sequence[str],
    ) -> None:
        self.model, self.found, self.kind = model, found, kind
        self.rounded = precision
        self.encoders, self.notes = encoders, [*notes, *_notes_of_clipping(found)]
        self.packed = self._inspect_tables(prune, rows_per_scale)
        planned = {storage.precision for storage in found.storages} or {"fp32"}
        self.precision = precision or (planned.pop() if len(planned) == 1 else PLANNED)
        self.searches = {kind: search or default for kind, default in SEARCHES.items()}
        self.search = self.searches.get(self.precision, "minmax")
        if search is not None and not any(
            p.part.layout.kind in SEARCHES and p.steps is None for _, tables in self.packed for p in tables
        ):
            self.notes = [
                *notes,
                f"`search={search!r}` changed nothing: no rows are int8, int4 or int2 by a scale that is searched",
            ]
        self.matrices = {m.key: m for m in self._matrices()}
        self.errors = {key: RoundingError() for key in self.matrices}
        self.digests: dict[str, str] = {}
        self.aliases: dict[str, str] = {}

    def _inspect_tables(self, prune: bool, per_scale: int) -> list[tuple[Storage, list[Packed]]]:
        out, faults = [], []
        kinds = {self.rounded or storage.precision for storage in self.found.storages}
        if per_scale > 1 and not any(Layout.of(NARROW, kind).scaled for kind in kinds):
            told = f"the precisions are {', '.join(sorted(kinds))}: give `precision` too"
            if not kinds:
                told = "this model has no table that is rounded, since its vectors are computed: leave it out"
            faults.append(f"`rows_per_scale` is for rows with a scale (fp8, int8, int4, int2); {told}")
        for storage in self.found.storages:
            tables, start, precision = [], 0, self.rounded or storage.precision
            for name, rows in storage.tables:
                read, steps = _from(start, storage.read), storage.steps_of(precision)
                of_table = name, read, rows, storage.width, storage.dtype
                packed, wrong = inspect_table(*of_table, precision, prune, per_scale)
                if per_scale > 1 and steps is not None:
                    faults.append(
                        f"rows of table {name!r} trained with their scales, which are kept; leave `rows_per_scale` "
                        "out, or give another `precision`"
                    )
                packed.steps = None if steps is None else _from(start, steps)
                tables.append(packed)
                faults += wrong
                start += rows
            if not faults:
                choose_parts(tables)
            out.append((storage, tables))
        parameters = {key for key, _ in self.model.named_parameters(remove_duplicate=False)}
        for key, value in self.found.rest.items():
            if key in parameters and value.is_floating_point() and not torch.isfinite(value).all():
                faults.append(f"parameter {key!r} holds NaN or infinite values")
        raise_faults(faults, "export")
        return out

    def _matrices(self) -> Iterator[_Matrix]:
        faults = []
        for key in self.found.rest:
            value = self.found.rest[key]
            if key in self.found.owned and value.is_floating_point():
                precision = self.rounded or self.found.rounded.get(key, "fp32")
                half = torch.bfloat16 if precision == "bf16" else torch.float16
                narrow = value.dtype.itemsize <= 2
                dtype = value.dtype if narrow else torch.float32 if precision == "fp32" else half
                if dtype == torch.float16 and value.numel() and float(value.abs().max()) > FP16_MAX:
                    faults.append(f"parameter {key!r} holds values beyond {FP16_MAX:.0f}, the largest of fp16")
                yield _Matrix(key, value, dtype)
        raise_faults(faults, "export")

    # -- layout -----------------------------------------------------------------------------------------------------

    def _producers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Iterator[Tensor]]]]:
        """Every tensor of the file: dtype, shape, and what makes its content."""
        out: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Iterator[Tensor]]]] = {}
        # Tables of a storage stand end to end, so that one view covers them all.
        for _, tables in self.packed:
            for t in tables:
                layout = t.part.layout
                shape = (layout.stored_rows(t.part.count), layout.items)
                out[t.name] = (layout.dtype, shape, _stored(t, self.searches.get(layout.kind, "minmax")))
        for _, tables in self.packed:
            for t in tables:
                for end, array in t.arrays().items():
                    out[f"{t.name}.rows.{end}"] = (array.dtype, tuple(array.shape), _array(t, end))
        held: dict[Any, str] = {}
        for key, value in self.found.rest.items():
            matrix = self.matrices.get(key)
            dtype = value.dtype if matrix is None else matrix.dtype
            same = (memory_of(value), value.shape, value.stride(), dtype) if value.numel() else key
            self.aliases[key] = held.setdefault(same, key)
            if self.aliases[key] == key:
                out[key] = (dtype, tuple(value.shape), self._whole(key, dtype))
        for name, values in {} if self.encoders is None else self.encoders.arrays.items():
            tensor = torch.from_numpy(np.require(values, requirements="W"))
            out[name] = (tensor.dtype, tuple(tensor.shape), _given(tensor))
        return out

    def _whole(self, key: str, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
        def make() -> Iterator[Tensor]:
            value = self.found.rest[key].detach().cpu()
            stored = value.to(dtype)
            if key in self.errors:
                self.errors[key].add(value, stored)
            yield stored

        return make

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, path: str | Path, evaluate: Callable[[nn.Module], float] | None, metric: str) -> ExportReport:
        # Before anything is written: it may refuse its data.
        before = None if evaluate is None else _finite(evaluate(self.model), metric)
        producers = self._producers()
        entries = lay_out({name: (dtype, shape) for name, (dtype, shape, _) in producers.items()})
        placeholder = None if evaluate is None else Metric(metric, _PLACEHOLDER, _PLACEHOLDER)
        size = len(header_bytes(self._manifest(entries, placeholder), entries))
        measured = None
        with replacing(path, failed=unwritten) as (f, temporary):
            f.seek(size)
            large = LargeWrites(f)
            for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
                self.digests[name] = _write_tensor(large, name, entry, producers[name][2])
            large.flush()
            _write_header(f, header_bytes(self._manifest(entries, None), entries, size))
            if evaluate is not None and before is not None:
                measured = Metric(metric, before, self._after(temporary, evaluate, metric))
                _write_header(f, header_bytes(self._manifest(entries, measured), entries, size))
            total = f.seek(0, 2)
        return self._report(Path(path), total, size, entries, measured)

    def _after(self, file: Path, evaluate: Callable[[nn.Module], float], name: str) -> float:
        """The metric of the file once loaded."""
        into = None
        if self.kind["kind"] == "state":
            # Tables are replaced anyway, so the copy need not have its own.
            shared = {id(s.source): s.source for s in self.found.storages}
            into = copy.deepcopy(self.model, shared)
        return _finite(evaluate(load(file, into=into)), name)

    def _manifest(self, entries: Mapping[str, TensorInfo], metric: Metric | None) -> dict[str, Any]:
        """The manifest; unknown numbers are placeholders of maximal length, so that the header keeps its size."""
        done = bool(self.digests)
        tables = {}
        for storage, packs in self.packed:
            for p in packs:
                errors = p.error.close(p.part.rows * p.width) if done else (_PLACEHOLDER,) * 3
                tables[p.name] = table_to_dict(p.part, p.width, storage.dtype, errors)
        dense = {}
        for key, value in self.found.rest.items():
            dense[key] = {"dtype": NAMES[value.dtype]}
            if self.aliases[key] != key:
                dense[key]["tensor"] = self.aliases[key]
        manifest = {
            "version": MANIFEST_VERSION if self.encoders is None else WITH_ENCODERS,
            "written_by": {"recsys-embed": __version__, "torch": str(torch.__version__)},
            "precision": self.precision,
            "search": self.search,
            "model": self.kind,
            "modules": [item_to_dict(item) for item in self.found.modules],
            "storages": [
                {"tables": [p.name for p in packs], "targets": [list(t) for t in storage.targets]}
                for storage, packs in self.packed
            ],
            "tables": tables,
            "dense": dense,
            "sha256": {name: self.digests.get(name, "0" * 64) for name in entries},
            "metric": None if metric is None else vars(metric),
        }
        if self.encoders is not None:
            manifest["encoders"] = dict(self.encoders.about)
        return manifest

    # -- report -----------------------------------------------------------------------------------------------------

    def _report(
        self, path: Path, total: int, header: int, entries: Mapping[str, TensorInfo], metric: Metric | None
    ) -> ExportReport:
        outcomes = []
        for storage, packs in self.packed:
            for p in packs:
                part, errors = p.part, p.error.close(p.part.rows * p.width)
                columns = p.width if part.columns is None else len(part.columns)
                source = part.rows * p.width * storage.dtype.itemsize
                sizes = (part.count, columns, part.nbytes, part.index_bytes, source)
                outcomes.append(TableOutcome(p.name, part.rows, p.width, part.layout.kind, part.form, *sizes, *errors))
        for key in sorted(self.found.owned):
            value, stored = self.found.rest[key], entries.get(key)
            if stored is None:
                continue
            rows, width = (value.shape[0], value[0].numel()) if value.dim() > 1 else (1, value.numel())
            errors = self.errors[key].close(value.numel()) if key in self.errors else (0.0, 0.0, 0.0)
            kind = _KINDS.get(self.matrices[key].dtype) if key in self.matrices else str(value.dtype).split(".")[-1]
            held = stored.stop - stored.start
            sizes = (rows, width, held, 0, value.nbytes)
            outcomes.append(TableOutcome(key, rows, width, str(kind), "whole", *sizes, *errors))
        embedding = sum(t.bytes + t.index_bytes for t in outcomes)
        encoders = 0 if self.encoders is None else self.encoders.nbytes
        return ExportReport(
            path=path,
            precision=self.precision,
            needs_skeleton=self.kind["kind"] == "state",
            bytes=total,
            embedding_bytes=embedding,
            source_bytes=sum(t.source_bytes for t in outcomes),
            dense_bytes=total - header - embedding - encoders,
            header_bytes=header,
            tables=tuple(outcomes),
            metric=metric,
            notes=(*self.found.notes, *self.notes),
            encoder_bytes=encoders,
        )


def _from(first: int, read: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """Reads the rows of a table, which begins at a row of its storage."""
    return lambda start, stop: read(first + start, first + stop)


def _stored(table: Packed, search: Search) -> Callable[[], Iterator[Tensor]]:
    return lambda: table.stored(search)


def _given(tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([tensor])


def _array(table: Packed, end: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([table.arrays()[end]])


def _write_tensor(file: LargeWrites, name: str, entry: TensorInfo, make: Callable[[], Iterator[Tensor]]) -> str:
    """Append a tensor and return its digest."""
    digest, written = hashlib.sha256(), 0
    for piece in make():
        if piece.numel():
            view = memoryview(cast("Any", piece.contiguous().reshape(-1).view(torch.uint8).numpy()))
            digest.update(view)
            written += file.write(view)
    if written != entry.stop - entry.start:
        raise CheckpointError(f"tensor {name!r} changed while it was exported; stop training first")
    return digest.hexdigest()


def _write_header(file: IO[bytes], header: bytes) -> None:
    file.seek(0)
    file.write(header)
    file.flush()
