"""Saves and loads a run in megatron-core's distributed format: in the background, atomically, into any layout.

Tensors are stored under our parameter names in their global shapes, optimizer state beside them as
`optimizer.state.<kind>.<parameter name>`; nothing on disk depends on any parallel size, that of experts included.
Only the random states are per rank, and they are put back only into the layout they came from.

Trust: a checkpoint's `.metadata` is a pickle. `TorchDistReader` refuses one that asks for more than descriptions of
tensors before megatron-core reads it; `load_weights` then reads nothing but tensors. Resuming also unpickles small
objects (random states), and reads only from the run's own folder: do not put a foreign checkpoint there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from megatron_vlm.checkpoint import optimizer_state, run_folder
from megatron_vlm.checkpoint.run_folder import Manifest, ModelIdentity
from megatron_vlm.checkpoint.run_owner import RunOwner
from megatron_vlm.checkpoint.save_progress import num_bytes_saved, wait_for_save
from megatron_vlm.checkpoint.torch_dist import UNREADABLE, CheckedFileReader, TorchDistReader
from megatron_vlm.errors import CheckpointError, SaveError
from megatron_vlm.parallel.parameters import spec_of
from megatron_vlm.parallel.sharding import replica_group, splits
from megatron_vlm.platform import current
from megatron_vlm.platform.agreement import gather_if_any, is_any, on_first_rank
from megatron_vlm.platform.checkpointing import (
    SaveFailed,
    SaveStrategy,
    loading_with,
    random_state,
    set_random_state,
)
from megatron_vlm.platform.host_memory import HostMemory

_SHOWN_PROBLEMS = 4


@dataclass(frozen=True)
class Resumed:
    """What `CheckpointManager.load` brought back besides the tensors.

    Args:
        folder: the checkpoint.
        step: optimizer steps done.
        data: position in the data, as given to `save`.
        extra: as given to `save`.
        same_layout: the random states were put back too.
    """

    folder: Path
    step: int
    data: Mapping[str, Any]
    extra: Mapping[str, Any]
    same_layout: bool


def sharded_model_state(
    model_chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> dict[str, ShardedTensor]:
    """Every parameter of this rank, described by its place in the global tensor of the same name.

    How a parameter is divided is read from it (parallel/sharding.py). Copies of one that several pipeline chunks hold
    are replicas of one (`ParameterSpec.stages`). Loading into the result writes into the parameters themselves.

    Args:
        model_chunks: this rank's stages, wrapped for data parallelism or not.
        groups: process groups.

    Returns:
        Sharded tensors by parameter name, a rank's further copies by name and chunk.
    """
    state: dict[str, ShardedTensor] = {}
    for number, chunk in enumerate(unwrap_model(list(model_chunks))):
        for name, parameter in chunk.named_parameters():
            spec = spec_of(parameter, name)
            assert name not in state or spec.stages != "one", f"two chunks of one rank hold {name}"
            offsets = [(split.dim, split.group.rank(), split.group.size()) for split in splits(parameter, groups)]
            # The ranks that share an expert divide it, in whichever of its groups they are.
            tensor_group = groups.expt_tp if spec.is_expert else groups.tp
            tensor_copy = 0 if spec.tensor_dim is not None else tensor_group.rank()
            stage_copy = int(spec.stages != "one" and getattr(parameter, "shared", False))
            replica = (stage_copy, tensor_copy, replica_group(parameter, groups).rank())
            key = f"{name} {number}" if name in state else name
            state[key] = ShardedTensor.from_rank_offsets(name, parameter, *offsets, replica_id=replica)
    return state


def load_weights(
    path: str | Path,
    model_chunks: Sequence[torch.nn.Module],
    groups: ProcessGroupCollection,
    identity: ModelIdentity,
    optimizer: MegatronOptimizer | None = None,
) -> Path:
    """Fill the model's parameters from a run or checkpoint, and nothing else; called on every rank.

    Parts that the model does not have are left out (the language model can be taken from a multimodal checkpoint).
    Values are converted to the parameters' types.

    Args:
        path: run folder, checkpoint of a run, or imported checkpoint.
        model_chunks: this rank's stages.
        groups: process groups.
        identity: the model being trained.
        optimizer: if given, its fp32 main parameters are taken from the new values.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: there is none, it is of another family, or tensors are missing or of another shape.
    """
    folder, manifest = on_first_rank(lambda: _find_and_read(Path(path)))
    manifest.identity.check_family(identity, folder)
    state = sharded_model_state(model_chunks, groups)
    _check_tensors(state, folder, groups)
    _read(lambda: TorchDistLoadShardedStrategy().load(state, folder), folder)
    if optimizer is not None:
        optimizer.reload_model_params()
    return folder


class CheckpointManager:
    """The checkpoints of one run; every method is called on every rank.

    Args:
        directory: `run_dir/checkpoints`, on a file system that all ranks share.
        groups: process groups.
        identity: the model.
        layout: parallel sizes; with equal sizes a resumed run continues bit for bit.
        precision: type of the parameters, `fp32` or `bf16`.
        keep_last: newest checkpoints to keep; None keeps all.
        async_save: return from `save` while the writing goes on.
        owner: of the run folder; a checkpoint is published only while the folder is still this run's.

    Attributes:
        passthrough: names of the tensors that the run only carries through; None if an older run's checkpoint did not
            say. To be set in a new run, `load` sets it in one that goes on.
    """

    passthrough: Sequence[str] | None = ()

    def __init__(
        self,
        directory: str | Path,
        groups: ProcessGroupCollection,
        identity: ModelIdentity,
        layout: Mapping[str, int],
        precision: str,
        keep_last: int | None = None,
        async_save: bool = True,
        owner: RunOwner | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.groups = groups
        self.identity = identity
        self.layout = dict(layout)
        self.precision = precision
        self.keep_last = keep_last
        self.async_save = async_save
        self.owner = owner
        self._incomplete: Path | None = None
        self._num_bytes = 0
        """Of the save that is under way."""
        self._calls = AsyncCallsQueue()
        self._strategy: FullyParallelSaveStrategyWrapper | None = None
        self._structure = b""
        """Of what was saved last."""
        self._host_memory = HostMemory() if current().accelerated else None

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None; the same on every rank."""
        step, _ = on_first_rank(lambda: run_folder.newest_complete(self.directory))
        return step

    def clean(self) -> list[str]:
        """Delete what a killed run left half-written; call once at the start. Returns the names."""
        return on_first_rank(lambda: run_folder.clean(self.directory))

    def set_aside(self) -> list[str]:
        """Rename the incomplete checkpoints that are newer than `latest_step`; return what was done, in words."""
        return on_first_rank(lambda: run_folder.set_aside(self.directory))

    def save(
        self,
        step: int,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        param_scheduler: OptimizerParamScheduler | None,
        data_state: Mapping[str, Any],
        config_yaml: str,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save everything that resuming needs; returns once training may change the tensors again.

        A save still being written is waited for. With `async_save`, call `finalize` after every step.

        Args:
            step: optimizer steps done.
            model_chunks: this rank's stages.
            optimizer: megatron-core's optimizer, or None to save only weights.
            param_scheduler: schedule of learning rate and weight decay.
            data_state: position in the data; what JSON can hold, the same on every rank.
            config_yaml: the resolved configuration.
            extra: what the caller wants back; what JSON can hold, the same on every rank.

        Returns:
            False if a checkpoint of this step exists already; it is left as it is.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        self.finalize(blocking=True)
        gather_parameters(model_chunks)
        final = run_folder.step_folder(self.directory, step)
        manifest = Manifest(
            identity=self.identity,
            step=step,
            layout=self.layout,
            precision=self.precision,
            optimizer=None if optimizer is None else optimizer_state.describe(optimizer),
            scheduler=None if param_scheduler is None else param_scheduler.state_dict(),
            data=dict(data_state),
            extra=dict(extra or {}),
            config=config_yaml,
            passthrough=self.passthrough,
        )
        number = on_first_rank(lambda: None if final.exists() else self._begin(step))
        if number is None:
            return False
        self._incomplete = incomplete = run_folder.incomplete_folder(self.directory, step, number)

        began = time.monotonic()

        def publish() -> None:
            self._confirm_owner()
            manifest.write(incomplete)
            run_folder.share_passthrough(self.directory, incomplete)
            run_folder.publish(incomplete, final)
            run_folder.retire(self.directory, self.keep_last)
            print(f"saved step {step} in {time.monotonic() - began:.1f} s", flush=True)

        # megatron-core would let a rank that holds two copies write both.
        _, state = extract_matching_values(self._state(model_chunks, optimizer, is_loading=False), _is_copy)
        self._num_bytes = num_bytes_saved(state)
        self._start_writing(state, incomplete, publish)
        if not self.async_save:
            self.finalize(blocking=True)
        return True

    def _begin(self, step: int) -> int:
        self._confirm_owner()
        try:
            return run_folder.begin(self.directory, step)
        except OSError as error:
            raise self._save_error(error) from None

    def _save_error(self, reason: Exception) -> SaveError:
        return SaveError(
            f"the checkpoint could not be written: {reason}",
            str(self.directory),
            "earlier checkpoints are intact; make room or repair the disk",
        )

    def _confirm_owner(self) -> None:
        if self.owner is not None:
            self.owner.confirm()

    def _start_writing(self, state: dict[str, Any], incomplete: Path, publish: Callable[[], None]) -> None:
        """Copy `state` and let another process write it; `finalize` sees that it is done and calls `publish`."""
        request = dist_checkpointing.save(
            state,
            str(incomplete),
            self._strategy_for(state, publish),
            validate_access_integrity=False,  # the wrapper does that, after it has assigned the writing
            async_sharded_save=True,
            async_strategy="mcore",
        )
        # SaveStrategy's own finishing step has done what megatron-core's second one would do, safely on every rank.
        request = request._replace(finalize_fns=request.finalize_fns[:1])
        # Always by a forked process: when a write fails, torch's file writer leaves its process unsafe (segmentation
        # fault in a later garbage collection). The fork is the snapshot; from a device, what this rank writes is copied
        # before it, which is all that training waits for.
        self._calls.schedule_async_request(request)

    def _strategy_for(
        self, state: dict[str, Any], publish: Callable[[], None]
    ) -> FullyParallelSaveStrategyWrapper | SaveStrategy:
        """Return how to save: as the last time, if all ranks save the same tensors again.

        Otherwise, as in a first save or after a first step that was skipped, ranks send each other as objects what they
        have and will write.
        """
        structure = _describe(state)
        is_new = is_any(self._strategy is None or structure != self._structure)
        if self._strategy is None or is_new:
            # Data-parallel replicas share the writing.
            self._strategy = FullyParallelSaveStrategyWrapper(SaveStrategy(self._host_memory), self.groups.dp_cp, True)
        self._structure = structure
        writer: SaveStrategy = self._strategy.base_strategy
        writer.publish = publish
        # Without replicas there is nothing to share, and megatron-core would check again who writes what.
        return self._strategy if is_new or self.groups.dp_cp.size() > 1 else writer

    def finalize(self, blocking: bool = False) -> bool:
        """Publish a background save that is written on all ranks; called after every step and, blocking, at the end.

        Args:
            blocking: wait for it.

        Returns:
            Whether no save is under way any more.

        Raises:
            SaveError: it could not be written; earlier checkpoints are untouched.
        """
        try:
            self._calls.maybe_finalize_async_calls()
            if blocking and self._calls.get_num_unfinalized_calls():
                assert self._incomplete is not None
                wait_for_save(self._calls, self._incomplete, self._num_bytes)
        except SaveFailed as error:
            incomplete, self._strategy = self._incomplete, None
            assert incomplete is not None
            on_first_rank(lambda: shutil.rmtree(incomplete, ignore_errors=True))
            on_first_rank(self._confirm_owner)
            raise self._save_error(error) from None
        return self._calls.get_num_unfinalized_calls() == 0

    def load(
        self,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        param_scheduler: OptimizerParamScheduler | None,
    ) -> Resumed | None:
        """Continue from the newest complete checkpoint, whatever layout it was saved in.

        Returns:
            Step and data position, or None when there is no checkpoint.

        Raises:
            CheckpointError: it is damaged, of another model, or its optimizer does not fit.
        """
        step = self.latest_step()
        if step is None:
            return None
        folder, manifest = on_first_rank(lambda: _find_and_read(run_folder.step_folder(self.directory, step)))
        manifest.identity.check_family(self.identity, folder)
        with run_folder.reading_manifest(folder, "step"):
            assert manifest.step == step, f"{manifest.step} in the folder of step {step}"
        if manifest.identity.text_only != self.identity.text_only:
            raise CheckpointError(
                f"saved with model.text_only {manifest.identity.text_only}, this run uses {self.identity.text_only}",
                str(folder),
                "resume with the same, or start a new run_dir from its weights (checkpoint.load)",
            )
        of_former = {"context": 1}  # a size that former checkpoints do not name
        same_layout = of_former | dict(manifest.layout) == of_former | self.layout
        state = self._state(model_chunks, optimizer, is_loading=True)
        if not same_layout:
            del state["random"]
        if optimizer is not None:
            with run_folder.reading_manifest(folder, "optimizer"):
                saved = self._check_optimizer(manifest, optimizer, folder)
                state["optimizer"] = optimizer_state.redirect_main_parameters(state["optimizer"], optimizer, saved)
        _check_tensors(state, folder, self.groups)
        loaded = _read(lambda: dist_checkpointing.load(state, str(folder)), folder)
        if optimizer is not None:
            with run_folder.reading_manifest(folder, "optimizer"):
                optimizer_state.load_state(optimizer, loaded.get("optimizer", {}), saved, str(folder))
        if param_scheduler is not None:
            with run_folder.reading_manifest(folder, "scheduler"):
                state_of_schedule = dict(manifest.scheduler or {})
                assert state_of_schedule["num_steps"] == step, f"it is after step {state_of_schedule['num_steps']}"
                param_scheduler.load_state_dict(state_of_schedule)
        self.passthrough = manifest.passthrough
        if same_layout:
            set_random_state(loaded["random"])
        return Resumed(folder, manifest.step, manifest.data or {}, manifest.extra, same_layout)

    def _check_optimizer(self, manifest: Manifest, optimizer: MegatronOptimizer, folder: Path) -> Mapping[str, Any]:
        """The saved optimizer's description, if this optimizer can continue from it."""
        if manifest.optimizer is None:
            raise CheckpointError(
                "holds only weights, so training cannot resume", str(folder), "start from it with checkpoint.load"
            )
        if manifest.precision != self.precision:
            raise CheckpointError(
                f"saved with precision {manifest.precision}, this run uses {self.precision}",
                str(folder),
                "resume with the same precision, or start a new run_dir from its weights (checkpoint.load)",
            )
        optimizer_state.match_groups(optimizer, manifest.optimizer, str(folder))
        return manifest.optimizer

    def _state(
        self, model_chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, is_loading: bool
    ) -> dict[str, Any]:
        model = sharded_model_state(model_chunks, self.groups)
        state: dict[str, Any] = {"model": model}
        if optimizer is not None:
            state["optimizer"] = optimizer_state.sharded_state(optimizer, model, is_loading)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        state["random"] = ShardedObject("random_state", random_state(), (world_size,), (rank,))
        return state


def _is_copy(leaf: object) -> bool:
    """Whether a tensor of the model or the optimizer belongs to a copy that another pipeline chunk holds."""
    return isinstance(leaf, ShardedTensor) and leaf.replica_id[0] != 0


def _describe(state: dict[str, Any]) -> bytes:
    """Return a digest of which parts of which tensors this rank has, whatever their values are."""
    digest = hashlib.blake2b()
    for leaf in nested_values(state):
        names = ("key", "replica_id", "dtype", "local_shape", "global_shape", "global_offset", "flattened_range")
        digest.update(repr((type(leaf).__name__, *(getattr(leaf, name, None) for name in names))).encode())
    return digest.digest()


def gather_parameters(model_chunks: Sequence[torch.nn.Module]) -> None:
    """With `overlap_param_gather`, updated parameters arrive only in the next forward pass; fetch them now."""
    for chunk in model_chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _read[Result](action: Callable[[], Result], folder: Path) -> Result:
    """Run `action`, which reads tensors; if it fails on any rank, every rank has the same error for the user."""
    failure: Any = None
    try:
        with warnings.catch_warnings(), loading_with(CheckedFileReader):
            # Remarks on the way in which megatron-core calls torch.
            warnings.filterwarnings("ignore", module=r"(torch\.distributed\.checkpoint|megatron)\.")
            result = action()
    except CheckpointException as error:  # torch's, one reason per rank
        failure = next(iter(error.failures.values()))[0]
    except (*UNREADABLE, AttributeError, TypeError, AssertionError, CheckpointingException) as error:
        failure = error
    failures = gather_if_any(failure and f"{failure} ({type(failure).__name__})")
    found = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None]
    if found:
        raise CheckpointError(
            f"cannot be read, {found[0]}",
            str(folder),
            "it is damaged: use another one, or move it away to resume earlier",
        )
    return result


