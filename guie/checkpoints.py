"""Checkpoints: saves, loads and finds files of weights and folders of runs, ours or the original authors'."""
import copy
import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from safetensors.torch import save_file
from torch import nn

from guie.config import PUBLISHED, Config
from guie.errors import ExistsError, InputError, MissingError
from guie.files import ATTACHED, attached_folders, literal, state_hash, user_path, whole_file
from guie.model import Embedder, Ensemble, SubcenterHead
from guie.towers import TowerSpec, build_tower, load_image_tower, resize_tower, unloaded_tower
from guie.weights import OF_A_FOLDER, load_strictly, our_names, read_weights, weights_file

PROJECTION = 'projection.'  # how the names of its tensors begin in a file


class Checkpoint(dict):
    """{name: memory-mapped tensor} of a file of weights, read when used; `metadata` is {str: str}, `path` the file. Without
    a name given, `runs/none/model.safetensors` is 'none', and any other file has its own name. The projection is apart, as
    {'weight', 'bias'} or None: it is fitted to these weights and neither averaged nor hashed with them."""

    def __init__(self, tensors, metadata, path, name=None):
        super().__init__((name, tensor) for name, tensor in tensors.items() if not name.startswith(PROJECTION))
        self.projection = {name.removeprefix(PROJECTION): tensor for name, tensor in tensors.items()
                           if name.startswith(PROJECTION)} or None
        self.metadata, self.path = metadata, Path(path)
        path = self.path.absolute()
        self.name = name or (path.parent.name if path.name == 'model.safetensors' else path.name)

    @property
    def config(self):
        """The Config that it was trained with; the defaults if the file has none."""
        return Config.read(self.metadata['config']) if 'config' in self.metadata else Config()

    @property
    def spec(self):
        """Its TowerSpec; KeyError if the file does not say how it is built."""
        spec = json.loads(self.metadata['spec'])
        return TowerSpec(**spec | {'mean': tuple(spec['mean']), 'std': tuple(spec['std'])})

    @property
    def score(self):
        """mP@5 at 64 dimensions (or the most that the data allow) from the run's scores.csv; None without one."""
        scores = self.path.with_name('scores.csv')
        if self.path.name != 'model.safetensors' or not scores.exists():
            return None
        try:
            found = pd.read_csv(scores).query('dim <= 64')[['dim', 'mp5']]
            return float(found.loc[found['dim'] == found['dim'].max(), 'mp5'].iloc[-1]) if len(found) else None
        except (ValueError, LookupError, NameError):  # empty, truncated or another table
            print(f'{scores} cannot be read, so {self.name} counts as not scored')


def open_checkpoint(path, tower=None):
    """Opens a file of weights, or the folder of a run or of save_pretrained -> Checkpoint under our names; a Checkpoint is
    returned as it is. tower: the one that a file of any origin belongs to; its names then decide (see our_names).
    FileNotFoundError; ValueError for a file without weights."""
    if isinstance(path, Checkpoint):
        return path
    path = weights_file(path)
    tensors, metadata = read_weights(path)
    return Checkpoint(our_names(tensors, path, tower.state_dict() if tower is not None else ()), metadata, path)


