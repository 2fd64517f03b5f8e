"""Write the tables into this folder's README.md: `python -m coordinator.strategies`."""

from pathlib import Path

from coordinator.strategies.table import with_tables

README = Path(__file__).with_name("README.md")


def main() -> None:
    """Replace the tables and leave the rest."""
    README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main()
