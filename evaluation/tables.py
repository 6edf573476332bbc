"""Plain-text tables for the terminal."""

from collections.abc import Mapping, Sequence

Cell = str | int | float | None


def format_cell(value: Cell) -> str:
    """Four decimals for a float, as much as needed for the rest, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) >= 1e4 else f"{value:.4f}"
    return str(value)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Columns padded to their widest cell, the first one left- and the others right-aligned."""
    cells = [list(header), *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        """One row, padded."""
        first, *rest = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def metrics_table(title: str, metrics: Mapping[str, Cell]) -> str:
    """One metric per line under a title."""
    return text_table([title, ""], [[name, value] for name, value in metrics.items()])
