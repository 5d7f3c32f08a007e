"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
EngineName = Annotated[str, typer.Option(help="ort, torch, trt (TensorRT) or rtx (TensorRT-RTX).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<n>; default: cpu, for trt and rtx cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine; default: the runtime's choice.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch: torch.compile; default: on a GPU, not on a CPU.")]
CudaGraphs = Annotated[
    bool | None,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="Replay CUDA graphs of shapes that come again; default: torch, for batches of up to 8."),
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="torch on a GPU: round the inputs of fp32 products to TF32, 10 bits of mantissa as in fp16.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="torch: convolutions with channels innermost.")]
TensorrtProvider = Annotated[bool, typer.Option("--tensorrt-provider", help="ort: its own TensorRT provider, on a GPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Preprocess = Annotated[str, typer.Option(help="center (crop) or squash (keeps what lies at the edges).")]
CaptionProtocol = Annotated[str, typer.Option(help="joined (all captions of a sample) or first.")]
BatchSize = Annotated[str, typer.Option(help="Samples in a batch, part of the store's identity; auto: the fastest that fits, found by a short run.")]
ShardSize = Annotated[int, typer.Option(help="Rows in a shard.")]
NumWorkers = Annotated[str, typer.Option(help="Threads that decode; auto: one for every core.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]
ValidationImage = Annotated[Path | None, typer.Option(help="Image store to select on. Default: a seeded 15 % of the joined rows.")]
ValidationText = Annotated[Path | None, typer.Option(help="Text store to select on.")]
Splits = Annotated[
    Path | None,
    typer.Option("--splits", help="File of ids and their splits (JSON, JSONL, CSV, TSV, Parquet, text), such as the one beside an earlier result."),
]
AllowShared = Annotated[
    bool, typer.Option("--allow-shared", help="Go on where the same samples stand in two splits; the result records it, and it flatters.")
]
