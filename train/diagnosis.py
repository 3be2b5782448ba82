"""What the loader's measured times mean, in plain sentences; from numbers alone. Imports no torch."""

import math
from dataclasses import dataclass

ALIKE, UNEXPLAINED = 0.05, 0.15  # smaller differences are a machine's own noise
ADVICE = {
    "read": "larger shards (--shard-megabytes at packing) are opened less often",
    "parse": "sharding/make_shards.py tokenizes captions once; others' shards are tokenized on each reading",
    "decode": "pack with a smaller --size or a lower --quality",
    "transform": "give a smaller --crop",
    "collate": "keep fewer captions an image",
}
STAGES = tuple(ADVICE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """`_us` are microseconds an image, warm unless they say cold; rates are images/s. None: not measured.

    `stage_us` are a worker's stages, `handoff_us` the training process's own time, `alone_` a stream without workers,
    `warm_us` and `cold_us` reading that nothing interrupts.
    """

    stage_us: dict[str, float]
    handoff_us: float
    alone_rate: float
    alone_cpu_us: float
    workers: int
    workers_rate: float
    cores: int
    image_bytes: float
    split_bytes: int
    memory_bytes: int
    warm_us: float
    cold_us: float | None = None
    download_mbs: float | None = None
    loose_us: float | None = None
    loose_cold_us: float | None = None
    loose_folder: str = ""

    @property
    def worker_us(self) -> float:
        """All stages of a worker."""
        return sum(self.stage_us.values())

    @property
    def limit(self) -> str:
        """Hand-off where the measured workers make more than the training process takes; else their longest stage."""
        if 1e6 / self.handoff_us < self.alone_rate * min(self.workers, self.cores):
            return "hand-off"
        return max(self.stage_us, key=lambda stage: self.stage_us[stage])


# ---- the verdict, from numbers alone ------------------------------------------------------------------------


def verdict(m: Measured, *, wanted: float) -> list[str]:
    """What the numbers mean for `wanted` images/s, in plain sentences."""
    return [*limit_lines(m), *workers_lines(m, wanted), *reading_lines(m, wanted), *loose_lines(m)]


def limit_lines(m: Measured) -> list[str]:
    """Which stage limits, and whether the stages explain the whole."""
    made, own_us = m.workers * m.alone_rate, m.stage_us.get(m.limit, m.handoff_us)
    first = f"{own_us:,.0f} of a worker's {m.worker_us:,.0f} µs an image, {own_us / m.worker_us:.0%}"
    if m.limit == "hand-off":
        first = f"one training process takes {1e6 / own_us:,.0f} images/s, {m.workers} workers could make {made:,.0f}"
    whole_us = 1e6 / m.alone_rate
    whole = (
        f"One worker makes {m.alone_rate:,.0f} images/s from end to end: {whole_us:,.0f} µs an image, "
        f"{m.alone_cpu_us:,.0f} of them in the processor; the stages add up to {m.worker_us:,.0f}"
    )
    if whole_us - m.alone_cpu_us > UNEXPLAINED * whole_us:
        whole += ". It waits for the disk or for other programs: measure while nothing else runs"
    elif abs(whole_us - m.worker_us) > UNEXPLAINED * whole_us:
        whole += ", which is another number: the machine's speed changed, measure again"
    return [f"{m.limit.capitalize()} limits: {first}.", f"{whole}."]


def workers_lines(m: Measured, wanted: float) -> list[str]:
    """How many workers are wanted, whether there are so many cores, and what to do where there are not."""
    times = m.workers_rate / m.alone_rate
    lines = [f"{m.workers} workers make {m.workers_rate:,.0f} images/s, {times:.2f} times as many as one alone."]
    kept_up = m.workers <= m.cores and m.limit != "hand-off"
    each = m.workers_rate / m.workers if kept_up else m.alone_rate
    needed, processes = math.ceil(wanted / each), math.ceil(wanted * m.handoff_us / 1e6)
    wish = f"{wanted:,.0f} images/s want {needed:,} worker{'s' if needed > 1 else ''} of {each:,.0f} each"
    if processes > 1:
        wish += f", and {processes} training processes (GPUs), as one takes {1e6 / m.handoff_us:,.0f} at most"
    if needed <= m.cores:
        return [*lines, f"{wish}; that leaves {m.cores - needed} of the {m.cores} cores to training."]
    lines.append(f"{wish}; the {m.cores} cores make about {m.cores * each:,.0f}, more workers do not help.")
    stage, own_us = max(m.stage_us.items(), key=lambda pair: pair[1])
    room_us = 1e6 * m.cores / wanted - (1e6 / each - own_us)
    if room_us > 0:
        return [*lines, f"They would do if {stage} took {room_us:,.0f} µs, not {own_us:,.0f}: {ADVICE[stage]}."]
    return [*lines, f"Even without any {stage} they would not do: it takes {needed:,} cores."]


def reading_lines(m: Measured, wanted: float) -> list[str]:
    """Cold against warm, and what a server must give."""
    first = "Cold reading was not measured: this system did not forget the shards, or does not tell"
    if m.cold_us is not None:
        first = (
            f"Cold reading takes {m.cold_us:,.0f} µs an image ({m.image_bytes / m.cold_us:,.0f} MB/s), warm "
            f"{m.warm_us:,.0f} ({m.image_bytes / m.warm_us:,.0f} MB/s): a worker makes "
            f"{1e6 / (m.worker_us - m.stage_us['read'] + m.cold_us):,.0f} images/s cold, {1e6 / m.worker_us:,.0f} warm"
        )
    size, memory = (f"{num_bytes / 1e9:,.2f} GB" for num_bytes in (m.split_bytes, m.memory_bytes))
    fits = (
        "so later epochs are warm if nothing else fills it" if m.split_bytes < m.memory_bytes else "each epoch is cold"
    )
    lines = [f"{first}.", f"The split has {size}, the machine {memory} of memory: {fits}."]
    if m.download_mbs is not None:
        needed, enough = wanted * m.image_bytes / 1e6, 1e6 * m.download_mbs / m.image_bytes
        lines.append(
            f"{wanted:,.0f} images/s want {needed:,.1f} MB/s ({8 * needed:,.0f} Mbit/s) from the server until all "
            f"{size} are in the cache; one connection gave {m.download_mbs:,.1f} MB/s, for {enough:,.0f} images/s."
        )
    return lines


def loose_lines(m: Measured) -> list[str]:
    """Whether a worker is faster with shards than with the same pictures as files."""
    lines, other_us = [], m.worker_us - m.stage_us["read"]
    for name, shards_us, loose_us in (("warm", m.warm_us, m.loose_us), ("cold", m.cold_us, m.loose_cold_us)):
        if shards_us is not None and loose_us is not None:
            times = (other_us + loose_us) / (other_us + shards_us)
            means = "shards help" if times > 1 else "shards cost time"
            lines.append(
                f"Loose files in {m.loose_folder}, {name}: reading takes {loose_us:,.0f} µs an image, {shards_us:,.0f} "
                f"from shards, with which a worker is {times:.2f} times as fast: "
                f"{means if abs(times - 1) > ALIKE else 'that is no difference'}."
            )
    return lines or ["Shards were not compared with loose files: there was no folder to write some into."]
