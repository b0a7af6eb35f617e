"""Earlier module names of version 0.1: importing one warns and returns the module of today."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from recsys_embed.utils.deprecated import earlier_names, warn_deprecated

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
    "compress.replacement": "compress.model_replacement",
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
    "fusion": "collection.batched_lookup",
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
    "kernels.precision": "core.precision",
    "kernels.records": "kernels.native.records",
    "kernels.stored": "kernels.stored_tables",
    "kernels.triton.deferred": "kernels.triton.lazy_lookup",
    "kernels.unseen": "kernels.unseen_ids",
    "members": "core.id_sets",
    "memory": "core.footprint",
    "planning.evidence": "planning.calibration",
    "planning.menus": "planning.enumerator",
    "planning.needs": "planning.model_constraints",
    "planning.pools": "planning.table_groups",
    "planning.price": "planning.loss_estimate",
    "planning.reasons": "planning.explain",
    "planning.search": "planning.solver",
    "planning.words": "planning.explain",
    "program": "core.program",
    "report.memory_arrays": "report.memory.arrays",
    "report.memory_collisions": "report.memory.collisions",
    "report.memory_export": "report.memory.export",
    "report.memory_files": "report.memory.files",
    "report.memory_optimizer": "report.memory.state_size",
    "report.memory_page": "report.memory.page",
    "report.memory_plan": "report.memory.plan",
    "report.memory_sources": "report.memory.modules",
    "report.memory_stats": "report.memory.stats",
    "report.memory_tensors": "report.memory.file_tensors",
    "report.memory_text": "report.memory.text",
    "report.memory_values": "report.memory.report_values",
    "report.memory_whatif": "report.memory.alternatives",
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
    "train.files": "utils.files",
    "train.logs": "train.run_log",
    "train.state": "train.run_state",
    "train.stop": "train.stop_request",
}

# Names that a module of version 0.1 had, where each stands today, if not under its own name in the module of today.
RENAMED = {
    "fusion": {"FusedBundle": "collection.batched_lookup.BatchedLookup"},
    "kernels.masks": {"Stage": "kernels.native.masks.MaskParameters"},
    "kernels.unseen": {"Unseen": "kernels.unseen_ids.UnseenIds"},
    "data.encode": {"Rows": "data.criteo.encode.PartRows"},
    "data.parts": {"Part": "data.criteo.parts.ParsedPart"},
    "data.parse": {"Block": "data.criteo.parse.ParsedBlock"},
    "shipping.container": {"Entry": "exports.file_format.TensorInfo"},
    "shipping.manifest": {"Manifest": "exports.manifest.ExportManifest"},
    "shipping.pack": {"Error": "exports.pack.RoundingError"},
    "search.common": {
        "LEAST_OF_A_CLASS": "search.checks.LEAST_OF_A_CLASS",
        "Search": "search.base.Search",
        "SearchOutcome": "search.outcome.SearchOutcome",
        "need_classes": "search.checks.need_classes",
        "need_validation": "search.checks.need_validation",
        "run_search": "search.run.run_search",
        "total_budget": "search.run.total_budget",
    },
    "search.ranking": {"Ranking": "search.largest_elements.LargestElements"},
    "search.study_trial": {
        "Trainings": "search.studies.trial.TrainingFolders",
        "Untested": "search.studies.trial.WithoutTestSplit",
        "Watched": "search.studies.trial.ReportingTrainer",
    },
    "sharding.entries": {"Entry": "sharding.checkpoint_tensors.CheckpointTensor"},
    "sharding.layout": {"Slab": "sharding.physical_tables.PhysicalTable"},
    "sharding.rows": {"RowReader": "sharding.row_reader.TorchRecRowReader"},
    "kernels.pace": {"Pace": "kernels.deferred_steps.StepLog"},
    "kernels.triton.deferred": {"DeferredLookup": "kernels.triton.lazy_lookup.LazyLookup"},
    "stepping": {"SteppedTables": "collection.fused_tables.FusedTables"},
    "compress.dress": {"dress": "compress.module_state.transfer_module_state"},
    "compress.law": {"law_of": "compress.initializer.initializer_for", "spread": "compress.initializer.element_std"},
    "compress.replacement": {"Replacement": "compress.model_replacement.ModelReplacement"},
    "compress.swap": {
        "Change": "compress.exchange.ReversibleChange",
        "Exchange": "compress.exchange.ModuleExchange",
        "apply": "compress.exchange.apply_all",
    },
    "planning.evidence": {
        "Evidence": "planning.calibration.Calibration",
        "fit_evidence": "planning.calibration.calibrate",
        "read_rows": "planning.calibration.read_comparison",
    },
    "planning.pools": {"Pool": "planning.table_groups.TableGroup", "pools_of": "planning.table_groups.table_groups"},
    "planning.price": {
        "Factor": "planning.loss_estimate.ColumnSpan",
        "Terms": "planning.loss_estimate.CurveTerms",
        "crowd": "planning.loss_estimate.load_of_others",
        "factors": "planning.loss_estimate.column_spans",
        "price": "planning.loss_estimate.estimate_loss",
    },
    "members": {"Index": "core.id_sets.IdSet"},
    "report.memory_arrays": {
        "Array": "report.memory.arrays.ArrayStorage",
        "Entry": "report.memory.arrays.TableStorage",
    },
    "report.memory_collisions": {
        "expect": "report.memory.collisions.expected_collisions",
        "measure": "report.memory.collisions.measured_collisions",
    },
    "report.memory_optimizer": {
        "StateLaw": "report.memory.state_size.OptimizerStateSize",
        "make_law": "report.memory.state_size.state_size_of",
    },
    "report.memory_plan": {
        "Parts": "report.memory.plan.ModelStorage",
        "parts_of_plan": "report.memory.plan.plan_storage",
    },
    "report.memory_sources": {"parts_of_module": "report.memory.modules.module_storage"},
    "report.memory_values": {
        "MemoryReport": "report.memory.report_output.MemoryReport",
        "Rest": "report.memory.report_values.RestOfModel",
        "Settings": "report.memory.report_values.ReportSettings",
    },
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
        return ModuleSpec(fullname, self) if old != fullname and (old in MOVED or old in RENAMED) else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        old = name.removeprefix(f"{ROOT}.")
        names = RENAMED.get(old, {})
        if old in MOVED:
            today = f"{ROOT}.{MOVED[old]}"
            warn_deprecated(f"{name} is now {today}; the earlier name goes in the next version")
            # The import system returns what stands here once a loader is done: the one module, under both names.
            sys.modules[name] = module = import_module(today)
        if names:
            vars(module)["__getattr__"] = earlier_names(name, names)
            if "__all__" in vars(module):
                # Such modules had no list of names, so that * gave all of them.
                vars(module)["__all__"] = list(dict.fromkeys([*vars(module)["__all__"], *names]))


def install() -> None:
    """Let the old names be imported; a second call does nothing."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        # Before the others: a folder that an older version left behind would be taken for a package.
        sys.meta_path.insert(0, OldNames())
