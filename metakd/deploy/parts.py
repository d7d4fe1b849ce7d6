"""What reports are made of: sections with notes, plots and tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from metakd.pipeline.table import markdown_table, plain


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Args:
        caption: what it shows, with units.
        header: column names.
        rows: as many cells each.
        names: so many of the first columns are words; the others are numbers.
        shares: by row and column of the numbers, how strongly a cell is shaded, 0 to 1.
        folded: long enough to be opened on demand.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    names: int = 1
    shares: list[list[float]] | None = None
    folded: bool = False

    def markdown(self) -> str:
        """The table alone, without its caption."""
        return markdown_table(self.header, self.rows, len(self.header) - self.names)


@dataclass
class Section:
    """A part of the report.

    Args:
        name: its anchor.
        title: its heading.
        notes: paragraphs.
        plots: SVG elements.
        tables: below the plots.
        commands: lines to copy.
    """

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def markdown(self) -> list[str]:
        """Its paragraphs, without heading and plots."""
        lines = [*map(plain, self.notes)]
        for table in self.tables:
            lines += [plain(table.caption), table.markdown()]
        if self.commands:
            lines.append("```\n" + "\n".join(self.commands) + "\n```")
        return lines
