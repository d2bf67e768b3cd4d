"""TROUBLESHOOTING.md: its words are the code's, its tests exist."""
import ast
import re
from pathlib import Path

import pytest

PAGE = Path('TROUBLESHOOTING.md').read_text()
ROWS = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in PAGE.splitlines() if line.startswith('| ')][2:]
TESTS = {node.name: (ast.get_source_segment(text, node), text) for file in sorted(Path('tests').glob('test_*.py'))
         for text in [file.read_text()] for node in ast.walk(ast.parse(text))
         if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')}


def texts(file):
    """Every text in a source, with … for what is filled in."""
    tree = ast.parse(Path(file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


MESSAGES = re.sub(r'\s+', ' ', '\n'.join(text for room in sorted(Path('guie').glob('*.py')) for text in texts(room)))


def test_the_page_has_a_row_for_each_thing_and_the_readme_links_to_it():
    assert len(ROWS) >= 30 and all(len(row) == 4 and all(row) for row in ROWS)
    assert len({row[0] for row in ROWS}) == len(ROWS) and '(TROUBLESHOOTING.md)' in Path('README.md').read_text()


@pytest.mark.parametrize('row', ROWS, ids=[row[0] for row in ROWS])
def test_the_words_that_a_row_promises_are_in_the_code_and_its_test_exists(row):
    _, seen, _, test = row
    quoted = re.findall('`([^`]+)`', seen)
    assert quoted and test.strip('`') in TESTS
    for words in set(quoted) - {'OSError'}:
        for piece in words.split('…'):
            assert piece.strip(' ()') in MESSAGES, piece
    body, file = TESTS[test.strip('`')]
    assert 'assert' in body or 'raises' in body
    spoken = re.findall(r'[\w:;]+', ' '.join(quoted))
    assert any(f'{first} {second}' in file for first, second in zip(spoken, spoken[1:])), 'its test looks for other words'
