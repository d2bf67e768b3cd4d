"""Writes guie/host_operators.json: each operator of PyTorch 1.11, the host's, and the arguments of its overloads.

    python3.10 -m venv .venv111
    .venv111/bin/pip install torch==1.11.0 'numpy<2'
    .venv111/bin/python tools/host_operators.py

Left out, so that the check refuses them: overloads that write into an `out` tensor, namespaces other than aten and prim,
and calls of Python code, which no file holds.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

OUTPUT = Path(__file__).parents[1] / 'guie' / 'host_operators.json'


def operators(schemas):
    """{'aten::relu': ['(Tensor self)'], …}: files do not name overloads, so all of a name are together."""
    found = defaultdict(set)
    for schema in schemas:
        wanted = schema.name.startswith(('aten::', 'prim::')) and not schema.name.endswith('PythonOp')
        if wanted and not any(argument.name == 'out' for argument in schema.arguments):
            arguments = str(schema).partition('(')[2].rpartition(' -> ')[0]
            found[schema.name].add(f'({arguments}')
    return {name: sorted(found[name]) for name in sorted(found)}


def main():
    if not torch.__version__.startswith('1.11.'):
        sys.exit(f'This is PyTorch {torch.__version__}: run it with the host\'s, 1.11.')
    lines = [f'{json.dumps(name)}: {json.dumps(overloads)}'
             for name, overloads in operators(torch._C._jit_get_all_schemas()).items()]
    OUTPUT.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
    print(OUTPUT, ':', len(lines), 'operators')


if __name__ == '__main__':
    main()
