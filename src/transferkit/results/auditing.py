"""What an audit found in a set of images, as a table, a file and pictures."""

import csv
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from transferkit.base.arguments import one_of, whole_number
from transferkit.data.sources import Source
from transferkit.results.assessment import Assessment
from transferkit.results.gallery import WRONG, draw_images, read_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {  # what an audit looks for
    "label": "labels that are likely wrong",
    "duplicate": "copies of another training image",
    "leak": "validation images that are copies of a training image",
    "outlier": "images unlike all others",
    "brightness": "images that are much brighter or darker than the rest",
    "size": "images of another size or shape than the rest",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one image.

    Attributes:
        kind: A key of `KINDS`.
        index: Of the image, in the training data; of a leak, in the validation data.
        path: Its file, if the data lists files.
        label: Name of its class.
        score: How strong the finding is; the findings of a kind are sorted by it. Of a label, its probability; of a
            copy, the difference in contrast; else robust standard deviations from the median.
        detail: A sentence.
        other: Index of the training image that a copy is a copy of.
        other_path: Of that one's file.
    """

    kind: str
    index: int
    path: str | None
    label: str
    score: float
    detail: str
    other: int | None = None
    other_path: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Audit:
    """What was found, the most striking of each kind first. It prints as a summary.

    Attributes:
        findings: All of them, in the order of `KINDS`.
        assessment: Each training image's prediction by the head that did not see it. Its `confusion_matrix()` shows
            which classes are confused.
        precision: Fraction of changed labels found when some were changed on purpose, among as many worst-looking ones.
        sources: The training and the validation images, for pictures.
    """

    findings: list[Finding]
    assessment: Assessment
    precision: float
    sources: Sequence[Source]

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of one kind, such as "label"; an unknown one is an `ArgumentError`."""
        one_of("kind", kind, KINDS)
        return [finding for finding in self.findings if finding.kind == kind]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all findings to a file with a header, one per line."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([column.name for column in fields(Finding)])
            table.writerows(map(astuple, self.findings))

    def plot(self, kind: str, *, num_images: int = 12, ax: "Axes | None" = None) -> "Figure":
        """Show the first images of one kind.

        Raises:
            ArgumentError: When there is no such kind, or `num_images` is below 1.
            MissingPackageError: When matplotlib is not installed.
        """
        found = self.of(kind)[: whole_number("num_images", num_images)]
        images = read_pixels(self.sources[-1 if kind == "leak" else 0], [each.index for each in found])
        titles = [f"{each.index}: {each.label}\n{each.detail}" for each in found]
        return draw_images(images, titles, colors=[WRONG] * len(found), ax=ax)

    def __str__(self) -> str:
        count = len(self.assessment.targets)
        lines = [f"{count:,} images, accuracy {self.assessment.accuracy:.4f} of a head that did not see them"]
        for kind, what in KINDS.items():
            found = self.of(kind)
            lines.append(f"{len(found):6,}  {what}")
            lines += [f"        {each.path or f'image {each.index}'}: {each.detail}" for each in found[:3]]
        lines.append(
            f"Look before you delete: when 5 % of the labels were exchanged on purpose, {self.precision:.0%} of as "
            "many labels that looked worst were those. The others are hard images, from which a model learns most."
        )
        pairs = [f"{true} for {guess} ({times})" for true, guess, times in self.assessment.most_confused(3)]
        lines.append(f"classes most often mixed up (true for predicted): {', '.join(pairs) or 'none'}")
        return "\n".join(lines)

    __repr__ = __str__  # what an interpreter shows
