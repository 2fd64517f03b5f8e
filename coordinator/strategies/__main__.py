"""Write the table into this folder's README.md: `python -m coordinator.strategies`."""

from pathlib import Path

from coordinator.strategies.table import with_table

README = Path(__file__).with_name("README.md")


def main() -> None:
    """Replace the table and leave the rest."""
    README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
