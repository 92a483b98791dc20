"""GPUs and their nodes: what makers publish, and the fractions of it that programs are assumed to reach.

The table can be extended and changed by a YAML file. No figure was measured with this code: the fractions are
assumptions, which a run's own step times can replace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files.config_files import read_config_file


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU in a kind of cluster.

    Attributes:
        memory_gib: memory of a GPU in GiB, as its driver reports it.
        bf16_tflops: dense matmuls in bf16, in TFLOP/s.
        memory_gb_per_second: bandwidth of its memory.
        node_gb_per_second: what a GPU sends to others of its node, in one direction (NVLink).
        network_gb_per_second: what a GPU sends to other nodes, in one direction (its share of the node's adapters).
        gpus_per_node: GPUs in a node.
        matmul_fraction: part of `bf16_tflops` that matmuls reach.
        attention_fraction: part of it that attention reaches.
        memory_fraction: part of the memory's bandwidth that other operators reach.
        link_fraction: part of the links' bandwidth that exchanges reach.
        launch_microseconds: time in which the host starts an operator; a device that is faster waits.
        latency_microseconds: time of an exchange beside that of its bytes.
    """

    memory_gib: float
    bf16_tflops: float
    memory_gb_per_second: float
    node_gb_per_second: float
    network_gb_per_second: float
    gpus_per_node: int = 8
    matmul_fraction: float = 0.65
    attention_fraction: float = 0.4
    memory_fraction: float = 0.75
    link_fraction: float = 0.75
    launch_microseconds: float = 5.0
    latency_microseconds: float = 10.0


# NVIDIA's data sheets (SXM modules, HGX/DGX nodes): dense FLOP/s without sparsity; half of NVLink's total, which counts
# both directions; one adapter of 400 Gb/s (A100: 200 Gb/s) per GPU.
GPUS: Mapping[str, Hardware] = {
    "A100-40": Hardware(40.0, 312, 1555, 300, 25),
    "A100-80": Hardware(80.0, 312, 2039, 300, 25),
    "H100": Hardware(79.6, 989, 3350, 450, 50),
    "H200": Hardware(140.4, 989, 4800, 450, 50),
    "B200": Hardware(179.0, 2250, 8000, 900, 50),
}


def find_hardware(name: str, path: str | None = None) -> Hardware:
    """Return a kind of GPU by name, from the table or from a file that extends it.

    Args:
        name: name of the GPU.
        path: YAML file of names, each with the fields of `Hardware`; of a name in the table, those that differ.

    Raises:
        ConfigError: the name is unknown, or the file has unknown, missing or impossible fields.
    """
    given = {} if path is None else read_config_file(path).content
    table: dict[str, Hardware] = dict(GPUS)
    for key, fields in given.items():
        table[str(key)] = _checked(str(key), fields, table.get(str(key)), str(path))
    if name not in table:
        raise ConfigError(
            f"GPU {name!r} is not known",
            fix=f"use {', '.join(table)}, or describe it in a YAML file and give that with --hardware",
        )
    return table[name]


def _checked(name: str, fields: Any, known: Hardware | None, path: str) -> Hardware:
    """Return hardware with the fields of a file."""
    kinds = {field.name: field for field in dataclasses.fields(Hardware)}
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{name} is no mapping of fields", path, f"give {', '.join(kinds)}")
    unknown = [str(key) for key in fields if key not in kinds]
    if unknown:
        raise ConfigError(f"{name} has unknown fields {', '.join(unknown)}", path, f"fields are {', '.join(kinds)}")
    for key, value in fields.items():
        most = 1.0 if str(key).endswith("_fraction") else 1e6
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most
        if not is_number or (key == "gpus_per_node" and not isinstance(value, int)):
            whole = "a whole number" if key == "gpus_per_node" else "a number"
            raise ConfigError(f"{name}.{key} is {value!r}", path, f"give {whole} above 0 and at most {most:g}")
    required = [key for key, field in kinds.items() if field.default is dataclasses.MISSING]
    missing = [key for key in required if known is None and key not in fields]
    if missing:
        raise ConfigError(f"{name} lacks {', '.join(missing)}", path, "give them, or use a name of the table")
    return Hardware(**fields) if known is None else dataclasses.replace(known, **fields)
