"""What the tests need to know of a model: one entry, and every suite runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from megatron_vlm.families import registry
from tests.families.layouts import LayoutTables
from tests.families.rows import MIXED_ROWS
from tests.parity.comparison import Expected, expected
from tests.parity.tiny_batches import Reference

Rows = tuple[dict[str, Any], ...]

# What tensor ranks hold whole of every decoder (`TinyFamily.replicated`), and of those with norms on queries and keys.
DECODER = {
    r"language_model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": (
        "one vector; activations are whole, or a share of the sequence with all channels"
    ),
    r"language_model\.norm\.weight": "one vector",
}
QUERY_NORMS = {
    r"language_model\.layers\.\d+\.self_attn\.[qk]_norm\.weight": "one vector as long as a head, shared by all heads",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class TinyFamily:
    """A family in its smallest form.

    Attributes:
        name: the model_type of its config.json; a variant says behind it what is different.
        build: makes transformers' model with random parameters, the same each time; given a `tokenizer`, with its
            special tokens and as many rows.
        vocabulary: rows of the embedding without padding, where no tokenizer is given.
        make_batch: a micro-batch of random tokens and pixels, from documents and a seed; given `documents_per_row`,
            with several documents in a row.
        cases: global batches of micro-batches of documents, one in each row; "text" and "mixed" (micro-batches with and
            without media, of which the first has some for every tower) are among them, and others have an odd number of
            images in the first micro-batch. The last is "packed", of micro-batches of rows of several documents.
        replicated: names of the parameters that every tensor rank holds whole, and why (regular expressions).
        build_processor: writes processor and tokenizer into a directory.
        text_class: transformers' class of the language model alone.
        text_config: its configuration, from the whole model's.
        turn: text after which an assistant speaks, and the token that ends what it says.
        rows: a global batch as users write it.
        tables: the layouts in which each suite runs.
    """

    name: str
    build: Callable[..., PreTrainedModel]
    vocabulary: int
    make_batch: Callable[..., Reference]
    cases: Mapping[str, Sequence[Any]]
    replicated: Mapping[str, str]
    build_processor: Callable[[Path], ProcessorMixin]
    text_class: Any
    text_config: Callable[[Any], PreTrainedConfig] = lambda config: config.text_config
    turn: tuple[str, str]
    rows: Rows = MIXED_ROWS
    tables: LayoutTables = field(default_factory=LayoutTables)

    def variant(self, name: str, tables: LayoutTables, cases: Sequence[str], **settings: Any) -> TinyFamily:
        """Another model of the family: `settings` go to `build`."""
        return replace(
            self,
            name=f"{self.name} {name}",
            build=partial(self.build, **settings),
            tables=tables,
            cases={case: self.cases[case] for case in cases},
        )

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:
        # Ranks find the entry again by its name: neither models nor functions are sent.
        return find, (self.name,)

    @cache  # noqa: B019
    def model(self) -> PreTrainedModel:
        """Transformers' model, built once."""
        return self.build().train()

    @property
    def config(self) -> PreTrainedConfig:
        """Of transformers."""
        return self.model().config

    @property
    def settings(self) -> dict[str, str]:
        """With which a run computes what transformers does ("section.key" -> value)."""
        has_choice = registry.detect(self.config).chooses_image_mask(self.config)
        return {"model.image_mask": "transformers"} if has_choice else {}

    @property
    def has_tower(self) -> bool:
        """Not a language model alone."""
        return hasattr(self.config, "vision_config")

    @property
    def has_experts(self) -> bool:
        """In some layers."""
        model_config = registry.detect(self.config).config_from_hf(self.config, text_only=False)
        return any(layer.moe is not None for layer in model_config.text.layers)

    def write(self, folder: Path) -> str:
        """The model as a Hugging Face directory."""
        self.model().save_pretrained(folder)
        return str(folder)

    def micro_batch(self, case: str, number: int, seed: int) -> Reference:
        """A micro-batch of a case, with random numbers of a seed."""
        rows = self.cases[case][number]
        if case != "packed":
            return self.make_batch(rows, seed)
        documents = [document for row in rows for document in row]
        return self.make_batch(documents, seed, documents_per_row=[len(row) for row in rows])

    def micro_batches(self, case: str) -> list[Reference]:
        """The global batch of a case."""
        return [self.micro_batch(case, number, seed=number) for number in range(len(self.cases[case]))]

    @cache  # noqa: B019
    def expected(self, case: str) -> Expected:
        """What transformers computes."""
        return expected(self.model(), self.micro_batches(case))

    def language_model_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """The language model of a vision-language model, alone."""
        alone: PreTrainedModel = self.text_class(self.text_config(model.config))
        alone.model.load_state_dict(model.model.language_model.state_dict())
        alone.lm_head.load_state_dict(model.lm_head.state_dict())
        alone.tie_weights()
        return alone.train()


def find(name: str) -> TinyFamily:
    """The entry of that name."""
    (found,) = (family for family in import_module("tests.families").FAMILIES if family.name == name)
    return found
