"""General image embeddings, the front door: what the four notebooks use and more, each from the room it lives in.

A room is a file of guie/. It reads from top to bottom and imports only from the rooms above it:

    errors       errors that a user can fix, one sentence each
    packages     missing packages, installed
    files        files written whole or not at all, attached inputs, hashes
    inputs       data sets that kagglehub fetches on Kaggle and Colab
    tables       DataFrames as tables to read
    distributed  one or several GPUs, and a stop that saves
    weights      files of weights from any origin, under our names
    images       an image file to a uint8 square, augmented, in batches
    listing      which files are images, and which are skipped
    config       the frozen settings of a run
    datasets     known data sets, folders and CSVs to tables
    sources      what your own folder, CSV or list means as data
    splits       images to train on, to make choices on and to report on
    testsets     the test splits of public benchmarks
    losses       margins and sub-centre ArcFace
    projection   PCA from d numbers to at most 64
    retrieval    neighbours and mP@5
    scores       mP@5 with its 95 % interval, tables of scores
    towers       pretrained image towers
    text         text towers and vocabularies
    model        head, Embedder, learning rates
    checkpoints  files of weights and folders of runs
    embedding    images to cached vectors
    results      a run's scores, queries and projection; tables of runs
    protocols    public benchmarks by their own splits and metrics
    memory       memory and disk that a run needs, before it starts
    estimate     about how long towers will take
    heads        a head trained on cached vectors
    trackers     a run's numbers in TensorBoard, W&B and others
    training     the loop
    recipes      what other places and papers changed; training in stages
    soups        averages of weights
    begin        a notebook's parameters to settings, data and folders
    submission   the file for PyTorch 1.11, and its replay
    onnx_export  the same for ONNX runtimes
    card         a model card of recorded facts
    publish      a run as a folder for open_clip or timm
    cells        images with frames and names in a figure
    pictures     what is searched, and queries beside their neighbours
    maps         how alike vectors are, and images on a plane
    comparison   two runs side by side
    collection   the vectors of your own images, kept on disk
    search       your own images found by image or text
    shards       images in tar files, by any number of machines
    plots        curves and bars
    thumbnails   the images of a page, each once, as small pictures
    explore      the page that compares runs, query by query

Two more rooms come before heads: sharding and resume."""
from guie.begin import begin_run, begin_soups, begin_zero_shot
from guie.checkpoints import find_ingredients, load_run, open_checkpoint, save_run
from guie.comparison import compare
from guie.config import Config
from guie.datasets import DATASETS, read_dataset
from guie.embedding import embed, embed_all
from guie.explore import explore
from guie.heads import fit_head, head_gains
from guie.images import ImageDataset, read_image
from guie.losses import adaptive_margins, arcface_loss
from guie.maps import plot_similarities, show_map
from guie.memory import training_plan
from guie.model import Embedder, SubcenterHead, group_table, new_model, param_groups
from guie.onnx_export import export_onnx
from guie.pictures import compare_neighbours, show_augmentation, show_neighbours, show_objects
from guie.plots import plot_basin, plot_dimensions, plot_logs, plot_margins, plot_scores, plot_wise
from guie.projection import concatenate, fit_pca, l2_normalise
from guie.protocols import evaluate_benchmark
from guie.publish import publish
from guie.recipes import RECIPES, train
from guie.results import list_runs, save_ensemble, save_results
from guie.retrieval import mean_precision_at_5, nearest_neighbours, precision_at_5
from guie.scores import gain_table, paired_bootstrap, score_table, scores_by_domain
from guie.search import Search
from guie.soups import StateEmbedder, average_states, greedy_soup, interpolate_states, save_soup, sweep_alpha
from guie.splits import load_data, select_classes
from guie.submission import Submission, evaluate_submission, export_submission, replay_submission
from guie.tables import table
from guie.text import load_text_tower, read_vocabulary, text_vectors
from guie.towers import load_image_tower
from guie.training import fit

__all__ = [
    'table',
    'ImageDataset', 'read_image',
    'Config',
    'DATASETS', 'read_dataset',
    'load_data', 'select_classes',
    'adaptive_margins', 'arcface_loss',
    'concatenate', 'fit_pca', 'l2_normalise',
    'mean_precision_at_5', 'nearest_neighbours', 'precision_at_5',
    'gain_table', 'paired_bootstrap', 'score_table', 'scores_by_domain',
    'load_image_tower',
    'load_text_tower', 'read_vocabulary', 'text_vectors',
    'Embedder', 'SubcenterHead', 'group_table', 'new_model', 'param_groups',
    'find_ingredients', 'load_run', 'open_checkpoint', 'save_run',
    'embed', 'embed_all',
    'list_runs', 'save_ensemble', 'save_results',
    'evaluate_benchmark',
    'training_plan',
    'fit_head', 'head_gains',
    'fit',
    'RECIPES', 'train',
    'StateEmbedder', 'average_states', 'greedy_soup', 'interpolate_states', 'save_soup', 'sweep_alpha',
    'begin_run', 'begin_soups', 'begin_zero_shot',
    'Submission', 'evaluate_submission', 'export_submission', 'replay_submission',
    'export_onnx', 'publish',
    'compare_neighbours', 'show_augmentation', 'show_neighbours', 'show_objects',
    'plot_similarities', 'show_map',
    'compare',
    'Search',
    'plot_basin', 'plot_dimensions', 'plot_logs', 'plot_margins', 'plot_scores', 'plot_wise',
    'explore',
]
