"""``python -m latentcot.catalog``: the catalog's commands without the rest of the project."""

from latentcot.catalog.cli import main

if __name__ == "__main__":
    main()