def save_state(tensors, path, metadata=None, *, overwrite=False):
    """Saves {name: tensor} with metadata {str: str} as safetensors, whole or not at all.
    FileExistsError unless `overwrite`; OSError if it cannot be written, and the old file stays."""
    path, metadata = user_path(path), {'format': 'pt', **(metadata or {})}
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise InputError(f'Metadata is text, unlike {", ".join(wrong)}: pass json.dumps(value).')
    if path.exists() and not overwrite:
        raise ExistsError(f'{path} exists: choose another name, or pass overwrite=True.')
    with whole_file(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their owner can read
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        beside.chmod(mode)


def save_run(run_dir, model, config=None, *, method=None, state=None, file='model.safetensors', **facts):
    """Saves tower, head and projection as run_dir/file, with all that is needed to load them again.
    config: None says which tower it is, and nothing else. method: how it was made, if not by training. state: the model's
    tensors by name, for a sharded model. facts: more metadata, stored as JSON."""
    spec = asdict(model.spec)
    tower = {name: spec[name] for name in ('model_name', 'pretrained', 'image_size')}
    metadata = {'spec': json.dumps(spec), 'config': json.dumps(asdict(config) if config else tower),
                **({'method': method} if method else {}), **{name: json.dumps(value) for name, value in facts.items()}}
    if model.head is not None:
        metadata['subcenters'] = str(model.head.subcenters)
    save_state(model.state_dict() if state is None else state, Path(run_dir) / file, metadata, overwrite=True)


def holds(path, state):
    """Whether a file of weights is there and has exactly these tensors, whatever projection it has besides."""
    with suppress(OSError, ValueError):
        return path.exists() and state_hash(open_checkpoint(path)) == state_hash(state)
    return False


def save_projection(run, linear):
    """Adds the nn.Linear to at most 64 numbers that was fitted to a run to its model.safetensors, or replaces the one there;
    tower, head and metadata stay. FileError if it cannot be written: the file is then as it was."""
    checkpoint = open_checkpoint(run)
    tensors = {f'{PROJECTION}{name}': tensor for name, tensor in linear.state_dict().items()}
    save_state({**checkpoint, **tensors}, checkpoint.path, checkpoint.metadata, overwrite=True)


def load_run(path, tower=None, *, dim=64):
    """The model of a run's folder or file of weights, in evaluation mode: an Embedder, of an ensemble an Ensemble.
    It gives at most `dim` numbers, by the projection that save_results put into the file; dim None: the head's width.
    tower: True leaves head and projection out; a tower, for weights that do not say how they are built (the original
    authors', or of your own tower): only its architecture and spec are used, on a copy."""
    given = tower if isinstance(tower, nn.Module) else None
    checkpoint = open_checkpoint(path, given)
    if checkpoint.metadata.get('method') == 'ensemble':
        return load_ensemble(checkpoint, tower, dim)
    if given is None and 'spec' not in checkpoint.metadata:
        raise InputError(f'{checkpoint.path} does not say which tower it belongs to; pass tower=load_image_tower(…).')
    if dim is not None and dim < 1:
        raise InputError(f'dim is {dim}; give the most numbers that the model shall return, or None for all.')
    try:
        model = unloaded_model(checkpoint, given)
        width = model.head.embedding.out_features if model.head is not None else model.spec.width
        projection = linear_of(checkpoint, None if tower is True else dim, width)
    except Exception as error:  # strangers' metadata may hold anything
        raise not_built(checkpoint, error) from error
    load_strictly(model, checkpoint, checkpoint.path)
    return Embedder(model.tower, None if tower is True else model.head, projection).eval()


def not_built(checkpoint, error):
    """The InputError of a file whose own words do not fit its tensors."""
    return InputError(f'{checkpoint.path} cannot be built from what it says of itself (its metadata, the shapes of head and '
                      f'projection; {type(error).__name__}: {str(error).splitlines()[0]}): save this run again, or pass '
                      f'tower=load_image_tower(…).')


def load_ensemble(checkpoint, tower, dim):
    """The Ensemble of save_ensemble; InputError if a member is not the one it was made of, MissingError without it."""
    if tower is not None:
        raise InputError(f'{checkpoint.name} is an ensemble of several towers: load one of its members instead.')
    folder = checkpoint.path.parent
    try:
        told = [(folder / member['run'], member['hash']) for member in json.loads(checkpoint.metadata['members'])]
        projection = linear_of(checkpoint, dim, checkpoint.projection['weight'].shape[1])
    except Exception as error:
        raise not_built(checkpoint, error) from error
    members = []
    for path, code in told:
        try:
            run = open_checkpoint(path)
        except FileNotFoundError as error:
            raise MissingError(f'{folder} is an ensemble of {path}, which is not there: keep their folders as they were, or '
                               f'make the ensemble again.') from error
        if state_hash(run) != code:
            raise InputError(f'{folder} was made of other weights than those in {run.path} now: make the ensemble again.')
        members.append(load_run(run, dim=None))
    return Ensemble(members, projection).eval()


def linear_of(checkpoint, dim, width):
    """A checkpoint's projection to at most `dim` columns as an nn.Linear; None for dim None, or if there is none, which is
    printed."""
    if dim is None or checkpoint.projection is None:
        if dim is not None and width > dim:
            print(f'{checkpoint.name} holds no projection, so its vectors have {width} numbers; save_results adds one.')
        return None
    weight, bias = (checkpoint.projection[name][:dim].float() for name in ('weight', 'bias'))
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight)).requires_grad_(False)
    linear.load_state_dict({'weight': weight, 'bias': bias})
    return linear


def unloaded_model(checkpoint, tower):
    """An Embedder of the shape that a checkpoint's tensors need, before they are loaded and without the projection."""
    tower = copy.deepcopy(tower) if tower is not None else build_tower(checkpoint.spec)
    head = None
    if 'head.embedding.weight' in checkpoint:
        dim, width = checkpoint['head.embedding.weight'].shape
        told = checkpoint.metadata
        subcenters = int(told.get('subcenters') or json.loads(told.get('config', '{}')).get('subcenters', 3))
        head = SubcenterHead(width, len(checkpoint['head.centers']) // subcenters, dim=dim, subcenters=subcenters,
                             norm='head.norm.running_mean' in checkpoint)
    return Embedder(tower, head)


def sound_checkpoints(paths):
    """Yields the Checkpoints of runs; one that cannot be opened is printed and skipped."""
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            json.loads(checkpoint.metadata.get('config', '{}'))
            yield checkpoint
        except (ValueError, OSError) as error:
            print(f'{path} is skipped: {error}')


