"""Every speed benchmark against its rivals, in one table: what `make benchmark` prints.

    python benchmarks/all.py [--quick] [--threads 1] [NAME ...]

Runs the scripts named, or all of NAMES, one after the other, each in a process of its own. stderr says how long each took
and what it measured. At the end stand their rows in one table, and the aims that were not reached. If a script fails, the
others still run, and all.py ends with an error.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

NAMES = ['waiting', 'image_input', 'head', 'neighbours', 'search', 'soup', 'pca', 'submission', 'embedding', 'step',
         'demo_share']
FOLDER = Path(__file__).resolve().parent


def say(words):
    print(words, file=sys.stderr, flush=True)


def run(name, more):
    """Lines of the table that a script prints: two of the header, then rows. [] if it fails."""
    say(f'{name} ...')
    start = time.perf_counter()
    done = subprocess.run([sys.executable, FOLDER / f'{name}.py', *more], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        say(f'{name}: {seconds:.0f} s, failed')
        return []
    title, _, table = done.stdout.partition('\n\n|')
    say(f'{name}: {seconds:.0f} s; {title.splitlines()[-1].rpartition("; ")[0]}')
    return f'|{table}'.splitlines()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', default=NAMES, metavar='NAME', help=f'of {", ".join(NAMES)}')
    parser.add_argument('--threads', help="each script's; the default is the number of cores")
    parser.add_argument('--quick', action='store_true', help='tiny inputs: only shows that the benchmarks work')
    options = parser.parse_args()
    more = ['--quick'] * options.quick + (['--threads', options.threads] if options.threads else [])
    start = time.perf_counter()
    tables = {name: run(name, more) for name in options.names}
    rows = [f'| {name}: {row[2:]}' for name, table in tables.items() for row in table[2:]]
    header = next((table[:2] for table in tables.values() if table), [])
    print('', *header, *rows, '', sep='\n')
    cells = [row.split(' | ') for row in rows]
    missed = [work.strip('| ') for work, _, _, _, _, _, reached, _ in cells if reached == 'no']
    print(f'{time.perf_counter() - start:.0f} s in all. Aims not reached: {"; ".join(missed) or "none"}.')
    failed = [name for name, table in tables.items() if not table]
    if failed:
        raise SystemExit(f'Failed: {", ".join(failed)}.')


if __name__ == '__main__':
    main()
