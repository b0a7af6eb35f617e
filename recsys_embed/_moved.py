"""Modules that version 0.1 kept under other names: importing one of those warns, and gives the module of today."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ROOT = __package__

# Names below the package: the one of version 0.1, and today's.
MOVED = {
    "_json": "utils.strict_json",
    "_optional": "utils.optional",
    "_state": "core.config_state",
    "_versions": "utils.versions",
    "bags": "collection.bags",
    "bundle": "collection.lookup_bundle",
    "compress.dress": "compress.module_state",
    "compress.joint": "compress.joint_fit",
    "compress.law": "compress.initializer",
    "compress.outcome": "compress.report",
    "compress.swap": "compress.exchange",
    "config": "core.method_config",
    "data.archive": "data.compressed_file",
    "data.bits": "data.random_bits",
    "data.convert": "data.criteo.convert",
    "data.counts": "data.field_counts",
    "data.encode": "data.criteo.encode",
    "data.explain": "data.criteo.explain",
    "data.ingest": "data.criteo.ingest",
    "data.layout": "data.criteo.layout",
    "data.options": "data.criteo.options",
    "data.parse": "data.criteo.parse",
    "data.parts": "data.criteo.parts",
    "data.planted": "data.criteo.planted",
    "data.source": "data.text_blocks",
    "data.synthetic": "data.criteo.synthetic",
    "data.transform": "data.criteo.transform",
    "fit": "embedding.fit",
    "fusion": "collection.fused_bundle",
    "hashing": "core.hashing",
    "kernels.checks": "kernels.id_checks",
    "kernels.fused": "kernels.fused_gather",
    "kernels.handles": "kernels.native.handles",
    "kernels.masks": "kernels.native.masks",
    "kernels.native_library": "kernels.native.library",
    "kernels.native_lookup": "kernels.native.autograd",
    "kernels.native_ops": "kernels.native.ops",
    "kernels.outputs": "kernels.native.output_pool",
    "kernels.pace": "kernels.deferred_steps",
    "kernels.records": "kernels.native.records",
    "kernels.stored": "kernels.stored_tables",
    "kernels.triton.deferred": "kernels.triton.lazy_lookup",
    "kernels.unseen": "kernels.unseen_ids",
    "members": "core.id_sets",
    "memory": "core.footprint",
    "program": "core.program",
    "report.memory_arrays": "report.memory.arrays",
    "report.memory_collisions": "report.memory.collisions",
    "report.memory_export": "report.memory.export",
    "report.memory_files": "report.memory.files",
    "report.memory_optimizer": "report.memory.optimizer",
    "report.memory_page": "report.memory.page",
    "report.memory_plan": "report.memory.plan",
    "report.memory_sources": "report.memory.sources",
    "report.memory_stats": "report.memory.stats",
    "report.memory_tensors": "report.memory.tensors",
    "report.memory_text": "report.memory.text",
    "report.memory_values": "report.memory.values",
    "report.memory_whatif": "report.memory.whatif",
    "search.blocks": "search.frequency_blocks",
    "search.ranking": "search.largest_elements",
    "search.study": "search.studies.study",
    "search.study_journal": "search.studies.journal",
    "search.study_queue": "search.studies.queue",
    "search.study_results": "search.studies.results",
    "search.study_samplers": "search.studies.samplers",
    "search.study_settings": "search.studies.settings",
    "search.study_space": "search.studies.space",
    "search.study_storage": "search.studies.storage",
    "search.study_trial": "search.studies.trial",
    "search.study_urls": "search.studies.urls",
    "sharding.convert": "sharding.single_machine",
    "sharding.division": "sharding.pooling_split",
    "sharding.entries": "sharding.checkpoint_tensors",
    "sharding.group": "sharding.process_group",
    "sharding.layout": "sharding.physical_tables",
    "sharding.managed": "sharding.managed_collision",
    "sharding.quiet": "sharding.torchrec_warnings",
    "sharding.rows": "sharding.row_reader",
    "sharding.stepping": "sharding.optimizers",
    "sharding.trials": "sharding.study_trials",
    "sharding.update": "sharding.fused_updates",
    "shared": "embedding.shared_tables",
    "shipping": "exports",
    "shipping.container": "exports.file_format",
    "shipping.files": "utils.files",
    "shipping.graph": "exports.graph",
    "shipping.graph_check": "exports.graph_check",
    "shipping.graph_inputs": "exports.graph_inputs",
    "shipping.manifest": "exports.manifest",
    "shipping.onnx_file": "exports.onnx_file",
    "shipping.onnx_ops": "exports.onnx_ops",
    "shipping.pack": "exports.pack",
    "shipping.read": "exports.read",
    "shipping.report": "exports.report",
    "shipping.runs": "exports.run_model",
    "shipping.scan": "exports.model_scan",
    "shipping.serve": "exports.served_modules",
    "shipping.write": "exports.write",
    "stepping": "collection.fused_tables",
    "train.logs": "train.run_log",
    "train.state": "train.run_state",
    "train.stop": "train.stop_request",
}

# Names that such a module had, and where each stands today.
RENAMED = {
    "kernels.pace": {"Pace": "kernels.deferred_steps.StepLog"},
    "kernels.triton.deferred": {"DeferredLookup": "kernels.triton.lazy_lookup.LazyLookup"},
    "stepping": {"SteppedTables": "collection.fused_tables.FusedTables"},
    "members": {"Index": "core.id_sets.IdSet"},
    "program": {
        "Digit": "core.transforms.MixedRadixDigit",
        "Init": "core.program.Initializer",
        "Member": "core.transforms.RankInSet",
        "Probe": "core.program.RowLookup",
    },
}


class OldNames(MetaPathFinder, Loader):
    """Finds modules under the names they had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{ROOT}.")
        return ModuleSpec(fullname, self) if old != fullname and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        today = f"{ROOT}.{MOVED[name.removeprefix(f'{ROOT}.')]}"
        warnings.warn(f"{name} is now {today}; the old name goes with version 0.3", DeprecationWarning, stacklevel=2)
        # The import system returns what stands here once a loader is done: the one module, under both names.
        sys.modules[name] = found = import_module(today)
        for earlier, place in RENAMED.get(name.removeprefix(f"{ROOT}."), {}).items():
            home, _, attribute = place.rpartition(".")
            setattr(found, earlier, getattr(import_module(f"{ROOT}.{home}"), attribute))


def install() -> None:
    """Let the old names be imported; a second call does nothing."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        # Before the others: a folder that an older version left behind would be taken for a package.
        sys.meta_path.insert(0, OldNames())
