"""What the demos differ in (model, layouts and length); everything else is the same for each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from demo import gemma3, gemma4, mistral3, qwen3_vl
from demo.dataset import IMAGES, IMAGES_AND_CLIPS, Task
from demo.launch import RANKS

LEARNED_TOKENS = 192
PIPELINE_MICRO_BATCH_SIZE = 16  # two micro-batches per step, so that both stages have work at once


@dataclass(frozen=True)
class Stage:
    """One start of the training command.

    Attributes:
        layout: keys of the configuration's `parallel` section.
        overrides: command-line arguments for what else differs from the configuration file.
    """

    layout: dict[str, int]
    overrides: tuple[object, ...] = ()

    @property
    def name(self) -> str:
        """Name of the stage: the parallel sizes that are not one."""
        return ", ".join(f"{key}={size}" for key, size in self.layout.items() if size > 1) or "one process"

    def arguments(self) -> list[object]:
        """Returns the stage's arguments of the training command."""
        sizes = [part for key, size in self.layout.items() for part in (f"--parallel.{key}", size)]
        return [*sizes, *self.overrides]


@dataclass(frozen=True)
class Recipe:
    """One demo.

    Attributes:
        title: name of the model.
        config: file under `configs`.
        folder: where runs go, below the repository.
        train_iters: optimizer steps.
        build: writes a model directory for texts and a seed, and returns a line about it.
        stages: each has an equal part of the steps and resumes where the one before has stopped.
        task: what the model learns.
    """

    title: str
    config: str
    folder: str
    train_iters: int
    build: Callable[[Path, Sequence[str], int], str]
    stages: tuple[Stage, ...]
    task: Task = IMAGES

    def alone(self) -> "Recipe":
        """Returns the demo on one process, as on one GPU: it stops and resumes as often, in the only layout."""
        stages = (replace(stage, layout=dict.fromkeys(stage.layout, 1)) for stage in self.stages)
        return replace(self, stages=tuple(stages))


def _build(model: ModuleType, detail: str, folder: Path, texts: Sequence[str], seed: int) -> str:
    processor = model.build_processor(model.train_tokenizer(texts, LEARNED_TOKENS))
    parameters = model.build_model_directory(folder, processor, seed)
    return f"{parameters:,} parameters, {len(processor.tokenizer)} tokens, {detail}"


_TENSOR_THEN_PIPELINE = (
    Stage({"tensor_model_parallel_size": RANKS, "pipeline_model_parallel_size": 1}),
    Stage(
        {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": RANKS},
        ("--train.micro_batch_size", PIPELINE_MICRO_BATCH_SIZE),
    ),
)

RECIPES = {
    "gemma3": Recipe(
        title="Gemma 3",
        config="demo_gemma3.yaml",
        folder="demo_out",
        train_iters=240,
        build=partial(_build, gemma3, f"{gemma3.SOFT_TOKENS_PER_IMAGE} tokens per image"),
        stages=_TENSOR_THEN_PIPELINE,
    ),
    "qwen3_vl_moe": Recipe(
        title="Qwen3-VL-MoE",
        config="demo_qwen3_vl_moe.yaml",
        folder="demo_out/moe",
        train_iters=300,
        build=partial(
            _build,
            qwen3_vl,
            f"{qwen3_vl.NUM_EXPERTS} experts per layer, {qwen3_vl.EXPERTS_PER_TOKEN} per token",
        ),
        stages=(Stage({"expert_model_parallel_size": RANKS}),),
    ),
    "mistral3": Recipe(
        title="Mistral3",
        config="demo_mistral3.yaml",
        folder="demo_out/mistral3",
        train_iters=300,
        build=partial(_build, mistral3, f"{mistral3.TOKENS_PER_IMAGE} tokens per image"),
        stages=_TENSOR_THEN_PIPELINE,
    ),
    "gemma4": Recipe(
        title="Gemma 4",
        config="demo_gemma4.yaml",
        folder="demo_out/gemma4",
        train_iters=360,
        build=partial(
            _build,
            gemma4,
            f"{gemma4.TOKENS_PER_IMAGE} tokens per image, keys and values of {gemma4.SHARED_LAYERS} layers shared",
        ),
        stages=_TENSOR_THEN_PIPELINE,
        task=IMAGES_AND_CLIPS,
    ),
}
