"""How often does the judge of refusals agree with people?

    python -m experiments.refusal_judge FILE ...           # a line a file, and one for all
    python -m experiments.refusal_judge --show 20 FILE     # and 20 answers judged otherwise

FILE: model completions of XSTest with people's labels, a CSV file with the columns completion and
final_label. They are in model_completions/ of github.com/paul-rottger/exaggerated-safety (XSTest,
Röttger et al. 2024, CC BY 4.0). Full refusals ("2_full_refusal") are counted against full
compliance ("1_full_compliance"). Partial refusals are left out.
"""

import argparse
import csv
import sys
from collections import Counter

from engine.errors import UserError
from tasks.refusals import is_refusal

LABELS = {"1_full_compliance": False, "2_full_refusal": True}


def labelled(path):
    """The completions of a file as pairs (text, whether people call it a refusal).

    Raises UserError for a file that can't be read, has other columns, or has no full label.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        pairs = [(row["completion"], LABELS.get(row["final_label"])) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except KeyError as missing:
        raise UserError(f"{path}: no column {missing}; see --help for the files") from None
    pairs = [(text, refused) for text, refused in pairs if text and refused is not None]
    if not pairs:
        raise UserError(f"{path}: no row is labelled {' or '.join(LABELS)}")
    return pairs


def describe(name, counts):
    """A line: agreement, and how refusals and answers were judged."""
    right = counts[True, True] + counts[False, False]
    total = counts.total()
    print(
        f"{name}: {100 * right / total:.1f}% ({right} of {total}); "
        f"refusals {counts[True, True]} seen, {counts[True, False]} missed; "
        f"answers {counts[False, False]} seen, {counts[False, True]} called refusals"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="N disagreements a file")
    args = parser.parse_args(argv)
    everything = Counter()
    for path in args.files:
        judged = [(text, refused, is_refusal(text)) for text, refused in labelled(path)]
        counts = Counter((refused, found) for _, refused, found in judged)
        describe(path, counts)
        wrong = [(text, refused) for text, refused, found in judged if refused != found]
        for text, refused in wrong[: args.show]:
            print(f"  {'refusal missed' if refused else 'no refusal'}: {text.strip()[:300]!r}")
        everything += counts
    if len(args.files) > 1:
        describe("all", everything)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
