"""Every family in its smallest form: one entry, and all suites run it."""

from tests.families import gemma3, gemma4, mistral3, qwen3_vl

FAMILIES = (*gemma3.ENTRIES, *gemma4.ENTRIES, *qwen3_vl.ENTRIES, *mistral3.ENTRIES)