def _find_and_read(path: Path) -> tuple[Path, Manifest]:
    folder = run_folder.find_checkpoint(path)
    return folder, Manifest.read(folder)


def _check_tensors(state: dict[str, Any], folder: Path, groups: ProcessGroupCollection) -> None:
    """The model's tensors must be in the checkpoint, in the same global shapes, and its parts must have no others."""
    stored = on_first_rank(lambda: TorchDistReader(folder).shapes)
    local = {leaf.key: tuple(leaf.global_shape) for leaf in nested_values(state) if isinstance(leaf, ShardedTensor)}
    gathered: list[Any] = [None] * groups.pp.size()
    torch.distributed.all_gather_object(gathered, local, group=groups.pp)
    wanted = {key: shape for stage in gathered for key, shape in stage.items()}
    parts = {_part(key) for key in wanted} - {"optimizer"}
    problems = [f"{key} is missing" for key in wanted if key not in stored]
    problems += [f"{key} is in it and not in the model" for key in stored if _part(key) in parts and key not in wanted]
    problems += [
        f"{key} is {list(stored[key])}, the model has {list(shape)}"
        for key, shape in wanted.items()
        if stored.get(key, shape) != shape
    ]
    # A tensor of the optimizer's may be missing on the one rank that has a part of it.
    found = sorted({problem for of_rank in gather_if_any(problems or None) for problem in of_rank or ()})
    if found:
        more = f" and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(found[:_SHOWN_PROBLEMS])}{more}",
            str(folder),
            "use the model.hf_path, model.text_only and model.freeze it was saved with",
        )


def _part(key: str) -> str:
    """`language_model`, `vision_tower`, `projector`, ... or `optimizer`."""
    return key.partition(".")[0]
