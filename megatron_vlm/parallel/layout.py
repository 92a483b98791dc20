"""How ranks divide a model and a global batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How one model and one global batch are divided over a world of ranks."""

    world_size: int
    tensor_size: int
    pipeline_size: int
    context_size: int
    data_size: int
    num_micro_batches: int
    """Micro-batches per step of one data-parallel rank."""
    chunks: tuple[tuple[int, ...], ...]
    """Decoder layers of each global chunk."""
    expert_size: int = 1
    """Ranks that divide the experts among them; the ranks of a stage are divided anew for experts."""
    expert_tensor_size: int = 1
    """Ranks that share each expert."""

    @property
    def expert_data_size(self) -> int:
        """Ranks that hold copies of one expert."""
        return self.world_size // (self.pipeline_size * self.expert_size * self.expert_tensor_size)

    def chunks_of(self, pipeline_rank: int) -> list[int]:
        """Global chunk ids that one pipeline rank holds, in the order of its virtual stages."""
        return list(range(pipeline_rank, len(self.chunks), self.pipeline_size))

    def __str__(self) -> str:
        text = (
            f"{self.world_size} ranks = tensor {self.tensor_size} x pipeline {self.pipeline_size} "
            f"x context {self.context_size} x data {self.data_size}"
        )
        if self.expert_size * self.expert_tensor_size > 1:
            text += (
                f"; for experts tensor {self.expert_tensor_size} x pipeline {self.pipeline_size} "
                f"x expert {self.expert_size} x data {self.expert_data_size}"
            )
        return text
