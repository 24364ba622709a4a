"""Lines prompts up so that neighbours share the longest prefixes, and cuts the line into shards of equal token work.

An engine computes a prompt's tokens only up to where its prefix cache ends. In the order of the token ids, each prompt
shares with its predecessor the longest prefix that it shares with any earlier one, so `length - shared` is exactly what
a perfect cache must compute for it: the number of new nodes in the prompts' prefix trie. Summed up along the line that
is the token work; cutting the line at equal distances gives shards that keep all engines busy for the same time.

    prompts -> lined_up (sort, measure) -> landed as Parquet -> Line (where each part begins) -> shards of an interval

The line is landed before it is cut: sorting again after a lost executor could put the boundaries elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import IntegerType, LongType, StructField, StructType

# A cut is only made before a new group (a product), where a part of the line begins, and inside a group after so many
# tokens of work: a very hot product is split, and computing its prefix (some hundred tokens) once more for each piece
# stays below a few per cent.
HOT_TOKENS = 8192

MEASURES = [
    StructField("part", IntegerType(), nullable=False),  # piece of the line, in order
    StructField("position", LongType(), nullable=False),  # row number within the part
    StructField("anchor", LongType(), nullable=False),  # token work in the part before this row's cut point
    StructField("new_nodes", IntegerType(), nullable=False),  # tokens a perfect cache computes for this row
    StructField("new_in_blocks", IntegerType(), nullable=False),  # tokens a cache of whole blocks computes
]


def shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two arrays of token ids."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if differs.size else n


def reusable(shared: int, length: int, block: int) -> int:
    """Tokens that a cache of whole blocks saves: whole shared blocks, and never the prompt's last token."""
    return min(shared, length - 1) // block * block


def lined_up(prompts: DataFrame, parts: int, block: int) -> DataFrame:
    """Sorts prompts by token ids into `parts` consecutive parts and measures each row against the one before it.

    `prompts`: `ids` ARRAY<INT> (the prompt), `group_tokens` INT (length of its first part, that of the product or
    whatever else comes first; rows of equal first parts stay together), and columns that pass through. Where there is a
    column `portion` INT, a lower portion comes before a higher one. Returns these and `MEASURES`. The measures of a
    part's first row take nothing from the part before: see `Line`.
    """
    by = [name for name in ("portion", "ids") if name in prompts.columns]
    ordered = prompts.repartitionByRange(parts, *by).sortWithinPartitions(*by)
    schema = StructType(prompts.schema.fields + MEASURES)
    return ordered.mapInArrow(_measure(block), schema).select(*schema.names)


