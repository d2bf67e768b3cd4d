"""Text: text towers, vocabularies of names, prompt templates."""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch

from guie.distributed import best_device
from guie.errors import InputError
from guie.files import progress_bar
from guie.projection import l2_normalise
from guie.towers import load_open_clip

# In the words of the captions that CLIP was trained on
TEMPLATES = ('a photo of a {}.', 'a close-up photo of a {}.', 'a cropped photo of the {}.', 'a picture of a {}.')


def words_of(name):
    """The words of a name, in lower case."""
    return re.findall(r'[a-z0-9]+', name.lower())


class WordTokenizer:
    """Whole words to numbers, for a text tower with a small vocabulary (the miniature CLIP). Words it does not know are left
    out, counted in `unknown`."""

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
    """encode(texts, batch_size=256) -> float32 (n, d), the text half of the model that load_image_tower would load.
    Not normalised. Unknown words of a small vocabulary are reported once a call."""
    model = load_open_clip(model_name, pretrained).eval()
    config = Path(model_name.removeprefix('local-dir:'), 'open_clip_config.json')
    words = json.loads(config.read_text()).get('words') if model_name.startswith('local-dir:') else None
    tokenizer = WordTokenizer(words, model.context_length) if words else open_clip.get_tokenizer(model_name)

    @torch.inference_mode()
    def encode(texts, batch_size=256):
        model.to(best_device())
        batches = [tokenizer(texts[i:i + batch_size]) for i in range(0, len(texts), batch_size)]
        bar = progress_bar(batches, 'texts')
        vectors = [model.encode_text(batch.to(best_device())).float().cpu() for batch in bar]
        if getattr(tokenizer, 'unknown', None):
            print(f'{len(tokenizer.unknown)} words are unknown to {model_name}: '
                  f'{", ".join(word for word, _ in tokenizer.unknown.most_common(8))}, …')
            tokenizer.unknown.clear()
        return torch.cat(vectors).numpy()

    return encode


def read_vocabulary(source, weights=None):
    """Names of things: DataFrame kind, name, weight. source: a JSON file {kind: [names]}, or such a dict.
    weights: {kind: how much each of its names counts in a PCA}, 1 for the others. Blank names and names that were there
    before (in any kind, whatever their case) are dropped; how many is printed. ValueError for what is no vocabulary."""
    try:
        kinds = source if isinstance(source, dict) else json.loads(Path(source).read_text(encoding='utf-8'))
        frame = pd.DataFrame([(kind, ' '.join(name.split())) for kind, names in kinds.items() for name in names],
                             columns=['kind', 'name'])
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise InputError(f'{source} is not a vocabulary, a JSON object of kinds with lists of names: {error}.') from None
    if unknown := sorted(set(weights or {}) - set(frame['kind'])):
        raise InputError(f'The vocabulary has no kind {unknown[0]!r} to weigh; its kinds are '
                         f'{", ".join(pd.unique(frame["kind"]))}.')
    frame['weight'] = frame['kind'].map(weights or {}).fillna(1).astype(np.float64)
    blank, again = frame['name'] == '', frame['name'].str.lower().duplicated()
    if blank.any() or again.any():
        print(f'{source}: dropped {blank.sum()} blank names and {(again & ~blank).sum()} that were there before')
    return frame[~blank & ~again].reset_index(drop=True)


def text_vectors(encode, names, templates=None):
    """Mean over the templates (None: TEMPLATES) of each name's unit text vector, again of length 1: float32 (n, d)."""
    names, templates = list(names), TEMPLATES if templates is None else templates
    if wrong := [template for template in templates if '{}' not in template]:
        raise InputError(f'The template {wrong[0]!r} has no {{}} for the name.')
    texts = [[template.format(name) for name in names] for template in templates]
    return l2_normalise(sum(l2_normalise(encode(one)) for one in texts))