def find_ingredients(root, towers, files=None, architectures=None, *, search=ATTACHED):
    """{tower: [Checkpoint]} to average: the finished runs whose names begin with the tower's, below `root` and in attached
    outputs (below `search`); or `files` instead, if given.
    files: {tower: [files of weights, or folders of them]} without our metadata, such as the original authors'.
    architectures: {tower: Config's fields for its files}; None: those of the 4th place."""
    towers = [towers] if isinstance(towers := literal(towers, list, tuple), str) else towers
    files, architectures = literal(files, dict), literal(architectures, dict)
    if not towers and not files:
        raise InputError("TOWERS is empty; give the beginning of the ingredients' names, for example ['vit_h_224'].")
    if files:
        found = {tower: bare_checkpoints(tower, paths, (architectures or PUBLISHED['place4']).get(tower))
                 for tower, paths in files.items()}
    else:
        folders = [*sorted(user_path(root).glob('*')), *map(Path, attached_folders(search))]
        found = {tower: finished_runs(tower, folders) for tower in towers}
    found = {tower: runs for tower, runs in found.items() if runs}
    if not found:
        raise MissingError(f'{root} holds no finished run of {" or ".join(towers)}, nor does an attached output: run '
                           f'train_{towers[0]}.ipynb first, once for every ingredient, or give checkpoints as '
                           f'INGREDIENTS.')
    for tower in {**dict.fromkeys(towers), **found}:
        count = len(found.get(tower, []))
        print(f'{tower}: {count} ingredient{"s" * (count != 1)}')
    return found


def finished_runs(tower, folders):
    """[Checkpoint] of a tower's finished runs in the folders, without stages; of equal names the first."""
    runs = {}
    for folder in folders:
        stage = folder.name.startswith(f'{folder.parent.name}-stage-')
        named = (folder.name == tower or folder.name.startswith(f'{tower}_')) and not stage
        if named and folder.name not in runs and (folder / 'model.safetensors').is_file():
            for run in sound_checkpoints([folder]):
                if method := run.metadata.get('method'):
                    print(f'{folder.name}: left out, since it was not trained (method {method})')
                else:
                    runs[folder.name] = run
                    print(f'{folder.name}: taken from {folder}')
    return list(runs.values())


def bare_checkpoints(tower, paths, architecture):
    """[Checkpoint] of files, or folders of them, that do not say how they are built; each gets the missing metadata and a
    name of its own.
    architecture: Config's fields for their tower; nothing is downloaded, since the files hold all of its weights."""
    if architecture is None:
        raise InputError(f'INGREDIENTS names {tower}, of which neither architecture nor weights are known: give its '
                         f'model_name, pretrained and image_size in ARCHITECTURES.')
    config = Config().override(**architecture)
    module = unloaded_tower(config)
    metadata = {'spec': json.dumps(asdict(module.spec)), 'config': json.dumps(asdict(config))}
    paths = [user_path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    checkpoints = [checkpoint for path in paths for checkpoint in checkpoints_in(path, module)]
    return [Checkpoint(checkpoint, metadata | checkpoint.metadata, checkpoint.path, f'{tower}_{number}_{checkpoint.name}')
            for number, checkpoint in enumerate(checkpoints, start=1)]


def checkpoints_in(path, tower):
    """[Checkpoint] of a file, of one model's folder, or of a folder's files with such a tower; prints the others."""
    if not path.is_dir() or any((path / name).exists() for name in OF_A_FOLDER):
        return [open_checkpoint(path, tower)]
    found, others = [], []
    for entry in sorted(path.iterdir()):
        try:
            if entry.name.startswith('.'):
                raise InputError(f'{entry} is hidden.')
            checkpoint = open_checkpoint(entry, tower)
            if not any(name.startswith('tower.') for name in checkpoint):
                raise InputError(f'{entry} holds no image tower.')
            found.append(checkpoint)
        except (ValueError, OSError) as error:
            reason = re.split('[:,(.]', str(error).partition(f'{entry.name} ')[2])[0].strip()
            others.append(f'{entry.name} {reason or "holds no weights"}')
    if not found:
        raise InputError(f'{path} holds no weights ({"; ".join(others) or "it is empty"}): give the folder that does.')
    if others:
        print(f'{path}: skipped, since {"; ".join(others)}')
    return found


def base_state(run):
    """The pretrained tower that a run started from: {'tower.…': tensor}."""
    spec = open_checkpoint(run).spec
    tower = load_image_tower(spec.model_name, spec.pretrained, spec.image_size)
    resize_tower(tower, spec.image_size, spec.architecture.get('stride'))
    return {f'tower.{name}': tensor for name, tensor in tower.state_dict().items()}
