"""What reading a data set's names costs, against os.walk and pandas alone: empty files in class folders, rows of a CSV."""
import os
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pandas as pd
from timing import Row, arguments, interleaved, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from guie.datasets import list_images, read_dataset  # noqa: E402


def write_set(folder, files, rows):
    """`files` empty images in class folders of 100, and set.csv, which names them in `rows` different rows."""
    for number in range(0, files, 100):
        (folder / f'{number // 100:05}').mkdir()
        for image in range(100):
            (folder / f'{number // 100:05}/{image:02}.jpg').touch()
    with open(folder / 'set.csv', 'w') as csv:
        csv.write('path,label\n')
        csv.writelines(f'{row % files // 100:05}/{row % 100:02}{"x" * (row // files)}.jpg,{row // 100}\n'
                       for row in range(rows))


def walk(folder):
    """The plain way: all files, neither chosen nor sorted."""
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def silently(work):
    """The result of work(), without what it prints."""
    with redirect_stdout(StringIO()):
        return work()


def main():
    options = arguments(__doc__, 3, files=(int, 100_000, 'images in folders'), rows=(int, 400_000, 'rows of the CSV'))
    files, rows = (300, 900) if options.quick else (options.files, options.rows)
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), files, rows)
        csv = f'{folder}/set.csv'
        seconds, results = interleaved({
            'walk': partial(walk, folder), 'classes': partial(silently, partial(read_dataset, folder)),
            'images': partial(silently, partial(list_images, folder)),
            'pandas': partial(pd.read_csv, csv, dtype=str), 'csv': partial(silently, partial(read_dataset, csv)),
        }, options.repeats)
    found = sorted({*results['walk']} - {csv})
    if not found == results['classes']['path'].tolist() == results['images']['path'].tolist() or len(results['csv']) != rows:
        raise SystemExit('Listing: results differ.')
    print_table(f'{files:,} files and {rows:,} rows', [
        Row(f'read_dataset of {files:,} files, against os.walk', seconds['classes'], seconds['walk'], 's', '≤ 8.0'),
        Row(f'list_images of {files:,} files', seconds['images'], seconds['walk'], 's', '≤ 8.0'),
        Row(f'read_dataset of {rows:,} rows, against pandas.read_csv', seconds['csv'], seconds['pandas'], 's', '≤ 6.0')])


if __name__ == '__main__':
    main()
