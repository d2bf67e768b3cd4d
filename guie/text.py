"""Text: text towers, vocabularies of names, prompt templates."""
import json
import re
from collections import Counter
from numbers import Real

import numpy as np
import open_clip
import pandas as pd
import torch

from guie.distributed import best_device
from guie.errors import InputError, MissingError
from guie.files import did_you_mean, literal, progress_bar, reason_of, user_path
from guie.projection import l2_normalise
from guie.towers import load_open_clip, local_folder

# In the words of the captions that CLIP was trained on
TEMPLATES = ('a photo of a {}.', 'a close-up photo of a {}.', 'a cropped photo of the {}.', 'a picture of a {}.')


def words_of(name):
    """The words of a name, in lower case."""
    return re.findall(r'[a-z0-9]+', name.lower())


class WordTokenizer:
    """Whole words to numbers, for a text tower with a small vocabulary (the miniature CLIP). Unknown words are left out and
    counted in `unknown`."""

    def __init__(self, words, context_length):
        self.numbers = {word: number for number, word in enumerate(words, start=2)}  # 0 pads, 1 begins
        self.context_length = context_length
        self.unknown = Counter()

    def __call__(self, texts):
        """list of str -> int64 (n, context_length)."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        end = len(self.numbers) + 2  # the highest number: open_clip pools a text where the number is highest
        for row, text in zip(tokens, texts):
            self.unknown.update(word for word in words_of(text) if word not in self.numbers)
            known = [self.numbers[word] for word in words_of(text) if word in self.numbers]
            numbers = [1, *known[:self.context_length - 2], end]
            row[:len(numbers)] = torch.tensor(numbers)
        return tokens


def load_text_tower(model_name, pretrained=''):
    """Returns encode(texts, batch_size=256) -> float32 (n, d), the text half of the model that load_image_tower loads.
    Not normalised. Words that a small vocabulary lacks are printed once a call."""
    model = load_open_clip(model_name, pretrained).eval()
    model.visual = None  # the other half, which would take memory
    config = local_folder(model_name) / 'open_clip_config.json'
    words = json.loads(config.read_text()).get('words') if model_name.startswith('local-dir:') else None
    try:
        tokenizer = WordTokenizer(words, model.context_length) if words else open_clip.get_tokenizer(model_name)
    except Exception as error:  # some need another library, or a download
        raise InputError(f'The tokenizer of {model_name} cannot be loaded ({reason_of(error)}): install what it names, turn '
                         f'the internet on, or take another model.') from error

    @torch.inference_mode()
    def encode(texts, batch_size=256):
        model.to(best_device())
        batches = [tokenizer(texts[i:i + batch_size]) for i in range(0, len(texts), batch_size)]
        bar = progress_bar(batches, 'texts', disable=len(batches) == 1)
        vectors = [model.encode_text(batch.to(best_device())).float().cpu() for batch in bar]
        if getattr(tokenizer, 'unknown', None):
            count = len(tokenizer.unknown)
            print(f'{count} {"word is" if count == 1 else "words are"} not in the vocabulary of {model_name}: '
                  f'{", ".join(word for word, _ in tokenizer.unknown.most_common(8))}{", …" * (count > 8)}')
            tokenizer.unknown.clear()
        return torch.cat(vectors).numpy()

    return encode


def read_vocabulary(source, weights=None):
    """Names of things: DataFrame kind, name, weight. source: a JSON file {kind: [names]}, or such a dict.
    weights: {kind: how much each of its names counts in a PCA}, 1 for the others. Blank and repeated names (in any kind,
    whatever their case) are dropped; prints how many. ValueError for what is no vocabulary."""
    kinds, called = (source, 'The vocabulary') if isinstance(source, dict) else (read_json(source), source)
    if not isinstance(kinds, dict):
        raise InputError(f'{called} is not a vocabulary, a JSON object of kinds with lists of names.')
    for kind, names in kinds.items():
        if isinstance(names, (str, dict)) or not np.iterable(names) or not all(isinstance(name, str) for name in names):
            raise InputError(f'{called} is not a vocabulary: its kind {kind!r} must be a list of names.')
    frame = pd.DataFrame([(kind, ' '.join(name.split())) for kind, names in kinds.items() for name in names],
                         columns=['kind', 'name'], dtype=str)
    blank, again = frame['name'] == '', frame['name'].str.lower().duplicated()
    if blank.all():
        raise InputError(f'{called} holds no names.')
    frame['weight'] = frame['kind'].map(kind_weights(weights, pd.unique(frame['kind']))).fillna(1).astype(np.float64)
    if blank.any() or again.any():
        print(f'{called}: dropped {blank.sum()} blank names and {(again & ~blank).sum()} that were there before')
    return frame[~blank & ~again].reset_index(drop=True)


def read_json(path):
    """What a JSON file holds, in any encoding. FileNotFoundError; ValueError, naming the file, for another file."""
    path = user_path(path)
    if not path.is_file():
        raise MissingError(f'There is no vocabulary {path}: check the path.')
    content = path.read_bytes()
    try:
        try:
            return json.loads(content)  # it tells UTF-8, with its mark or without, from UTF-16
        except UnicodeDecodeError:
            print(f'{path} is not UTF-8 and was read as latin-1, which editors in Western Europe write')
            return json.loads(content.decode('latin-1'))
    except ValueError as error:
        raise InputError(f'{path} is not a vocabulary, a JSON object of kinds with lists of names: {error}.') from None


def kind_weights(weights, kinds):
    """{kind: weight} of a dict, or of its text; ValueError for an unknown kind or a weight that is no number."""
    weights = literal(weights, dict) or {}
    if not isinstance(weights, dict):
        raise InputError(f"The weights of kinds are {weights!r}; give {{kind: weight}}, for example {{'landmarks': 2}}.")
    for kind, weight in weights.items():
        if kind not in kinds:
            raise InputError(f'The vocabulary has no kind {kind!r} to weigh; its kinds are {", ".join(kinds)}.'
                             f'{did_you_mean(kind, kinds)}')
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < np.inf:
            raise InputError(f'The weight of the kind {kind!r} is {weight!r}; it must be a number of 0 or more.')
    return weights


def listed(templates):
    """Templates as a list: None is TEMPLATES; one alone, or papermill's text of a list, counts too."""
    read = TEMPLATES if templates is None else literal(templates, list, tuple)
    return [read] if isinstance(read, str) or callable(read) else list(read)


def text_vectors(encode, names, templates=None):
    """Unit vector of each name: the mean of its unit text vectors over the templates (None: TEMPLATES), float32 (n, d).
    A template is a text with {} for the name, or a function name -> text, like open_clip's own."""
    names, templates = [names] if isinstance(names, str) else list(names), listed(templates)
    if not names or not templates:
        raise InputError(f'There are no {"templates" if names else "names"}: give at least one.')
    if wrong := [template for template in templates if not callable(template) and '{}' not in str(template)]:
        raise InputError(f'The template {wrong[0]!r} has no {{}} for the name.')
    texts = [[template(name) if callable(template) else template.replace('{}', name) for name in names]
             for template in templates]
    return l2_normalise(sum(l2_normalise(encode(one)) for one in texts))
