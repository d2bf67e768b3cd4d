"""The five nearest of 100,000 vectors of 64 numbers to one, as Search finds them, against 50 ms.

    python benchmarks/search.py

The vectors are a file mapped into memory, as a Search reads them; the answer is a table of paths. Checked: it names the same
images at the same distances as nearest_neighbours, which compares all in float64.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing  # noqa: E402

from guie.collection import Collection  # noqa: E402
from guie.search import found_in  # noqa: E402
from utilities import l2_normalise, nearest_neighbours  # noqa: E402


def main():
    options = timing.arguments(__doc__, repeats=21, rows=(int, 100_000, 'images'))
    n = 2000 if options.quick else options.rows
    vectors = l2_normalise(np.random.default_rng(0).standard_normal((n, 64), dtype=np.float32))
    query = l2_normalise(vectors[7] + vectors[11])
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, 'vectors.npy'), vectors)
        mapped = np.load(Path(folder, 'vectors.npy'), mmap_mode='r')
        images = Collection(pd.DataFrame({'path': [f'/photos/{place}.jpg' for place in range(n)]}), mapped, [])
        seconds, found = timing.interleaved({'ours': lambda: found_in(images, query, 5),
                                             'all': lambda: nearest_neighbours(query[None], vectors, 5)}, options.repeats)
    distances, places = found['all']
    timing.close(found['ours']['distance'], distances[0], 1e-6, 'Distances')
    if found['ours']['path'].tolist() != images.files['path'].iloc[places[0]].tolist():
        raise SystemExit('Other images are found than by nearest_neighbours.')
    timing.print_table(f'5 of {n:,} × 64, {options.threads} threads, median of {options.repeats}; nearest_neighbours takes '
                       f'{1000 * seconds["all"]:.0f} ms',
                       [timing.Row(f'one of {n:,}, against 50 ms', seconds['ours'], .05, 's', '≤ 1.0')])


if __name__ == '__main__':
    main()
