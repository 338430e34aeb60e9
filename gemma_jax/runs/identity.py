"""A function's identity as text, by which a workdir tells one loss from another.

A name alone would let a notebook continue with a loss that was edited meanwhile.
So the text covers the function's code, closure and defaults, and the functions,
classes and values of the user's modules that it uses; of an installed package it
covers only names and closures, where optax keeps a rate. Equal values give equal
text in every process.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import copyreg
import dis
import functools
import hashlib
import itertools
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.runs.base import Base

_PLAIN = str | int | float | complex | bytes | None


def of_function(function: Any) -> str:
  """The function's name, and a digest of everything it is made of."""
  inner = function
  while isinstance(inner, functools.partial):
    inner = inner.func
  owner = inner if hasattr(inner, '__qualname__') else type(inner)
  return f'{owner.__module__}.{owner.__qualname__} {_digest(function, {})[:16]}'


def _digest(x: Any, known: dict[int, tuple[Any, str]]) -> str:
  """A digest of what a value holds; `known` keeps each alive, so that ids stay its own."""
  if isinstance(x, _PLAIN):
    return repr(x)
  if id(x) not in known:
    name = f'{type(x).__qualname__} {getattr(x, "__qualname__", "")}'
    known[id(x)] = x, name  # of a cycle
    parts = [_digest(part, known) for part in _parts(x)]
    if isinstance(x, set | frozenset):  # their order differs between processes
      parts.sort()
    known[id(x)] = x, hashlib.sha256('\n'.join([name, *parts]).encode()).hexdigest()
  return known[id(x)][1]


def _parts(x: Any) -> Iterable[Any]:
  if isinstance(x, np.ndarray | np.generic | jax.Array):
    return _of_array(x)
  if isinstance(x, Base):  # its weights may be large, and have a name
    return x.source.fingerprint(), str(x.dtype), x.scan_layers
  if isinstance(x, types.FunctionType):
    own = _of_code(x) if _is_own(x.__globals__.get('__name__')) else ()
    return x.__module__, x.__defaults__, x.__kwdefaults__, *_closed_over(x), *own
  if isinstance(x, types.MethodType):
    return x.__func__, x.__self__
  if isinstance(x, Mapping):
    return itertools.chain(*x.items())
  if isinstance(x, set | frozenset | list | tuple):
    return x
  if isinstance(x, types.ModuleType):
    return (x.__name__,)
  if isinstance(x, type):
    return _of_class(x)
  if isinstance(x, property):
    return x.fget, x.fset, x.fdel
  if hasattr(x, '__wrapped__') and not isinstance(x, jax.custom_jvp | jax.custom_vjp):
    return (x.__wrapped__,)  # by jax.jit, for one
  return type(x), *_of_object(x)


def _is_own(module: str | None) -> bool:
  """Whether the user wrote a module; then what it holds may change."""
  root = (module or '__main__').partition('.')[0]
  if root in sys.stdlib_module_names or root == __name__.partition('.')[0]:
    return root == '__main__'
  loaded = (sys.modules.get(name) for name in (root, module or ''))
  files = [getattr(each, '__file__', None) or '' for each in loaded]
  return root == '__main__' or not any('-packages' in file for file in files)


def _of_array(x: Any) -> Iterator[Any]:
  yield f'{x.dtype}{x.shape}'
  if isinstance(x, jax.Array):
    if not x.is_fully_addressable:
      return
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
  x = np.asarray(x)
  yield x.tolist() if x.dtype.hasobject else hashlib.sha256(x.tobytes()).hexdigest()


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
  for cell in function.__closure__ or ():
    with contextlib.suppress(ValueError):  # an empty cell
      yield cell.cell_contents


def _of_code(function: types.FunctionType) -> Iterator[Any]:
  """A function's code, without its docstring, and the globals it uses."""
  codes = [function.__code__]
  for code in codes:  # grows by nested functions
    yield code.co_code, code.co_names
    yield [x for x in code.co_consts if not isinstance(x, types.CodeType) and x != function.__doc__]
    codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    loads = (x for x in dis.get_instructions(code) if x.opname in ('LOAD_GLOBAL', 'LOAD_NAME'))
    for name in dict.fromkeys(load.argval for load in loads):
      value = function.__globals__.get(name)
      yield value
      if isinstance(value, types.ModuleType) and _is_own(value.__name__):
        yield [getattr(value, each, None) for each in code.co_names]


def _of_class(x: type) -> Iterator[Any]:
  yield x.__module__
  if _is_own(x.__module__):
    yield x.__bases__
    for name, value in vars(x).items():
      is_method = isinstance(value, types.FunctionType | classmethod | staticmethod)
      if is_method or not name.startswith('__'):  # those have line numbers, documentation
        yield name, value


def _of_object(x: Any) -> Iterator[Any]:
  """What a copy of an object would be made of."""
  try:
    by_type = copyreg.dispatch_table.get(type(x))  # for regexes, say
    reduced = by_type(x) if by_type else x.__reduce_ex__(2)
  except Exception:  # it cannot be copied, as its class says in its own way
    reduced = getattr(x, '__dict__', ())
  for part in (reduced,) if isinstance(reduced, str | dict) else reduced:
    yield list(part) if isinstance(part, Iterator) else part
