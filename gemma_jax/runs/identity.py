"""A function's identity as text, by which a workdir tells one loss from another.

A name alone would let a notebook continue with a loss that was edited meanwhile.
So the text covers the function's code, closure and defaults, and what it uses of
its own module; for a function from an installed package, only its name and its
closure, where optax keeps a rate.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import hashlib
import itertools
import sys
import types
from typing import Any

import jax
import numpy as np


def of_function(function: Any) -> str:
  """The function's name, and a digest of everything it is made of."""
  inner = function
  while isinstance(inner, functools.partial):
    inner = inner.func
  owner = inner if hasattr(inner, '__qualname__') else type(inner)
  digest = hashlib.sha256('\n'.join(_lines(function, set())).encode()).hexdigest()
  return f'{owner.__module__}.{owner.__qualname__} {digest[:16]}'


def _lines(x: Any, seen: set[int]) -> Iterator[str]:
  """Describes a value line by line; what occurs twice is described once."""
  if isinstance(x, str | int | float | complex | bytes | type(None)):
    yield repr(x)
    return
  if id(x) in seen:
    return
  seen.add(id(x))
  yield f'{type(x).__qualname__} {getattr(x, "__qualname__", "")}'
  parts: Iterable[Any] = ()
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    yield f'{x.dtype}{x.shape}'
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      yield hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
  elif isinstance(x, types.FunctionType):
    parts = (x.__module__, x.__defaults__, x.__kwdefaults__, *_closed_over(x), *_own_parts(x))
  elif isinstance(x, types.MethodType):
    parts = (x.__func__, x.__self__)
  elif isinstance(x, functools.partial):
    parts = (x.func, x.args, x.keywords)
  elif isinstance(x, set | frozenset):
    parts = sorted(map(repr, x))
  elif isinstance(x, dict):
    parts = itertools.chain(*x.items())
  elif isinstance(x, list | tuple):
    parts = x
  elif hasattr(x, '__wrapped__'):  # by jax.jit, for one
    parts = (x.__wrapped__,)
  elif not isinstance(x, type | types.ModuleType):
    call = type(x).__call__ if callable(x) else None
    parts = (call, *getattr(x, '__dict__', {}).items())
  for part in parts:
    yield from _lines(part, seen)


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
  for cell in function.__closure__ or ():
    with contextlib.suppress(ValueError):  # an empty cell
      yield cell.cell_contents


def _own_parts(function: types.FunctionType) -> Iterator[Any]:
  """A function's code and what it uses of its module, unless a package has it."""
  root = function.__module__.partition('.')[0]
  installed = '-packages' in function.__code__.co_filename or root in sys.stdlib_module_names
  if installed or root == __name__.partition('.')[0]:
    return
  codes = [function.__code__]
  for code in codes:  # grows by nested functions
    yield code.co_code.hex()
    yield [x for x in code.co_consts if not isinstance(x, types.CodeType)]
    codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    for name in code.co_names:
      value = function.__globals__.get(name)
      is_own = getattr(value, '__module__', None) == function.__module__
      if is_own or isinstance(value, str | int | float | tuple | np.ndarray | jax.Array):
        yield name, value
