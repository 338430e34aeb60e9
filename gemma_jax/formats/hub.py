"""Fetches a model from the Hugging Face Hub: `hf:OWNER/NAME[@REVISION]`."""

from pathlib import Path
import re

PREFIX = 'hf:'

# Everything that is read here, and what transformers needs besides.
_FILES = (
  'added_tokens.json',
  'chat_template.jinja',
  'chat_template.json',
  'config.json',
  'gemma_jax.json',
  'generation_config.json',
  '*.safetensors',
  'model.safetensors.index.json',
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
)


def fetch(reference: str) -> Path:
  """Returns the folder of a model in the Hub's cache, fetching it if needed.

      fetch('hf:google/gemma-2b')             its main branch
      fetch('hf:google/gemma-2b@9cf48e52b2')  a commit, branch or tag

  An interrupted download resumes where it stopped. Without a network the copy in
  the cache is used. HF_TOKEN, HF_HOME and HF_ENDPOINT are honoured.

  Raises:
    ValueError: huggingface_hub is not installed, the name is malformed, there is
      no such model or revision, its licence was not accepted, or it is not in the
      cache and the Hub cannot be reached.
  """
  match = re.fullmatch(r'hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?', reference)
  if not match:
    raise ValueError(
      f'model.path: got {reference!r}, expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION.'
    )
  name, revision = match['name'], match['revision']
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError:
    raise ValueError(
      f'model.path: fetching {reference!r} requires huggingface_hub, which is not '
      "installed; pip install -e '.[hub]'."
    ) from None

  def refuse(reason: str) -> ValueError:
    return ValueError(f'model.path: got {reference!r}, {reason}')

  try:
    folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_FILES))
  except errors.GatedRepoError:
    raise refuse(
      f'whose licence was not accepted yet: accept it at '
      f'https://huggingface.co/{name} and log in (hf auth login, or HF_TOKEN).'
    ) from None
  except errors.RevisionNotFoundError:
    raise refuse(f'but the model has no revision {revision!r}.') from None
  except errors.RepositoryNotFoundError:
    raise refuse('which the Hub does not have, or does not show you (hf auth login).') from None
  except errors.LocalEntryNotFoundError:
    raise refuse(
      'which is not in the cache, and the Hub cannot be reached; check the '
      'network, or give the path of a folder.'
    ) from None
  except Exception as e:  # from the hub's, the network's or Xet's libraries
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise refuse(
      f'which could not be fetched completely ({reason}); the same command resumes the download.'
    ) from None
  return Path(folder)
