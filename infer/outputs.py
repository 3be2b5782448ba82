"""What a job prints and writes when all rows are merged: the table, sidecars and the gallery."""

from captioner import cli
from infer.gallery import write_gallery
from infer.inputs import lines_of_left_out
from infer.listing import Listing
from infer.results import read_rows
from infer.row_index import Summary
from infer.settings import CaptionSettings
from infer.sidecars import write_sidecars


def report(summary: Summary, listing: Listing, *, rate: float, settings: CaptionSettings) -> None:
    """Print the numbers of rows and failures, the rate, and what was left out on purpose."""
    failures = ", ".join(f"{count:,} {reason}" for reason, count in sorted(summary.failures.items())) or "none"
    header = ("rows", "duplicates", "to review", "files/s now", "failures")
    row = (summary.num_rows, summary.num_duplicates, summary.num_review, rate, failures)
    cli.print_table(str(settings.output), header, [row])
    for line in lines_of_left_out(listing, settings):
        cli.console.print(line, markup=False)


def write_extras(settings: CaptionSettings) -> int:
    """Write the sidecars and the gallery, if wanted. Returns the number of sidecars that could not be written."""
    num_failed = 0
    if settings.sidecar is not None:
        sidecars = write_sidecars(read_rows(settings.output), ending=settings.sidecar)
        num_failed = sidecars.num_failed
        for line in sidecars.lines():
            cli.console.print(line, markup=False)
    if settings.gallery is not None:
        page = write_gallery(read_rows(settings.output), settings.gallery, title="Captions", model=settings.model)
        cli.console.print(f"look at {page}", markup=False)
    return num_failed
