"""Packages: installs what the notebooks need and Kaggle or Colab lacks, from attached wheels or the package index.

Imports nothing but the standard library, since it runs before anything else is there."""
import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from guie.errors import ProcessError

NEEDED = {'open_clip_torch': 'open_clip', 'ftfy': 'ftfy'}  # what Kaggle's image of 2026 lacks; package: its module
MODULES = NEEDED | {'scikit-learn': 'sklearn', 'pillow': 'PIL', 'opencv-python-headless': 'cv2'}
REQUIREMENTS = Path(__file__).resolve().parents[1] / 'requirements.txt'


def install_missing(search=('/kaggle/input',)):
    """Installs missing packages by pip, if open_clip or ftfy is missing: from wheels attached below a folder of `search`,
    else from the package index. Installed packages keep their version. RuntimeError, in one sentence, if it fails."""
    if all(map(is_installed, NEEDED)):
        return
    missing = missing_requirements()
    names = [*map(package_of, missing)]
    wheels = attached_wheels(names, search)
    what = ['--no-index', '--no-deps', *wheels] if wheels else missing
    print(f'Installing {", ".join(os.path.basename(wheel) for wheel in wheels) or ", ".join(missing)}')
    run = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *what],
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace')
    importlib.invalidate_caches()
    if run.returncode or not all(map(is_installed, NEEDED)):
        said = [line for line in run.stderr.splitlines() if line.startswith('ERROR')] or run.stderr.splitlines()
        reason = said[0].removeprefix('ERROR: ').rstrip('.') if said else 'pip installed something else'
        raise ProcessError(
            f'{", ".join(name for name in names if not is_installed(name))} could not be installed ({reason}): turn the '
            f'internet on, or attach a dataset with the folder that `pip download --no-deps -d wheels {" ".join(NEEDED)}` '
            f'makes.')


def package_of(requirement):
    """The package that a line of requirements.txt names."""
    return re.split(r'[<>=!~;\[ ]', requirement)[0]


def is_installed(package):
    """Whether a package's module is found; a package is named as in requirements.txt."""
    return find_spec(MODULES.get(package, package.replace('-', '_'))) is not None


def missing_requirements():
    """The lines of requirements.txt whose package is not installed, and ftfy, which open_clip imports."""
    lines = (line.strip() for line in REQUIREMENTS.read_text().splitlines())
    wanted = [*(line for line in lines if line and not line.startswith('#')), 'ftfy']
    return [line for line in wanted if not is_installed(package_of(line))]


def attached_wheels(packages, search, depth=6):
    """The wheels of these packages in the first folder, at most `depth` levels below those of `search`, that has one for
    each of NEEDED among them; [] if there is none."""
    level = [os.fspath(place) for place in search]
    for _ in range(depth + 1):
        below = []
        for folder in level[:2000]:
            _, folders, files = next(os.walk(folder), ((), (), ()))
            wheels = {name: [os.path.join(folder, file) for file in sorted(files) if is_wheel_of(file, name)]
                      for name in packages}
            if all(wheels[name] for name in NEEDED if name in wheels):
                return [wheel for some in wheels.values() for wheel in some]
            below += [os.path.join(folder, name) for name in sorted(folders)]
        level = below
    return []


def is_wheel_of(file, package):
    """Whether a file is a wheel of a package, however both are spelt."""
    plain = [re.sub(r'[-_.]+', '-', name).lower() for name in (file.partition('-')[0], package)]
    return file.endswith('.whl') and plain[0] == plain[1]