def _measure(block: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def measure(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        part = context.partitionId() if context else 0
        last = np.empty(0, dtype=np.int32)
        position = work = anchor = last_group = 0
        for batch in batches:
            ids = batch.column(batch.schema.get_field_index("ids"))
            groups = batch.column(batch.schema.get_field_index("group_tokens")).to_numpy()
            rows = len(batch)
            anchors, nodes, in_blocks = (np.empty(rows, dtype=np.int64) for _ in range(3))
            for row in range(rows):
                prompt = ids[row].values.to_numpy()
                shared = shared_prefix(last, prompt)
                same_group = groups[row] == last_group and shared >= last_group and position + row > 0
                # One that costs nothing stays with its twin: at the line's very end it would lie behind the last cut.
                if shared < len(prompt) and (not same_group or work - anchor >= HOT_TOKENS):
                    anchor = work
                anchors[row] = anchor
                nodes[row] = len(prompt) - shared
                in_blocks[row] = len(prompt) - reusable(shared, len(prompt), block)
                work += int(nodes[row])
                last, last_group = prompt, int(groups[row])
            measured = [
                pa.array(np.full(rows, part), pa.int32()),
                pa.array(np.arange(position, position + rows), pa.int64()),
                pa.array(anchors, pa.int64()),
                pa.array(nodes, pa.int32()),
                pa.array(in_blocks, pa.int32()),
            ]
            position += rows
            fields = [pa.field(f.name, a.type) for f, a in zip(MEASURES, measured, strict=True)]
            yield pa.RecordBatch.from_arrays([*batch.columns, *measured], schema=pa.schema([*batch.schema, *fields]))

    return measure


# Neighbours on the line: positions lo..hi, both included, of a part; in order.
Stretch = list[tuple[int, int, int]]


def stretches(rows: DataFrame) -> dict[int, Stretch]:
    """The rows of each `shard`, as stretches of the line; a shard's rows must be neighbours."""
    found: dict[int, Stretch] = {}
    ends = rows.groupBy("shard", "part").agg(F.min("position").alias("lo"), F.max("position").alias("hi"))
    for row in ends.orderBy("shard", "part").collect():
        found.setdefault(row["shard"], []).append((row["part"], row["lo"], row["hi"]))
    return found


def length(stretch: Stretch) -> int:
    """Rows in a stretch."""
    return sum(hi - lo + 1 for _, lo, hi in stretch)


def halves(stretch: Stretch) -> list[Stretch]:
    """A stretch cut in the middle; one row stays one piece."""
    half = length(stretch) // 2
    if not half:
        return [stretch]
    pieces: list[Stretch] = [[], []]
    for part, lo, hi in stretch:
        left = min(half, hi - lo + 1)
        half -= left
        if left:
            pieces[0].append((part, lo, lo + left - 1))
        if lo + left <= hi:
            pieces[1].append((part, lo + left, hi))
    return pieces


@dataclass(frozen=True)
class Line:
    """A landed line: where each part begins on it, and its totals. Memory on the driver: one entry a part.

    length: where the line ends, in tokens of work. prompts, prompt_tokens: rows and the sum of their lengths.
    trie_nodes: the least that any cache can compute. block_floor: the least that a cache of whole KV blocks can
    compute: each distinct chain of full blocks once, and every prompt's own rest.
    """

    rows: DataFrame
    starts: dict[int, int]
    length: int
    prompts: int
    prompt_tokens: int
    trie_nodes: int
    block_floor: int

    def shards(self, begin: int, end: int, count: int, riders: DataFrame | None = None) -> DataFrame:
        """The rows whose cut point lies in [begin, end) of the line, each in one of `count` shards of equal work.

        `riders`: other rows, with the line's columns and their `shard`, that are put among them by part and position.

        Every shard is a partition, so a task, of its own, ordered by token ids. Column `shard` is 0..count-1.
        """
        ends = dict(zip(self.starts, [*self.starts.values(), self.length][1:], strict=True))
        here = {part: start for part, start in self.starts.items() if start < end and ends[part] >= begin}
        # Ranges part by part, so that Parquet can skip what lies outside.
        inside = F.lit(False)
        for part, start in here.items():
            inside = inside | (
                (F.col("part") == part) & (F.col("anchor") >= begin - start) & (F.col("anchor") < end - start)
            )
        start_of = F.create_map(*[F.lit(x) for pair in here.items() for x in pair])
        at = start_of[F.col("part")] + F.col("anchor") - begin
        width = max(1, end - begin)
        rows = self.rows.where(inside).withColumn("shard", F.floor(at * count / width).cast("int"))
        rows = rows if riders is None else rows.unionByName(riders)
        # One shard needs no shuffle, while which its engine would wait.
        apart = rows.repartitionById(count, "shard") if count > 1 else rows.coalesce(1)
        return apart.sortWithinPartitions("part", "position")

    def behind(self, at: int) -> tuple[int, int, int]:
        """prompt_tokens, trie_nodes and block_floor of the rows whose cut point lies at or behind `at`, all waves'
        seams left out of account: a few tokens a part too many."""
        behind = F.lit(False)
        for part, start in self.starts.items():
            behind = behind | ((F.col("part") == part) & (F.col("anchor") >= at - start))
        sums = (F.sum(F.size("ids")), F.sum("new_nodes"), F.sum("new_in_blocks"))
        tokens, nodes, in_blocks = (value or 0 for value in self.rows.where(behind).agg(*sums).collect()[0])
        return tokens, min(nodes, self.trie_nodes), min(in_blocks, self.block_floor)

    def pieces(self, stretches: Mapping[int, Stretch]) -> DataFrame:
        """The rows of some stretches, each a partition of its own; column `shard` is the stretch's number."""
        inside = [
            F.when((F.col("part") == part) & F.col("position").between(lo, hi), F.lit(number))
            for number, stretch in stretches.items()
            for part, lo, hi in stretch
        ]
        return (
            self.rows.withColumn("shard", F.coalesce(*inside))
            .where(F.col("shard").isNotNull())
            .repartitionById(len(stretches), "shard")
            .sortWithinPartitions("part", "position")
        )


def line(rows: DataFrame, block: int) -> Line:
    """Reads the totals of a landed line. One small row a part comes to the driver.

    Where one part ends and the next begins, the first row was measured against nothing; the two rows at each seam are
    compared here, so that the totals are those of the whole line.
    """
    parts = (
        rows.groupBy("part")
        .agg(
            F.count("*").alias("rows"),
            F.sum(F.size("ids")).alias("tokens"),
            F.sum("new_nodes").alias("nodes"),
            F.sum("new_in_blocks").alias("in_blocks"),
            F.min_by("ids", "position").alias("first"),
            F.max_by("ids", "position").alias("last"),
        )
        .orderBy("part")
        .collect()
    )
    starts, length, nodes, in_blocks = {}, 0, 0, 0
    last = np.empty(0, dtype=np.int32)
    for part in parts:
        first = np.array(part["first"], dtype=np.int32)
        shared = shared_prefix(last, first)
        starts[part["part"]] = length
        length += part["nodes"]
        nodes += part["nodes"] - shared
        in_blocks += part["in_blocks"] - reusable(shared, len(first), block)
        last = np.array(part["last"], dtype=np.int32)
    prompts, tokens = (sum(part[name] for part in parts) for name in ("rows", "tokens"))
    return Line(rows, starts, length, prompts, tokens, nodes, in_blocks)
