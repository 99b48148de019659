"""``python -m latentcot.catalog.relevance``: train the scorer and write its model and report."""

import sys

from latentcot.catalog.relevance.make import make_model, report_lines

if __name__ == "__main__":
    print("\n".join(report_lines(make_model(say=lambda line: print(line, file=sys.stderr)))))
