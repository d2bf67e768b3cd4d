"""Inputs: Kaggle's data sets, fetched by kagglehub in a notebook of Kaggle or Colab; elsewhere, how to get them."""
import os
import sys
from contextlib import suppress

from guie.errors import MissingError
from guie.files import reason_of

WHERE = 'https://www.kaggle.com'


def host():
    """'Kaggle' or 'Colab' in a notebook there, else ''."""
    if 'KAGGLE_KERNEL_RUN_TYPE' in os.environ:
        return 'Kaggle'
    return 'Colab' if 'google.colab' in sys.modules else ''


def page_of(handle):
    """The address of a dataset 'owner/name' or of a competition 'name'."""
    return f'{WHERE}/{"datasets" if "/" in handle else "competitions"}/{handle}'


def way_to(handle, root='the root of DATA'):
    """How to get a dataset 'owner/name', a competition's data, or a set not on Kaggle (''), as the end of a sentence.
    root: what its folder is to be given as."""
    kind = 'dataset' if '/' in handle else 'competition'
    rules = '' if '/' in handle else f' (accept its rules once, at {page_of(handle)}/rules)'
    if not handle:
        return f'give its folder as {root}'
    if host() == 'Kaggle':
        return f'attach the {kind} {handle} as an input{rules}, or give its folder as {root}'
    return f'get it by `kaggle {kind}s download {handle}`{rules}, unpack it and give its folder as {root}'


def download(handle):
    """The folder of a dataset 'owner/name' or of a competition's data, attached or downloaded by kagglehub -> str. None
    without kagglehub, or outside of Kaggle's and Colab's notebooks, where no download starts unasked. FileNotFoundError, in
    one sentence, if it fails. Never call it in a notebook that submits: the host's reruns of notebooks that fetched a
    competition's data failed (kagglehub #258)."""
    kagglehub = None
    with suppress(ImportError):
        if host():
            import kagglehub
    if kagglehub is None:
        return None
    print(f'{handle}: fetched by kagglehub from {page_of(handle)}')
    try:
        return (kagglehub.dataset_download if '/' in handle else kagglehub.competition_download)(handle)
    except Exception as error:  # of requests, kagglehub and Kaggle
        raise MissingError(f'{handle} could not be fetched by kagglehub ({reason_of(error).rstrip(".")}): '
                           f'{advice(handle, error)}.') from error


def advice(handle, error):
    """What to do after an error of kagglehub, as the end of a sentence."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status in (401, 403) or type(error).__name__ in ('UnauthenticatedError', 'CredentialError'):
        token = f'make a token at {WHERE}/settings/api and keep it as the secret KAGGLE_API_TOKEN'
        rules = f'accept its rules at {page_of(handle)}{"" if "/" in handle else "/rules"}'
        return f'{token}, and {rules}' if host() == 'Colab' else rules
    if getattr(error, 'errno', None) == 28:
        return 'free some space or take a smaller data set'
    return f'turn the internet on, or {way_to(handle)}'
